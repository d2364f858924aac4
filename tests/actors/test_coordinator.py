"""A whole coordinator in this process: real weights, real experts over gRPC, and its life from loading to stopped."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.channels import WireCredentials, open_channel
from actors.coordinator.actor import Coordinator
from actors.expert.actor import ExpertActor
from actors.front.coordinator_client import CoordinatorClient, CoordinatorLost
from actors.map_wire import map_to_wire
from cluster.config import ClusterConfig
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from protos.coordinator_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    PublishMapReply,
    SequenceOutput,
)
from protos.coordinator_pb2_grpc import CoordinatorServiceStub
from protos.expert_pb2 import (
    STATUS_CANCELLED,
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INVALID,
    STATUS_OK,
    STATUS_OVERLOADED,
    STATUS_STALE_EPOCH,
)
from tests.support.checkpoints import write_mixtral
from tests.support.engines import TinyModel, request, tell_fresh
from tests.support.held_steps import hold_steps
from tests.support.rambling import write_rambling
from tests.support.served import submit
from tests.support.tokenizers import write_byte_tokenizer

pytestmark = pytest.mark.anyio

TOKEN = "a-token-for-tests-only"
CREDENTIALS = WireCredentials(TOKEN)
LAYERS, EXPERTS = 2, 2


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("coordinator")
    write_mixtral(path, layers=LAYERS, experts=EXPERTS, top_k=2)
    write_byte_tokenizer(path)
    return path


def config(checkpoint: Path, **changes: Any) -> ClusterConfig:
    return ClusterConfig(model=str(checkpoint), coordinator_threads=1, **changes)


def expert_actor(checkpoint: Path, expert: int, port: int = 0) -> ExpertActor:
    return ExpertActor(
        replica_id=f"expert-{expert}-r0",
        expert_ids=[expert],
        first_layer=0,
        num_layers=LAYERS,
        model=str(checkpoint),
        kernel="auto",
        device="cpu",
        auth_token=TOKEN,
        port=port,
    )


def the_map(epoch: int, infos: list[dict[str, Any]], num_layers: int = LAYERS) -> ExpertMap:
    replicas = tuple(
        ReplicaInfo(
            replica_id=ReplicaId(info["replica_id"]),
            expert_ids=tuple(map(ExpertId, info["expert_ids"])),
            first_layer=LayerId(0),
            num_layers=num_layers,
            address=info["address"],
            node_id=NodeId("n"),
            numerics_domain=info["numerics_domain"],
        )
        for info in infos
    )
    return ExpertMap(epoch, num_layers, EXPERTS, replicas)


async def publish(address: str, expert_map: ExpertMap) -> PublishMapReply:
    async with open_channel(address, CREDENTIALS) as channel:
        stub: Any = CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
        reply: PublishMapReply = await stub.PublishMap(map_to_wire(expert_map), timeout=120)
        return reply


async def is_healthy(address: str) -> bool:
    async with open_channel(address, CREDENTIALS) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="octavo.CoordinatorService")
        reply = await stub.Check(request, timeout=120)
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)


async def until_state(coordinator: Coordinator, state: str, detail: str = "") -> dict[str, Any]:
    """Polls as the supervisor does."""
    async with asyncio.timeout(120):
        while True:
            info = await coordinator.info()
            if info["state"] == state and detail in info["detail"]:
                return info
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def started(checkpoint: Path, **changes: Any) -> AsyncIterator[tuple[Coordinator, str]]:
    coordinator = Coordinator(
        coordinator_id="coordinator-0",
        config=config(checkpoint, **changes),
        auth_token=TOKEN,
        node_id="node-7",
    )
    try:
        yield coordinator, await coordinator.start()
    finally:
        await coordinator.stop()


@contextlib.asynccontextmanager
async def experts(checkpoint: Path) -> AsyncIterator[tuple[list[ExpertActor], list[dict[str, Any]]]]:
    """All experts, loaded; and what they say of themselves."""
    actors = [expert_actor(checkpoint, expert) for expert in range(EXPERTS)]
    try:
        for actor in actors:
            await actor.start()
        yield actors, [await actor.wait_settled() for actor in actors]
    finally:
        await asyncio.gather(*(actor.stop() for actor in actors))


@contextlib.asynccontextmanager
async def cluster(
    checkpoint: Path, **changes: Any
) -> AsyncIterator[tuple[Coordinator, CoordinatorClient, list[ExpertActor], list[dict[str, Any]]]]:
    """A ready coordinator, a client of it, and its experts."""
    async with (
        experts(checkpoint) as (actors, infos),
        started(checkpoint, **changes) as (coordinator, address),
    ):
        reply = await publish(address, the_map(1, infos))
        assert (reply.map_epoch, reply.status, reply.detail) == (1, STATUS_OK, "")
        await until_state(coordinator, "ready")
        client = CoordinatorClient(address, CREDENTIALS)
        yield coordinator, client, actors, infos
        await client.close()


async def collect(client: CoordinatorClient, *args: Any, **fields: Any) -> list[SequenceOutput]:
    return [one async for one in client.generate(submit(*args, **fields))]


def tokens(outputs: list[SequenceOutput]) -> list[int]:
    return [token for one in outputs for token in one.token_ids]


async def test_experts_over_grpc_give_the_tokens_and_logprobs_of_one_process(checkpoint: Path) -> None:
    prompts = [[5, 6, 7], [8] * 60, [9], [10, 11] * 20]
    local = TinyModel.load(checkpoint)
    expected = await tell_fresh(local, [request(prompt, 12, num_logprobs=3) for prompt in prompts])
    async with cluster(checkpoint, max_num_batched_tokens=64) as (coordinator, client, _, _):
        told = await asyncio.gather(*(collect(client, 0, prompt, 12, logprobs=3) for prompt in prompts))
        info = await coordinator.info()
    for outputs, story in zip(told, expected, strict=True):
        assert tokens(outputs) == story.tokens
        places = [place for one in outputs for place in one.logprobs]
        assert [place.chosen.logprob for place in places] == [place.chosen.logprob for place in story.logprobs]
        assert [[top.logprob for top in place.top] for place in places] == [
            [top.logprob for top in place.top] for place in story.logprobs
        ]
    computed = sum(len(prompt) + 11 for prompt in prompts)
    assert [sum(layer) for layer in info["load"]] == [computed * 2] * LAYERS
    assert info["generated_tokens_total"] == 48
    assert info["prompt_tokens_total"] == sum(map(len, prompts))
    assert (info["num_running"], info["num_waiting"]) == (0, 0)
    assert info["kv_blocks_free"] == info["kv_blocks_total"]


async def test_guessing_ahead_is_a_setting_and_shows_in_the_report(tmp_path: Path) -> None:
    write_rambling(tmp_path, layers=LAYERS, experts=EXPERTS)
    (expected,) = await tell_fresh(TinyModel.load(tmp_path), [request([8, 9, 10], 40, num_logprobs=1)])
    async with cluster(tmp_path, speculation="prompt_lookup", speculation_ngram_min=1) as (coordinator, client, _, _):
        outputs = await collect(client, 0, [8, 9, 10], 40, logprobs=1)
        info = await coordinator.info()
    assert tokens(outputs) == expected.tokens
    places = [place for one in outputs for place in one.logprobs]
    assert [place.chosen.logprob for place in places] == [place.chosen.logprob for place in expected.logprobs]
    assert info["draft_tokens_total"] >= info["accepted_draft_tokens_total"] > 0
    assert info["steps_total"] == info["generated_tokens_total"] - info["accepted_draft_tokens_total"]


async def test_it_answers_from_the_first_moment_and_takes_requests_when_it_has_all_it_needs(
    checkpoint: Path,
) -> None:
    async with started(checkpoint) as (coordinator, address):
        assert (await coordinator.info())["state"] == "loading"
        client = CoordinatorClient(address, CREDENTIALS)
        (refused,) = await collect(client, 1, [5])
        assert (refused.status, refused.error) == (STATUS_OVERLOADED, "the coordinator is still loading")
        assert refused.retry_after_ms > 0
        info = await until_state(coordinator, "loading", "waiting for a map of all experts")
        assert info["loaded_bytes"] == info["bytes_total"] > 0
        assert info["weight_bytes"] > 0
        assert info["load_s"] > 0
        assert not await is_healthy(address)
        async with experts(checkpoint) as (_, infos):
            lacking = await publish(address, the_map(1, infos[:1]))
            assert (lacking.status, lacking.map_epoch) == (STATUS_INVALID, 0)
            assert "expert 1 in layer 0" in lacking.detail
            assert (await publish(address, the_map(2, infos))).status == STATUS_OK
            info = await until_state(coordinator, "ready")
            assert await is_healthy(address)
            assert info["detail"] == ""
            assert len(tokens(await collect(client, 1, [5], 3))) == 3
        await client.close()


async def test_it_says_who_and_what_it_is(checkpoint: Path) -> None:
    async with cluster(checkpoint, kv_cache_bytes=1 << 20, max_num_seqs=4) as (coordinator, client, _, _):
        info = await coordinator.info()
        snapshot = await client.snapshot()
    assert (info["coordinator_id"], info["node_id"], info["node"]) == ("coordinator-0", "node-7", "node-7")
    assert info["address"] == client.address
    assert info["map_epoch"] == 1
    assert info["kernel"] == "fp32"
    assert "kernel=fp32" in info["numerics_domain"]
    block_bytes = 2 * LAYERS * 2 * 32 * 16 * 4  # keys and values, layers, kv heads, positions, head size, fp32
    assert info["kv_blocks_total"] == (1 << 20) // block_bytes
    assert (info["kv_block_size"], info["max_model_len"]) == (32, 512)
    for name in ("pid", "weights_id", "weight_bytes", "max_model_len", "kernel", "state"):
        assert getattr(snapshot, name) == info[name]
    assert [list(layer.tokens) for layer in snapshot.load] == info["load"] == [[0, 0]] * LAYERS
    assert len(snapshot.window_load) == LAYERS
    healthy = {"state": "healthy", "detail": "", "ejections_total": 0}
    assert info["replica_health"] == [{"replica_id": f"expert-{expert}-r0"} | healthy for expert in range(EXPERTS)]


async def test_it_says_where_its_time_went_and_what_went_over_the_wire(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (_, client, _, _):
        before = await client.snapshot()
        assert len(tokens(await collect(client, 1, [5, 6, 7], 4))) == 4
        after = await client.snapshot()
    phases = ("prepare", "attention", "router", "dispatch", "combine", "head", "expert_wait", "sampling")
    spent = {name: getattr(after, f"{name}_s_total") for name in phases}
    assert all(seconds > 0 for seconds in spent.values()), spent
    assert sum(spent.values()) <= after.step_s_total
    assert after.expert_compute_us_total > 0
    assert after.wire_messages_total == 4 * LAYERS * EXPERTS, "one to each expert in each layer of each step"
    rows_bytes = (3 + 3) * LAYERS * 2 * 64 * 4  # rows to both experts of each layer, hidden size 64, fp32
    for name in ("wire_bytes_sent_total", "wire_bytes_received_total"):
        assert getattr(after, name) > getattr(before, name) + rows_bytes
    assert after.expert_calls_total == after.wire_messages_total
    assert after.hedges_total == after.hedges_won_total == 0
    assert before.step_s_total == before.sampling_s_total == before.wire_messages_total == 0


async def test_it_says_how_fast_its_experts_are_and_how_long_requests_wait(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (coordinator, client, _, infos):
        assert (await client.snapshot()).queue_s == 0
        assert len(tokens(await collect(client, 1, [5, 6, 7], 20))) == 20
        snapshot, info = await client.snapshot(), await coordinator.info()
    assert snapshot.queue_s == 0
    assert 0 < snapshot.window_s < 60
    assert snapshot.batches_total == 20, "a step has one each: so few tokens are not cut in microbatches"
    load_LE = np.array([list(one.tokens) for one in snapshot.load])
    divisible_LE = np.array([list(one.tokens) for one in snapshot.divisible_load])
    assert divisible_LE.tolist() == info["divisible_load"]
    assert divisible_LE.shape == load_LE.shape
    assert (divisible_LE <= load_LE).all()
    assert [one["replica_id"] for one in info["replica_times"]] == [info["replica_id"] for info in infos]
    for expert, (times, facts) in enumerate(zip(snapshot.replica_times, info["replica_times"], strict=True)):
        assert {name: getattr(times, name) for name in facts} | {"busy_share": 0} == facts | {"busy_share": 0}
        assert times.tokens_total == sum(layer.tokens[expert] for layer in snapshot.load)
        assert times.calls_total == 20 * LAYERS, "each is asked once for each layer of a step"
        assert times.compute_us_total > 0
        assert min(times.a_us, times.b_us) >= 0
        assert times.a_us + times.b_us > 0, "of a first call that was held up all is slope"
        assert 0 < times.busy_share <= 1
    assert sum(one.compute_us_total for one in snapshot.replica_times) == snapshot.expert_compute_us_total


async def test_an_older_map_or_one_of_another_model_is_refused(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (_, client, _, infos):
        stale = await publish(client.address, the_map(0, infos[::-1]))
        assert (stale.status, stale.map_epoch) == (STATUS_STALE_EPOCH, 1)
        other = await publish(client.address, the_map(2, infos, num_layers=1))
        assert (other.status, other.map_epoch) == (STATUS_INVALID, 1)
        assert other.detail == "the map is of 1 layers of 2 experts, but the model has 2 of 2"
        again = await publish(client.address, the_map(1, infos))
        assert (again.status, again.map_epoch) == (STATUS_OK, 1)


async def test_sequences_wait_for_an_expert_that_is_away_until_their_own_deadline(checkpoint: Path) -> None:
    """Its round is given up again and again meanwhile; the state says what is waited for."""
    async with cluster(checkpoint, expert_deadline_s=0.5) as (coordinator, client, actors, infos):
        before = tokens(await collect(client, 1, [5, 6], 5))
        await actors[1].stop()
        patient = asyncio.create_task(collect(client, 1, [5, 6], 5))
        await until_state(coordinator, "ready", "waiting for expert 1 in layer 0: ")
        deadline_unix_us = int((time.time() + 8) * 1e6)
        (failed,) = await collect(client, 2, [5, 6], 5, deadline_unix_us=deadline_unix_us)
        assert (failed.finish_reason, failed.status) == (FINISH_REASON_ERROR, STATUS_DEADLINE_EXCEEDED)
        assert "expert 1 in layer 0 is unavailable" in failed.error
        info = await until_state(coordinator, "ready", "waiting for expert 1 in layer 0: expert-1-r0: ")
        assert info["num_running"] == 1
        assert not patient.done()
        port = int(infos[1]["address"].rpartition(":")[2])
        actors[1] = expert_actor(checkpoint, 1, port)
        await actors[1].start()
        assert tokens(await patient) == before
        info = await until_state(coordinator, "ready")
        assert info["detail"] == ""
        assert tokens(await collect(client, 1, [5, 6], 5)) == before


async def test_an_expert_that_dies_and_returns_in_mid_generation_changes_no_token(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (coordinator, client, actors, infos):
        undisturbed = tokens(await collect(client, 1, [5, 6], 160))
        gate = hold_steps(coordinator._engine, free=100)  # it is not done before the expert is back
        outputs = client.generate(submit(1, [5, 6], 160))
        told = [await anext(outputs)]
        await actors[0].stop()
        port = int(infos[0]["address"].rpartition(":")[2])
        actors[0] = expert_actor(checkpoint, 0, port)
        await actors[0].start()
        gate.set()
        told += [output async for output in outputs]
        answered = (await actors[0].info())["tokens_total"]
    assert told[-1].finish_reason == FINISH_REASON_LENGTH
    assert tokens(told) == undisturbed
    assert answered > 0, "the expert that came back was never asked"


async def test_draining_finishes_what_runs_and_takes_nothing_new(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (coordinator, client, _, _):
        gate = hold_steps(coordinator._engine, free=20)  # it is not done before it is drained
        outputs = client.generate(submit(1, [5, 6], 200))
        told = [await anext(outputs)]
        assert 0 < await coordinator.drain(0.0) <= 200
        assert (await coordinator.info())["state"] == "draining"
        assert not await is_healthy(client.address)
        (refused,) = await collect(client, 2, [5])
        assert refused.status == STATUS_DRAINING
        draining = asyncio.create_task(coordinator.drain(200.0))
        gate.set()
        told += [output async for output in outputs]
        assert await draining == 0
        assert len(tokens(told)) == 200


async def test_what_draining_leaves_can_be_ended_with_a_word(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (coordinator, client, _, _):
        hold_steps(coordinator._engine, free=20)  # it is not done before it is ended
        outputs = client.generate(submit(1, [5, 6], 400))
        told = [await anext(outputs)]
        assert await coordinator.drain(0.0, True) > 0
        told += [output async for output in outputs]
        assert (told[-1].finish_reason, told[-1].status) == (FINISH_REASON_ERROR, STATUS_DRAINING)
        assert "shuts down" in told[-1].error
        info = await coordinator.info()
        assert (info["num_running"], info["kv_blocks_free"]) == (0, info["kv_blocks_total"])
        (refused,) = await collect(client, 2, [5])
        assert refused.status == STATUS_DRAINING, "it still answers"


async def test_stopping_tells_those_who_wait_and_ends_their_stream(checkpoint: Path) -> None:
    async with cluster(checkpoint) as (coordinator, client, _, _):
        hold_steps(coordinator._engine, free=20)  # it is not done before all is stopped
        outputs = client.generate(submit(1, [5, 6], 400))
        await anext(outputs)
        await coordinator.stop()
        async with asyncio.timeout(120):
            last = [output async for output in outputs][-1]
        assert (last.finish_reason, last.status) == (FINISH_REASON_ERROR, STATUS_CANCELLED)
        assert last.error == "the coordinator was stopped"
        with pytest.raises(CoordinatorLost):
            await client.snapshot()


async def test_a_drained_coordinator_that_was_still_loading_never_opens(checkpoint: Path) -> None:
    async with experts(checkpoint) as (_, infos), started(checkpoint) as (coordinator, address):
        assert await coordinator.drain(1.0) == 0
        assert (await publish(address, the_map(1, infos))).status == STATUS_OK
        client = CoordinatorClient(address, CREDENTIALS)
        (refused,) = await collect(client, 1, [5])
        assert refused.status == STATUS_DRAINING
        await client.close()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kv_cache_bytes": 100}, "BudgetError: kv_cache_bytes is 100"),
        (
            {"kv_cache_bytes": 1 << 16, "max_model_len": 512},
            "BudgetError: max_model_len is 512, but the KV cache holds",
        ),
        ({"max_model_len": 4096}, "ConfigError: max_model_len is 4096, but the model's context is 512"),
        ({"kernel": "bf16", "device": "cuda"}, ""),
    ],
    ids=["no block", "too few blocks", "too long", "no such device"],
)
async def test_what_cannot_be_loaded_is_said_and_the_port_still_answers(
    checkpoint: Path, changes: dict[str, Any], complaint: str
) -> None:
    async with started(checkpoint, **changes) as (coordinator, address):
        info = await until_state(coordinator, "failed")
        assert complaint in info["detail"]
        client = CoordinatorClient(address, CREDENTIALS)
        assert (await client.snapshot()).state == "failed"
        (refused,) = await collect(client, 1, [5])
        assert refused.status == STATUS_DRAINING
        assert not await is_healthy(address)
        await client.close()


async def test_a_checkpoint_that_is_not_there_is_a_failure_with_its_path(tmp_path: Path) -> None:
    async with started(tmp_path / "nothing") as (coordinator, _):
        info = await until_state(coordinator, "failed")
    assert str(tmp_path / "nothing") in info["detail"]


async def test_starting_twice_gives_the_same_address_and_stopping_twice_is_no_error(checkpoint: Path) -> None:
    async with started(checkpoint) as (coordinator, address):
        assert await coordinator.start() == address
        await coordinator.stop()
