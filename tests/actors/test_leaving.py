"""A node that is about to go: what it does moves while others serve; where nobody has room it serves until the end."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import actors.supervision.supervisor as supervisor_module
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.leaving import MARK_S
from actors.supervision.supervisor import Supervisor
from cluster.desired_set import MoveRefused
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.supervised import NODES, asking, config_of, exactly, ready, supervised, until
from tests.support.tokenizers import write_byte_tokenizer

EACH = tuple(f"expert-{e}-r0" for e in range(4))
APART = (
    replace(NODES[0], roles=frozenset({COORDINATOR_HOST})),
    *(replace(node, roles=frozenset({EXPERT_HOST})) for node in NODES[1:]),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=2, experts=4, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)


def test_experts_are_elsewhere_before_the_node_goes(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model), InProcessRuntime(APART)) as one:
            first = await until(one, exactly(*EACH))
            mine = {row.replica_id for row in first.replicas if row.node == "node-1"}
            assert len(mine) == 2
            async with asking(first) as client:
                assert await one.drain_node("node-1", 120.0) == []
                after = await until(one, ready)
                assert {row.node for row in after.replicas} == {"node-2"}
                assert not mine & {row.replica_id for row in after.replicas}
                assert not any("0 of" in event for event in after.events), "an expert was nowhere"
                await client.more()

    run(work())


def test_a_coordinator_ends_what_it_has_and_another_is_started_elsewhere(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model, coordinators=2), InProcessRuntime(NODES)) as one:
            first = await until(one, ready)
            (gone, stays) = first.coordinators
            async with asking(replace(first, coordinators=[stays])) as client:
                assert await one.drain_node(gone.node, 120.0) == []
                await client.more()
                after = await until(one, ready)
            assert all(row.node != gone.node for row in (*after.coordinators, *after.replicas))
            assert {row.coordinator_id for row in after.coordinators} == {gone.coordinator_id, stays.coordinator_id}
            assert any(row.address == stays.address for row in after.coordinators), "nobody touched this one"

    run(work())


def test_where_nobody_else_may_take_them_experts_serve_until_the_end(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model), InProcessRuntime(APART[:2])) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                assert await one.drain_node("node-1", 0.2) == sorted(EACH)
                await client.more()
            assert {row.replica_id for row in (await until(one, ready)).replicas} == set(EACH)

    run(work())


def test_two_that_go_at_once_do_not_move_to_each_other(model: Path) -> None:
    async def work() -> None:
        nodes = (*APART, replace(APART[1], node_id="node-3"))
        async with supervised(config_of(model), InProcessRuntime(nodes)) as one:
            await until(one, exactly(*EACH))
            left = await asyncio.gather(one.drain_node("node-1", 120.0), one.drain_node("node-2", 120.0))
            assert left == [[], []]
            after = await until(one, ready)
            assert {row.node for row in after.replicas} == {"node-3"}

    run(work())


def test_a_node_that_stays_is_one_like_the_others_again(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model), InProcessRuntime(APART)) as one:
            now_s = [100.0]
            one._leaving._clock = lambda: now_s[0]
            first = await until(one, exactly(*EACH))
            assert await one.drain_node("node-1", 120.0) == []
            assert _marked(one)
            now_s[0] += 120.0 + MARK_S
            await until(one, lambda _: not _marked(one))
            await one.replicate(0, None, None, "node-1")
            await until(one, lambda status: any(row.node == "node-1" for row in status.replicas))
            assert first.state == "ready"

    run(work())


def test_a_node_that_is_not_there_is_refused(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model)) as one:
            await until(one, ready)
            with pytest.raises(MoveRefused, match="there is no node 'node-9'"):
                await one.drain_node("node-9", 1.0)
            assert not _marked(one)

    run(work())


def _marked(one: Supervisor) -> bool:
    return bool(one._experts.leaving or one._coordinators.leaving)
