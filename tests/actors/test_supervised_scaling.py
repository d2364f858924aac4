"""Coordinators that come and go under streams: a real supervisor, real coordinators and experts, real gRPC."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.front.coordinator_client import CoordinatorClient
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.follower import keep_following
from actors.front.resubmission import Verdict
from actors.supervision.in_process import ONE_NODE, InProcessRuntime
from actors.supervision.supervisor import Supervisor
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, Sampling, SequenceOutput, Submit
from tests.actors.test_supervisor import _quick_rounds, config_of, model, ready, supervised, until
from tests.support.front import run
from tests.support.held_steps import hold_steps
from tests.support.served import submit

__all__ = ["_quick_rounds", "model"]  # fixtures

FREE_STEPS = 20


@asynccontextmanager
async def followed(one: Supervisor) -> AsyncIterator[CoordinatorPool]:
    """A pool that follows the supervisor's coordinators, as an ingress has it."""

    async def look() -> dict[str, CoordinatorClient]:
        endpoints = await one.endpoints()
        assert endpoints is not None
        return {address: CoordinatorClient(address, endpoints["credentials"]) for address in endpoints["coordinators"]}

    pool = CoordinatorPool(list((await look()).values()))
    await pool.connect()
    following = asyncio.create_task(keep_following(pool, look, 1, again_s=0.05))
    try:
        yield pool
    finally:
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await pool.close()


async def read(pool: CoordinatorPool, request: Submit) -> tuple[list[int], SequenceOutput]:
    tokens: list[int] = []
    async with aclosing(pool.generate(request)) as outputs:
        async for output in outputs:
            tokens += output.token_ids
    return tokens, output


def crowd() -> list[Submit]:
    """Eight that fill a coordinator and wait at it, and two longer ones for later."""
    sampling = partial(Sampling, temperature=0.8, top_p=0.9, repetition_penalty=1.0)
    lengths = [150] * 8 + [490] * 2
    return [submit(i, [5 + i, 6, 7], length, sampling=sampling(seed=i)) for i, length in enumerate(lengths)]


def held(runtime: InProcessRuntime, coordinator_id: str) -> Callable[[], None]:
    """That coordinator takes a few steps and no more until what is returned is called: its streams outlast a decision,
    however long that takes.
    """
    actor = runtime.find(f"coordinator/{coordinator_id}/1", "space")
    assert actor is not None
    return hold_steps(actor.target.actor._engine, FREE_STEPS).set


def test_coordinators_follow_the_load_and_no_stream_is_hurt(model: Path) -> None:
    """Four streams at a time each: eight make a second one come; it goes while the two longer ones are there."""
    options: dict[str, Any] = {"max_num_seqs": 4, "max_model_len": 512, "drain_timeout_s": 0.05}

    async def work() -> None:
        async with supervised(config_of(model, **options), InProcessRuntime()) as one:
            await until(one, ready)
            async with followed(one) as pool:
                expected = await asyncio.gather(*(read(pool, request) for request in crowd()[:8]))
                expected += await asyncio.gather(*(read(pool, request) for request in crowd()[8:]))
        scaled = config_of(model, **options, min_coordinators=1, max_coordinators=2, scale_up_s=0.2, scale_down_s=0.2)
        runtime = InProcessRuntime()
        async with supervised(scaled, runtime) as one:
            await until(one, ready)
            go_on = held(runtime, "coordinator-0")
            async with followed(one) as pool:
                readers = [asyncio.create_task(read(pool, request)) for request in crowd()[:8]]
                await until(one, lambda status: len(status.coordinators) == 2 and ready(status))
                while pool.num_connected < 2:
                    await pool.wait_for_change()
                held(runtime, "coordinator-1")
                go_on()
                late = [asyncio.create_task(read(pool, request)) for request in crowd()[8:]]
                shrunk = await until(one, lambda status: len(status.coordinators) == 1 and ready(status))
                assert shrunk.coordinators[0].coordinator_id == "coordinator-0"
                found = await asyncio.gather(*readers, *late)
                assert pool.resubmissions[Verdict.LOST] >= 1, "nobody was on the one that went"
        for (tokens, last), (wanted, _) in zip(found, expected, strict=True):
            assert last.finish_reason == FINISH_REASON_LENGTH, last
            assert tokens == wanted
        assert any("2 coordinators instead of 1" in event for event in shrunk.events), shrunk.events
        assert any("1 coordinators instead of 2" in event for event in shrunk.events), shrunk.events

    run(work())


def test_a_new_supervisor_keeps_as_many_as_there_are(model: Path) -> None:
    config = config_of(model, coordinators=2, min_coordinators=1, max_coordinators=3)

    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config, runtime) as one:
            await until(one, ready)
            one._loop.cancel()  # it dies, and its processes live
            two = Supervisor(config=config, runtime=runtime)
            status = await until(two, ready)
            assert len(status.coordinators) == 2
            two._loop.cancel()

    run(work())


def test_hosts_are_asked_for_from_the_first_round_and_only_experts_hosts_count(model: Path) -> None:
    async def work() -> None:
        head = replace(ONE_NODE, node_id="head", roles=frozenset({COORDINATOR_HOST}))
        runtime = InProcessRuntime((head,))
        async with supervised(config_of(model, min_expert_hosts=1, max_expert_hosts=2), runtime) as one:
            waiting = await until(one, lambda status: bool(runtime.requests))
            assert not ready(waiting)
            assert runtime.requests == [(1, frozenset())]
            runtime.nodes_now = (head, replace(ONE_NODE, node_id="new", roles=frozenset({EXPERT_HOST})))
            whole = await until(one, ready)
            assert {row.node for row in whole.replicas} == {"new"}
            assert {row.node for row in whole.coordinators} == {"head"}

    run(work())
