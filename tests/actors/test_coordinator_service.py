"""The coordinator's service over real gRPC: what a stream may ask, what it is told, and what is left when it goes."""

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from actors.channels import WireCredentials, open_channel
from actors.coordinator import engine_io
from actors.coordinator import outbox as outbox_module
from actors.coordinator import service as service_module
from actors.coordinator.engine import Engine
from actors.coordinator.generate_stream import GenerateStream
from actors.coordinator.live_sequences import LiveSequences
from actors.coordinator.outbox import Outbox
from actors.coordinator.service import CoordinatorService
from actors.map_wire import map_from_wire, map_to_wire
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.fair_queue import FairQueue
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.scheduler import Scheduler
from cluster.waiting_queue import WaitingQueue
from protos.coordinator_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    Cancel,
    GenerateReply,
    GenerateRequest,
    PublishMapRequest,
    Replica,
    SequenceOutput,
    SnapshotRequest,
)
from protos.expert_pb2 import (
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OK,
    STATUS_OVERLOADED,
    STATUS_STALE_EPOCH,
    DrainRequest,
)
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, TinyModel, request, tell_fresh
from tests.support.faults import Fault
from tests.support.served import CLOSED, CREDENTIALS, RawStream, Served, raw_stream, served, submit

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("service")
    write_mixtral(path, layers=1, experts=2)
    return TinyModel.load(path)


async def until(condition: Callable[[], bool]) -> None:
    """Waits for what another task does soon; the loop turns meanwhile."""
    async with asyncio.timeout(120):
        while True:
            if condition():
                return
            await asyncio.sleep(0.005)


async def test_one_stream_carries_many_requests_and_the_tokens_are_the_engines(model: TinyModel) -> None:
    prompts = {1: [5, 6, 7], 2: [8] * 40, 7: [9]}
    expected = await tell_fresh(model, [request(prompt, 6) for prompt in prompts.values()])
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(*(submit(name, prompt, 6) for name, prompt in prompts.items()))
        await stream.read_until_done(*prompts)
        assert [stream.tokens(name) for name in prompts] == [story.tokens for story in expected]
        for name, prompt in prompts.items():
            last = stream.last(name)
            assert last is not None
            assert (last.finish_reason, last.status, last.error) == (FINISH_REASON_LENGTH, STATUS_OK, "")
            assert last.num_prompt_tokens == len(prompt)


async def test_logprobs_travel_as_they_are(model: TinyModel) -> None:
    (story,) = await tell_fresh(model, [request([5, 6, 7], 3, num_logprobs=2, num_prompt_logprobs=1)])
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5, 6, 7], 3, logprobs=2, prompt_logprobs=1))
        await stream.read_until_done(1)
    for name in ("logprobs", "prompt_logprobs"):
        told = [place for output in stream.told[1] for place in getattr(output, name)]
        for place, expected in zip(told, getattr(story, name), strict=True):
            assert place.chosen.token_id == expected.chosen.token
            assert place.chosen.logprob == expected.chosen.logprob, "fp32 on both sides"
            assert place.chosen.rank == expected.chosen.rank
            assert [top.token_id for top in place.top] == [top.token for top in expected.top]


async def test_a_stop_token_is_told_and_is_the_last(model: TinyModel) -> None:
    (story,) = await tell_fresh(model, [request([5, 6], 8)])
    stop = story.tokens[4]
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5, 6], 8, stop_token_ids=[stop]))
        await stream.read_until_done(1)
    last = stream.last(1)
    assert last is not None
    assert last.finish_reason == FINISH_REASON_STOP
    assert stream.tokens(1) == story.tokens[: story.tokens.index(stop) + 1]


async def test_a_bad_request_is_answered_alone_with_the_field_named(model: TinyModel) -> None:
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(
            submit(1, [5, 6], 4),
            submit(2, [300]),
            submit(3, []),
            submit(4, [5], 513),
            submit(5, [5], 4, logprobs=21),
            submit(6, [7], 4),
        )
        await stream.read_until_done(1, 2, 3, 4, 5, 6)
        assert one.service.refused_total == 4
    for name, field in (
        (2, "prompt_token_ids[0]"),
        (3, "prompt_token_ids"),
        (4, "max_tokens"),
        (5, "logprobs"),
    ):
        last = stream.last(name)
        assert last is not None
        assert (last.finish_reason, last.status) == (FINISH_REASON_ERROR, STATUS_INVALID)
        assert last.error.startswith(f"{field} ")
    assert (len(stream.tokens(1)), len(stream.tokens(6))) == (4, 4)


async def test_an_id_that_is_in_use_is_refused_and_its_owner_goes_on(model: TinyModel) -> None:
    (story,) = await tell_fresh(model, [request([5, 6], 30)])
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5, 6], 30), submit(1, [7, 8], 3))
        while len(stream.tokens(1)) < 30:
            await stream.read()
        errors = [output.error for output in stream.told[1] if output.status == STATUS_INVALID]
        assert errors == ["request_id is 1, which is in use on this stream"]
        assert stream.tokens(1) == story.tokens
        await stream.send(submit(1, [7, 8], 3))
        while len(stream.tokens(1)) < 33:
            await stream.read()


async def test_two_streams_may_use_the_same_ids(model: TinyModel) -> None:
    expected = await tell_fresh(model, [request([5, 6], 5), request([7, 8, 9], 5)])
    async with served(model) as one, raw_stream(one.address) as left, raw_stream(one.address) as right:
        await left.send(submit(1, [5, 6], 5))
        await right.send(submit(1, [7, 8, 9], 5))
        await left.read_until_done(1)
        await right.read_until_done(1)
    assert [left.tokens(1), right.tokens(1)] == [story.tokens for story in expected]


async def test_a_full_queue_says_when_to_come_back(model: TinyModel) -> None:
    experts = GatedExperts(model.experts)
    experts.gate.clear()  # no place becomes free
    async with (
        served(model, max_waiting_requests=1, max_num_seqs=1, experts=experts) as one,
        raw_stream(one.address) as stream,
    ):
        await stream.send(*(submit(name, [5] * 20, 200) for name in range(1, 6)))
        await until(lambda: one.service.refused_total > 0)
        refused: list[SequenceOutput] = []
        while not refused:
            refused = [output for output in await stream.read() if output.status == STATUS_OVERLOADED]
        assert refused[0].finish_reason == FINISH_REASON_ERROR
        assert refused[0].retry_after_ms >= 1000
        assert "max_waiting_requests is 1" in refused[0].error


async def test_a_cancelled_request_ends_and_others_go_on(model: TinyModel) -> None:
    experts = GatedExperts(model.experts, shuts_after=10)  # nobody is done before it is cancelled
    async with served(model, experts=experts) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5, 6], 400), submit(2, [7, 8], 20))
        await stream.read()
        await stream.send(Cancel(request_id=1), Cancel(request_id=99))
        await stream.read_until_done(1)
        experts.open()
        await stream.read_until_done(2)
        last = stream.last(1)
        assert last is not None
        assert last.finish_reason == FINISH_REASON_CANCELLED
        assert len(stream.tokens(2)) == 20


@pytest.mark.parametrize("how", ["cancel", "half-close", "disconnect"])
async def test_when_a_stream_ends_its_requests_end_at_once(model: TinyModel, how: str) -> None:
    experts = GatedExperts(model.experts, shuts_after=10)  # nobody is done before the stream ends
    async with served(model, max_num_seqs=2, experts=experts) as one, raw_stream(one.address) as other:
        async with raw_stream(one.address) as stream:
            await stream.send(*(submit(name, [5] * 20, 400) for name in range(1, 5)))
            await other.send(submit(1, [7], 300))
            await stream.read()
            await until(lambda: len(one.engine.live) == 5)
            if how == "cancel":
                stream.call.cancel()
            elif how == "half-close":
                await stream.call.done_writing()
            else:
                await stream._channel.close()
            await until(lambda: len(one.engine.live) == 1)
        experts.open()
        await other.read_until_done(1)
        assert len(other.tokens(1)) == 300


async def test_a_reader_that_does_not_read_blocks_nobody_and_misses_nothing(model: TinyModel) -> None:
    names = range(1, 5)
    (story,) = await tell_fresh(model, [request([5, 6], 60, num_logprobs=20)])
    async with served(model) as one, raw_stream(one.address) as lazy, raw_stream(one.address) as keen:
        await lazy.send(*(submit(name, [5, 6], 60, logprobs=20) for name in names))
        await keen.send(submit(1, [7, 8], 20))
        await keen.read_until_done(1)
        await until(lambda: len(one.engine.live) == 0)
        await lazy.read_until_done(*names)
    for name in names:
        assert lazy.tokens(name) == story.tokens
        assert sum(len(output.logprobs) for output in lazy.told[name]) == 60


class Stuck:
    """A connection whose flow control lets nothing through until `gate` is set."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.tried = asyncio.Event()
        self.replies: list[GenerateReply] = []

    async def write(self, reply: GenerateReply) -> None:
        self.tried.set()
        await self.gate.wait()
        self.replies.append(reply)


async def test_a_stream_that_is_broken_off_does_not_wait_for_the_garbage_collector(model: TinyModel) -> None:
    async with served(model) as one, open_channel(one.address, CREDENTIALS) as channel:
        call: Any = channel.stream_stream("/octavo.CoordinatorService/Generate")(timeout=120)
        gc.collect()
        gc.disable()
        try:
            await call.write(b"\xff\xff")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "a message is no GenerateRequest"
            await until(lambda: not any(type(thing) is GenerateStream for thing in gc.get_objects()))
        finally:
            gc.enable()


async def no_requests() -> AsyncIterator[GenerateRequest]:
    await asyncio.Event().wait()
    yield GenerateRequest()


async def test_steps_that_pass_while_a_reader_is_stuck_are_merged() -> None:
    stream, connection = GenerateStream(), Stuck()
    serving = asyncio.create_task(stream.serve(no_requests(), connection, lambda *_: None, lambda _: None))
    for token in range(5):
        assert all(stream.push(SequenceOutput(request_id=name, token_ids=[token])) for name in (1, 2))
        await asyncio.wait_for(connection.tried.wait(), 120)
    connection.gate.set()
    stream.outbox.close()
    assert await asyncio.wait_for(serving, 120) is None
    told = [[list(one.token_ids) for one in reply.outputs] for reply in connection.replies]
    assert told == [[[0], [0]], [[1, 2, 3, 4], [1, 2, 3, 4]]]


async def test_a_reader_that_never_reads_is_given_up_when_too_much_is_unread() -> None:
    stream, connection = GenerateStream(), Stuck()
    stream.outbox = Outbox(max_entries=4)
    ended: list[bool] = []
    serving = asyncio.create_task(
        stream.serve(no_requests(), connection, lambda *_: None, lambda _: ended.append(True))
    )
    assert stream.push(SequenceOutput(request_id=1, token_ids=[1]))
    await asyncio.wait_for(connection.tried.wait(), 120)
    assert stream.push(SequenceOutput(request_id=1, token_ids=[1] * 4))
    assert not stream.push(SequenceOutput(request_id=1, token_ids=[1]))
    reason = await asyncio.wait_for(serving, 120)
    assert reason == "the reader is too slow: 5 unread tokens and alternatives, at most 4"
    assert ended


# Not Outbox._note: the writer, whose messages are everybody's, calls it too, and its end is the stream's.
FAULTS: list[tuple[Any, str]] = [
    (service_module, "check_submit"),
    (Engine, "submit"),
    (LiveSequences, "prepare"),
    (LiveSequences, "keep"),
    (Scheduler, "add"),
    (WaitingQueue, "push"),
    (FairQueue, "add"),
    (service_module, "to_wire"),
    (engine_io, "_positions"),
    (CoordinatorService, "deliver"),
    (CoordinatorService, "_push"),
    (GenerateStream, "push"),
    (Outbox, "push"),
    (outbox_module, "entries"),
]


# What was delivered cannot be taken back: nothing is left in these two that could raise then.
SWEEP = [
    (*fault, after) for fault in FAULTS for after in (False, True) if not (fault[1] in ("deliver", "_push") and after)
]


@pytest.mark.parametrize(
    ("where", "name", "after"),
    SWEEP,
    ids=[f"{one[0].__name__}.{one[1]}-{'after' if one[2] else 'before'}" for one in SWEEP],
)
async def test_every_function_between_a_stream_and_the_engine_may_raise_once(
    model: TinyModel, monkeypatch: pytest.MonkeyPatch, where: Any, name: str, after: bool
) -> None:
    """At most one request fails; the others' tokens are what they are without faults, and nothing is left behind."""
    prompts = {1: [5, 6, 7], 2: [8] * 40, 3: [9], 4: [10, 11]}
    expected = {name: (await tell_fresh(model, [request(prompt, 8)]))[0].tokens for name, prompt in prompts.items()}
    fault = Fault(where, name, after=after)
    fault.install(monkeypatch)
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(*(submit(name, prompts[name], 8) for name in (1, 2)))
        while not stream.tokens(1):
            await stream.read()
        fault.left = 1
        await stream.send(*(submit(name, prompts[name], 8) for name in (3, 4)))
        await stream.read_until_done(*prompts)
        assert fault.calls == 1
        ends = {name: stream.last(name) for name in prompts}
        failed = [name for name, last in ends.items() if last is not None and last.status != STATUS_OK]
        assert len(failed) <= 1
        for number in prompts.keys() - failed:
            assert stream.tokens(number) == expected[number]
        for number in failed:
            assert ends[number].status == STATUS_INTERNAL  # type: ignore[union-attr]
            assert stream.tokens(number) == expected[number][: len(stream.tokens(number))]
        await until(lambda: not len(one.engine.live))
        assert not one.service._routes
        one.engine.scheduler.check_integrity()
        await stream.send(submit(9, [8] * 40, 8))
        await stream.read_until_done(9)
        assert stream.tokens(9) == expected[2]


async def test_a_closed_service_refuses_with_its_reason(model: TinyModel) -> None:
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5], 50))
        await stream.read()
        one.service.close(CLOSED)
        await stream.send(submit(2, [5], 4))
        await stream.read_until_done(1, 2)
        last = stream.last(2)
        assert last is not None
        assert (last.status, last.error) == (CLOSED.status, CLOSED.text)
        assert last.retry_after_ms > 0
        assert len(stream.tokens(1)) == 50, "what was in flight goes on"


async def test_ending_the_streams_says_first_what_is_left(model: TinyModel) -> None:
    async with served(model) as one, raw_stream(one.address) as stream:
        await stream.send(submit(1, [5], 3))
        await until(lambda: one.engine.scheduler.counters.generated_tokens == 3)
        one.service.end_streams()
        await stream.read_until_done(1)
        with pytest.raises(EOFError):
            await stream.read()
        assert await stream.call.code() is grpc.StatusCode.OK


async def test_a_stranger_is_not_listened_to(model: TinyModel) -> None:
    async with served(model) as one:
        stranger = RawStream(one.address, WireCredentials("another-token"))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stranger.read()
        assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert len(one.engine.live) == 0
        await stranger.close()


def two_replicas(epoch: int) -> ExpertMap:
    replicas = tuple(
        ReplicaInfo(
            replica_id=ReplicaId(f"expert-{expert}-r0"),
            expert_ids=(ExpertId(expert),),
            first_layer=LayerId(0),
            num_layers=1,
            address=f"127.0.0.1:{7000 + expert}",
            node_id=NodeId("n"),
            numerics_domain="d",
        )
        for expert in range(2)
    )
    return ExpertMap(epoch, 1, 2, replicas)


async def test_a_published_map_is_applied_and_its_epoch_told(model: TinyModel) -> None:
    async with served(model) as one, raw_stream(one.address) as stream:
        reply = await stream.stub.PublishMap(map_to_wire(two_replicas(3)))
        assert (reply.map_epoch, reply.status) == (3, STATUS_OK)
        stale = await stream.stub.PublishMap(map_to_wire(two_replicas(2)))
        assert (stale.map_epoch, stale.status, stale.detail) == (3, STATUS_STALE_EPOCH, "older")
        assert one.maps == [two_replicas(3)]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_layers": 2**32 - 1}, "num_layers is 4294967295, but must be from 1 to 4096"),
        ({"num_experts": 2**32 - 1}, "num_experts is 4294967295"),
        ({"replicas": [Replica(replica_id="r", expert_ids=range(1024), num_layers=4096)]}, "pairs of layer"),
        ({"replicas": [Replica(replica_id="r", expert_ids=[9], num_layers=1, address="a")]}, "holds experts"),
    ],
    ids=str,
)
async def test_a_map_that_cannot_be_is_refused(model: TinyModel, change: dict[str, object], complaint: str) -> None:
    request = PublishMapRequest(**{"map_epoch": 1, "num_layers": 1, "num_experts": 2, **change})  # type: ignore[arg-type]
    async with served(model) as one, raw_stream(one.address) as stream:
        reply = await stream.stub.PublishMap(request)
    assert reply.status == STATUS_INVALID
    assert complaint in reply.detail
    assert one.maps == []


def test_a_map_survives_the_wire() -> None:
    assert map_from_wire(map_to_wire(two_replicas(4))) == two_replicas(4)


async def test_snapshot_and_drain_reach_their_hooks(model: TinyModel) -> None:
    experts = GatedExperts(model.experts, shuts_after=10)  # it is not done before the first drain is over
    async with served(model, experts=experts) as one, raw_stream(one.address) as stream:
        assert (await stream.stub.Snapshot(SnapshotRequest())).coordinator_id == "coordinator-0"
        await stream.send(submit(1, [5], 300))
        await stream.read()
        hurried = await stream.stub.Drain(DrainRequest(timeout_ms=1))
        assert 0 < hurried.inflight_tokens < 300
        experts.open()
        patient = await stream.stub.Drain(DrainRequest(timeout_ms=200_000))
        assert patient.inflight_tokens == 0
        await stream.read_until_done(1)
        _check_idle(one)


def _check_idle(one: Served) -> None:
    assert len(one.engine.live) == 0
    assert one.engine.scheduler.blocks.num_free == one.engine.scheduler.blocks.num_blocks
