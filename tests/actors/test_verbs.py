"""By hand: replicas are made, drained and folded while a coordinator serves; no request fails, no token changes."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import actors.supervision.supervisor as supervisor_module
from actors.ray_runtime import RuntimeFailure
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.supervisor import Supervisor
from cluster.desired_set import MoveRefused
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.supervised import NODES, asking, by_id, config_of, exactly, ready, supervised, until
from tests.support.tokenizers import write_byte_tokenizer

EACH = tuple(f"expert-{e}-r0" for e in range(4))
HALVES = ("experts-0-1-r0", "experts-2-3-r0")


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


def test_a_copy_is_made_elsewhere_and_drained_again(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model)) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                made = await one.replicate(2, None, None, None)
                assert made["replica_id"] == "expert-2-r1"
                both = await until(one, exactly(*EACH, "expert-2-r1"))
                rows = by_id(both)
                assert rows["expert-2-r1"].node == made["node_id"] != rows["expert-2-r0"].node
                assert both.copies[2].wanted == both.copies[2].ready == 2
                await client.more()
                await one.drain_replica("expert-2-r0")
                after = await until(one, exactly("expert-0-r0", "expert-1-r0", "expert-2-r1", "expert-3-r0"))
                assert after.state == "ready"
                assert not any("0 of" in event for event in after.events)

    run(work())


def test_some_layers_of_an_expert_are_a_replica_too(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model)) as one:
            first = await until(one, exactly(*EACH))
            node = "node-1" if by_id(first)["expert-0-r0"].node != "node-1" else "node-2"
            async with asking(first) as client:
                await one.replicate(0, 1, 1, node)
                both = await until(one, exactly(*EACH, "expert-0-l1-1-r0"))
                assert by_id(both)["expert-0-l1-1-r0"].layers == [1, 1]
                assert by_id(both)["expert-0-l1-1-r0"].node == node
                await client.more()

    run(work())


def test_experts_are_folded_and_unfolded_without_a_failed_request(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model)) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                for groups, names in ((2, HALVES), (1, ("experts-0-3-r0",)), (2, HALVES), (4, EACH)):
                    await one.fold(groups)
                    status = await until(one, exactly(*names))
                    assert status.state == "ready"
                    assert len(by_id(status)[names[0]].expert_ids) == 4 // groups

    run(work())


def test_what_cannot_be_is_refused_in_words(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model, expert_slots=2)) as one:
            first = await until(one, exactly(*EACH))
            nodes = {row.replica_id: row.node for row in first.replicas}
            home = nodes["expert-0-r0"]
            (full,) = {node for node in nodes.values() if list(nodes.values()).count(node) == 2}
            refusals = {
                "there is no expert 9: the model has 0 to 3": one.replicate(9, None, None, None),
                "layers 1-5 are not within 0-1": one.replicate(0, 1, 5, None),
                "there is no node 'nowhere'; there are node-0, node-1, node-2": one.replicate(0, None, None, "nowhere"),
                "3 nodes begin with 'node'": one.replicate(0, None, None, "node"),
                f"node {home} has expert 0 already": one.replicate(0, None, None, home),
                "there is no replica 'expert-7-r0'": one.drain_replica("expert-7-r0"),
                "expert-0-r0 is not drained: it is the last copy of expert 0": one.drain_replica("expert-0-r0"),
                "4 experts do not come out even in 3 groups": one.fold(3),
            }
            for words, call in refusals.items():
                with pytest.raises(MoveRefused, match=words):
                    await call
            away = next(e for e in range(4) if nodes[f"expert-{e}-r0"] != full)
            with pytest.raises(MoveRefused, match=f"node {full} is full: it holds 2 of 2"):
                await one.replicate(away, None, None, full)
            assert exactly(*EACH)(await until(one, ready)), "nothing has changed"
            with pytest.raises(RuntimeFailure, match="no load has been seen yet"):
                await one.balance(True)

    run(work())


def test_a_copy_that_is_drained_while_it_loads_leaves_no_trace(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model)) as one:
            await until(one, exactly(*EACH))
            await one.replicate(3, None, None, None)
            await one.drain_replica("expert-3-r1")
            status = await until(one, exactly(*EACH))
            assert status.state == "ready"

    run(work())


def test_a_new_supervisor_knows_what_was_changed_by_hand(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime(NODES)
        old = Supervisor(config=config_of(model), runtime=runtime)
        await until(old, exactly(*EACH))
        await old.replicate(1, None, None, None)
        await until(old, exactly(*EACH, "expert-1-r1"))
        await old.drain_replica("expert-1-r0")
        names = ("expert-0-r0", "expert-1-r1", "expert-2-r0", "expert-3-r0")
        first = await until(old, exactly(*names))
        old._loop.cancel()  # its process dies; the actors stay
        await asyncio.gather(old._loop, return_exceptions=True)
        await old._balancing.close()
        async with supervised(config_of(model), runtime) as new:
            second = await until(new, lambda status: exactly(*names)(status) and ready(status))
            addresses = {one.replica_id: one.address for one in first.replicas}
            assert {one.replica_id: one.address for one in second.replicas} == addresses
        await old._publisher.close()

    run(work())


def test_a_copy_on_a_lost_node_is_not_missed_and_the_only_one_comes_back(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime(NODES)
        async with supervised(config_of(model), runtime) as one:
            await until(one, exactly(*EACH))
            made = await one.replicate(0, None, None, "node-2")
            first = await until(one, exactly(*EACH, made["replica_id"]))
            runtime.nodes_now = NODES[:2]
            for actor in runtime.spawned:
                if actor.node_id == "node-2":
                    actor.kill()
            after = await until(one, lambda status: exactly(*EACH)(status) and ready(status))
            assert {row.node for row in after.replicas} == {"node-0", "node-1"}
            assert any(row.node == "node-2" for row in first.replicas if row.replica_id in EACH)

    run(work())


def test_where_there_is_no_room_nothing_is_promised(model: Path) -> None:
    async def work() -> None:
        small = tuple(replace(node, memory_bytes=(1 << 29) if node.node_id != "node-0" else 1 << 34) for node in NODES)
        async with supervised(config_of(model), InProcessRuntime(small)) as one:
            status = await until(one, exactly(*EACH))
            there = {row.node for row in status.replicas}
            for _ in {"node-1", "node-2"} - there:
                await one.replicate(0, None, None, None)
            with pytest.raises(MoveRefused, match="no node has room for another copy of expert"):
                await one.replicate(
                    next(int(r.replica_id[7]) for r in status.replicas if r.node == "node-0"), *[None] * 3
                )

    run(work())
