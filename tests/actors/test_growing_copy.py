"""A copy serves the layers that it has while it loads the others: the map has it in steps, and no token changes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch

import actors.supervision.supervisor as supervisor_module
import cluster.reconcile as reconcile_module
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.status import ClusterStatus
from actors.supervision.supervisor import Supervisor
from cluster.ids import ReplicaId
from cluster.reconcile import GROWTH_STEPS
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.held_copies import HeldCopies
from tests.support.supervised import NODES, asking, by_id, config_of, exactly, supervised, until
from tests.support.tokenizers import write_byte_tokenizer

LAYERS = 8
EACH = tuple(f"expert-{e}-r0" for e in range(4))
COPY = ReplicaId("expert-2-r1")
HALF = LAYERS // 2
BYTES_PER_S = 1 << 20
"""Only copies are held to it: what is loaded at the start is not."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=LAYERS, experts=4, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(autouse=True)
def half_way(monkeypatch: pytest.MonkeyPatch) -> HeldCopies:
    """Rounds are quick, copies join at once and stop half-way."""
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)
    monkeypatch.setattr(reconcile_module, "GROWS_AFTER_S", 0.0)
    return HeldCopies(monkeypatch, lambda _, layer: layer >= HALF)


def layers_in_map(one: Supervisor) -> int:
    return sum(len(it.layers) for it in one._experts.state.expert_map.replicas if it.replica_id == COPY)


@asynccontextmanager
async def steps_of(one: Supervisor) -> AsyncIterator[list[int]]:
    """How many layers of the copy the map had, one after another, without repeats."""
    steps = [layers_in_map(one)]

    async def watch() -> None:
        while True:
            await one._experts.looked.wait()
            if layers_in_map(one) != steps[-1]:
                steps.append(layers_in_map(one))

    task = asyncio.create_task(watch())
    try:
        yield steps
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def serves_while_it_loads(status: ClusterStatus) -> bool:
    copy = by_id(status).get(COPY)
    return copy is not None and copy.state == "loading" and copy.tokens_total > 0


def test_it_joins_the_map_in_steps_and_serves_before_it_is_whole(model: Path, half_way: HeldCopies) -> None:
    async def work() -> None:
        async with supervised(config_of(model, balance_bytes_per_s=BYTES_PER_S)) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client, steps_of(one) as steps:
                await one.replicate(2, None, None, None)
                await until(one, serves_while_it_loads)
                assert not one._experts.is_whole(COPY), "nobody takes the copy for done"
                half_way.go()
                await until(one, exactly(*EACH, COPY))
                await client.more()
            assert steps == sorted(set(steps)), "it only grows"
            assert set(steps) <= {0, 2, 4, 6, LAYERS}, f"of {LAYERS} layers, {GROWTH_STEPS} steps at most"
            assert (len(steps) > 2, steps[-1]) == (True, LAYERS)
            assert one._experts.is_whole(COPY)

    run(work())


def test_a_copy_that_dies_half_way_leaves_the_map_and_the_others_serve_on(model: Path, half_way: HeldCopies) -> None:
    runtime = InProcessRuntime(NODES)

    async def work() -> None:
        async with supervised(config_of(model, balance_bytes_per_s=BYTES_PER_S), runtime) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client, steps_of(one) as steps:
                await one.replicate(2, None, None, None)
                await until(one, serves_while_it_loads)
                (copy,) = (actor for actor in runtime.spawned if f"/{COPY}/" in actor.name)
                copy.kill()
                await until(one, lambda _: steps.count(0) == 2)
                half_way.go()
                await client.more()
                await until(one, exactly(*EACH, COPY))
                await client.more()
            assert steps.count(0) == 2, f"it left and came again: {steps}"
            assert steps[-1] == LAYERS

    run(work())


def test_a_copy_that_is_not_wanted_any_more_leaves_the_map_before_it_ends(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model, balance_bytes_per_s=BYTES_PER_S)) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await one.replicate(2, None, None, None)
                await until(one, serves_while_it_loads)
                await one.drain_replica(COPY)
                await until(one, exactly(*EACH))
                await client.more()

    run(work())


def test_at_the_start_and_where_nobody_else_serves_a_part_is_of_no_use(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime(NODES)
        async with supervised(config_of(model), runtime) as one:
            await until(one, exactly(*EACH))
            epochs = one._experts.state.expert_map.epoch
            assert epochs <= len(EACH), "every map had somebody whole more than the one before"

    run(work())
