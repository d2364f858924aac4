"""A recording of real coordinators, merged into the file that the simulator reads."""

import asyncio
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.channels import WireCredentials
from actors.command.added_commands import CommandError
from actors.ray_runtime import RuntimeFailure
from cluster.routing_trace import RoutingTrace, TraceError, read_trace, write_trace
from experiments.simulation.commands import trace_stats
from experiments.trace_merge import TraceMerger
from experiments.trace_record import Enough, record, seconds_of
from protos.coordinator_pb2 import TraceArrival, TraceChunk, TraceEnd, TraceStep
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, TinyModel
from tests.support.routing import routed_alone
from tests.support.served import CREDENTIALS, Served, raw_stream, served, submit

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("recorded") / "tiny"
    write_mixtral(path)
    return TinyModel.load(path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard(Enough):
    """Never enough, but says when the recorder has so many tokens."""

    num_tokens: int
    event: asyncio.Event

    def reached(self, merger: TraceMerger) -> bool:
        if merger.num_tokens >= self.num_tokens:
            self.event.set()
        return False


class Recording:
    """`record` under way; `said` are its lines."""

    def __init__(self, enough: Enough, *coordinators: Served) -> None:
        self.there = list(coordinators)
        self.stop = asyncio.Event()
        self.said: list[str] = []
        self._more = asyncio.Event()
        self.task = asyncio.create_task(record(self._look, enough, self.stop, self._say))

    async def _look(self) -> Mapping[str, WireCredentials]:
        return {one.address: CREDENTIALS for one in self.there}

    def _say(self, text: str) -> None:
        self.said.append(text)
        self._more.set()

    async def until_said(self, text: str, count: int = 1) -> None:
        async with asyncio.timeout(120):
            while sum(text in line for line in self.said) < count:
                self._more.clear()
                await self._more.wait()

    async def end(self) -> TraceMerger:
        async with asyncio.timeout(120):
            return await self.task


async def generate(one: Served, *prompts: list[int], max_tokens: int = 6) -> list[list[int]]:
    async with raw_stream(one.address) as stream:
        numbers = range(1, len(prompts) + 1)
        for number, prompt in zip(numbers, prompts, strict=True):
            await stream.send(submit(number, prompt, max_tokens))
        await stream.read_until_done(*numbers)
        return [stream.tokens(number) for number in numbers]


def of_request(trace: RoutingTrace, request: int) -> Any:
    return trace.experts[trace.token_request == request]


async def test_two_coordinators_are_one_trace(model: TinyModel) -> None:
    async with served(model) as first, served(model) as second:
        recording = Recording(Enough(requests=3), first, second)
        await recording.until_said("recording", 2)
        (one,) = await generate(first, [5, 6, 7])
        two, three = await generate(second, [9] * 40, [11])
        trace = (await recording.end()).trace()
    assert trace.prompt_tokens.tolist() == [3, 40, 1]
    assert trace.output_tokens.tolist() == [6, 6, 6]
    assert trace.arrival_s[0] == 0
    assert (np.diff(trace.token_time_s) >= 0).all()
    for request, (prompt, tokens) in enumerate((([5, 6, 7], one), ([9] * 40, two), ([11], three))):
        assert np.array_equal(of_request(trace, request), routed_alone(model, [*prompt, *tokens][:-1]))
    file = io.BytesIO()
    write_trace(trace, file)
    file.seek(0)
    again = read_trace(file)
    assert np.array_equal(again.experts, trace.experts)
    stats = trace_stats(again)
    assert (stats["num_requests"], stats["num_tokens"], stats["num_layers"], stats["top_k"]) == (3, 59, 2, 2)


async def test_stopping_it_leaves_a_whole_trace(model: TinyModel) -> None:
    """As Ctrl-C does, in the middle of a request."""
    experts = GatedExperts(model.experts)
    async with served(model, experts=experts) as one:
        heard = asyncio.Event()
        recording = Recording(Heard(num_tokens=60, event=heard), one)
        await recording.until_said("recording")
        async with raw_stream(one.address) as stream:
            await stream.send(submit(1, [5, 6, 7], 300))
            await stream.read()
            while one.engine.routing.tap.tokens_total < 60:
                await stream.read()
            experts.gate.clear()  # it is in the middle until all is over
            async with asyncio.timeout(120):
                await heard.wait()
            recording.stop.set()
            merger = await recording.end()
            experts.gate.set()
    trace = merger.trace()
    assert merger.num_ended == 0
    assert trace.prompt_tokens.tolist() == [3]
    assert trace.output_tokens.tolist() == [len(trace.experts) - 3 + 1], "as many as were seen"


@pytest.mark.parametrize("enough", [Enough(seconds=0.05), Enough(max_tokens=5)], ids=str)
async def test_it_ends_by_itself(model: TinyModel, enough: Enough) -> None:
    async with served(model) as one:
        recording = Recording(enough, one)
        if enough.seconds is None:  # else it may be over before it has heard anybody
            await recording.until_said("recording")
        await generate(one, [5, 6, 7])
        await recording.end()


async def test_a_coordinator_that_is_lost_and_one_that_comes(model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.trace_record.LOOK_AGAIN_S", 0.02)
    async with served(model) as stays:
        async with served(model) as leaves:
            recording = Recording(Enough(requests=3), stays, leaves)
            await recording.until_said("recording", 2)
            await generate(leaves, [5, 6, 7])
            recording.there = [stays]
            leaves.service.end_streams()
            await recording.until_said("has ended")
        async with served(model) as comes:
            recording.there = [stays, comes]
            await recording.until_said("recording", 3)
            await generate(stays, [8])
            await generate(comes, [9, 10])
            trace = (await recording.end()).trace()
    assert trace.prompt_tokens.tolist() == [3, 1, 2]
    assert trace.output_tokens.tolist() == [6, 6, 6]


async def test_without_a_cluster_it_does_not_begin() -> None:
    async def nobody() -> Mapping[str, WireCredentials]:
        raise RuntimeFailure("no octavo cluster runs there")

    with pytest.raises(RuntimeFailure, match="no octavo cluster"):
        await record(nobody, Enough(), asyncio.Event(), print)


def chunk(*rows: tuple[int, int, bytes], time_s: float = 1.0, **fields: Any) -> TraceChunk:
    """One step with rows of (sequence, position, experts) of a model of one layer, 300 experts, top-1."""
    step = TraceStep(
        time_unix_us=int(time_s * 1e6),
        sequences=b"".join(sequence.to_bytes(8, "little") for sequence, _, _ in rows),
        positions=b"".join(position.to_bytes(4, "little") for _, position, _ in rows),
        experts=b"".join(experts for _, _, experts in rows),
    )
    shape = {"num_layers": 1, "num_experts": 300, "top_k": 1, **fields}
    return TraceChunk(steps=[step] if rows else [], **shape)


def test_order_is_that_of_time_whoever_tells_first() -> None:
    merger = TraceMerger()
    merger.add(
        "b",
        chunk(
            (0, 0, b"\x02\x01"),
            time_s=5.0,
            arrivals=[TraceArrival(sequence=0, time_unix_us=4_000_000, prompt_tokens=1)],
        ),
    )
    merger.add(
        "a",
        chunk(
            (0, 0, b"\x01\x00"),
            time_s=3.0,
            arrivals=[TraceArrival(sequence=0, time_unix_us=2_000_000, prompt_tokens=2)],
        ),
    )
    merger.add("a", chunk((7, 9, b"\x03\x00"), time_s=6.0, dropped_tokens=4))
    trace = merger.trace()
    assert trace.experts.ravel().tolist() == [1, 258, 3]
    assert trace.experts.dtype == np.uint16
    assert trace.token_time_s.tolist() == [1.0, 3.0, 4.0]
    assert trace.token_request.tolist() == [0, 1, -1]
    assert trace.arrival_s.tolist() == [0.0, 2.0]
    assert trace.prompt_tokens.tolist() == [2, 1]
    assert merger.dropped_tokens == 4


def test_a_sequence_number_may_come_again_after_its_end() -> None:
    merger = TraceMerger()
    for prompt in (1, 2):
        arrival = TraceArrival(sequence=0, time_unix_us=prompt, prompt_tokens=prompt)
        merger.add(
            "a", chunk((0, 0, b"\x01\x00"), arrivals=[arrival], ends=[TraceEnd(sequence=0, output_tokens=prompt)])
        )
    assert merger.trace().token_request.tolist() == [0, 1]
    assert merger.trace().output_tokens.tolist() == [1, 2]
    assert merger.num_ended == 2


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (chunk((0, 0, b"\x01\x00"), num_layers=2), r"\(2, 300, 1\), but the first of \(1, 300, 1\)"),
        (chunk((0, 0, b"\x01")), "8 bytes of sequences, 4 of positions and 1 of experts"),
        (chunk((0, 0, b"\xff\xff")), "told of expert 65535, but there are 300"),
        (TraceChunk(), r"\(0, 0, 0\)"),
    ],
)
def test_what_cannot_be_is_refused_whole(bad: TraceChunk, says: str) -> None:
    merger = TraceMerger()
    merger.add("a", chunk((0, 0, b"\x01\x00")))
    bad.arrivals.append(TraceArrival(sequence=3, prompt_tokens=1))
    with pytest.raises(TraceError, match=says):
        merger.add("b", bad)
    assert (merger.num_tokens, merger.num_requests) == (1, 0)


def test_nothing_recorded_is_no_trace() -> None:
    merger = TraceMerger()
    merger.add("a", chunk())
    with pytest.raises(TraceError, match="no token was routed"):
        merger.trace()


@pytest.mark.parametrize(("text", "seconds"), [("60s", 60), ("5m", 300), ("1h", 3600), ("2.5", 2.5)])
def test_times_as_people_write_them(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "-1s", "5d", "soon"])
def test_other_texts_are_no_times(text: str) -> None:
    with pytest.raises(CommandError, match="must be a time such as 60s"):
        seconds_of(text)


def test_locality_is_that_of_a_request_where_requests_are_known() -> None:
    def same(token_request: list[int]) -> float:
        trace = RoutingTrace(
            num_experts=4,
            arrival_s=np.zeros(2),
            prompt_tokens=np.ones(2, np.int32),
            output_tokens=np.ones(2, np.int32),
            token_time_s=np.arange(6.0),
            token_request=np.array(token_request, np.int32),
            experts=np.array([0, 1, 0, 1, 0, 2], np.uint8).reshape(6, 1, 1),
        )
        return float(trace_stats(trace)["same_first_expert_as_last_token"])

    assert same([-1] * 6) == 0
    assert same([0, 1, 0, 1, 0, 1]) == 0.75
