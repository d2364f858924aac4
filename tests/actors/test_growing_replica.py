"""A replica that still loads serves the layers that it has, and says which; and loads no faster than it may."""

import asyncio
import os
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

import actors.expert.loading as loading_module
from actors.expert import behind
from actors.expert.actor import ExpertActor
from actors.expert.fetching import MAX_STRIKES, Peer, PeerError, PieceStream
from actors.expert.loading import BURST_BYTES, LayerLoader, Pace
from actors.expert.model_facts import ModelFacts
from actors.expert.process import ExpertProcess
from actors.expert.replica import LoadProgress
from actors.expert.service import SERVICE, LoadError
from model.experts import ExpertColumn
from model.numerics import same_bits
from model.storage.checkpoint import Checkpoint
from protos import expert_pb2 as pb
from protos.codec import decode_tensor, encode_request, reply_seed
from tests.support import expert_process
from tests.support.columns import (
    COLUMN_BYTES,
    HIDDEN,
    LAYERS,
    MESSAGES,
    arguments,
    assert_same_bits,
    begun,
    checksums,
    false_donor,
    nowhere,
    silent_from,
    started,
    until,
    write_model,
)
from tests.support.experts import FAR_FUTURE_US, channel_to, credentials, run

FIRST_LAYER_SENT = 3 * MESSAGES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    write_model(path)
    return path


async def ask(channel: grpc.aio.Channel, layer: int, x_MD: torch.Tensor) -> tuple[pb.ForwardReply, torch.Tensor | None]:
    """One message of rows for expert 1, and its answer."""
    forward: Any = channel.stream_stream(f"/{SERVICE}/Forward")
    call = forward()
    header = pb.ForwardRequest(
        sequence=1, layer_id=layer, expert_ids=[1], expert_rows=[len(x_MD)], deadline_unix_us=FAR_FUTURE_US
    )
    await call.write(encode_request(header, x_MD))
    reply = pb.ForwardReply.FromString(await call.read())
    await call.done_writing()
    if reply.status != pb.STATUS_OK:
        return reply, None
    seed = reply_seed(header)
    return reply, decode_tensor(reply.output, max_rows=99, width=HIDDEN, dtypes=[torch.float32], seed=seed)


async def info_of(channel: grpc.aio.Channel) -> pb.InfoReply:
    info: Any = channel.unary_unary(f"/{SERVICE}/Info", pb.InfoRequest.SerializeToString, pb.InfoReply.FromString)
    reply: pb.InfoReply = await info(pb.InfoRequest())
    return reply


def test_it_serves_the_layers_that_it_has_while_others_are_under_way(model: Path) -> None:
    async def work() -> None:
        tamper, release = silent_from(FIRST_LAYER_SENT)
        x_MD = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(1))
        oracle = ExpertColumn.load(Checkpoint.open(model), 1, range(LAYERS), "fp16", "cpu")
        async with (
            started(**arguments(model)) as (_, donor),
            false_donor(donor["address"], tamper) as (address, _),
            begun(**nowhere(model, sources=[address])) as actor,
        ):
            at = (await actor.info())["address"]
            async with channel_to(at) as channel:
                attach: Any = channel.unary_unary(
                    f"/{SERVICE}/Attach", pb.AttachRequest.SerializeToString, pb.AttachReply.FromString
                )
                assert (await attach(pb.AttachRequest())).lane == "grpc", "answered as soon as there is one layer"
                info = await info_of(channel)
                assert (info.state, info.ready_layers) == (pb.REPLICA_STATE_LOADING, 1)
                assert (list(info.expert_ids), info.num_layers) == ([], LAYERS)
                assert info.numerics_domain == donor["numerics_domain"]
                reply, answer = await ask(channel, 0, x_MD)
                assert answer is not None, reply.detail
                assert same_bits(answer, oracle.forward(0, x_MD))
                reply, _ = await ask(channel, 1, x_MD)
                assert reply.status == pb.STATUS_NOT_HELD
                assert reply.detail == "this replica does not hold expert 1 in layer 1"
                release.set()
                assert (await actor.wait_settled())["state"] == "ready"
                info = await info_of(channel)
                assert (info.state, info.ready_layers) == (pb.REPLICA_STATE_READY, LAYERS)
                assert list(info.expert_ids) == [1]
                reply, answer = await ask(channel, 2, x_MD)
                assert answer is not None, reply.detail
                assert same_bits(answer, oracle.forward(2, x_MD))
                assert_same_bits(actor, model)

    run(work())


def test_of_two_experts_a_layer_is_ready_when_both_have_it(model: Path) -> None:
    async def work() -> None:
        tamper, release = silent_from(FIRST_LAYER_SENT)
        async with (
            started(**arguments(model, expert_ids=[1, 2])) as (_, donor),
            false_donor(donor["address"], tamper) as (address, _),
            begun(**nowhere(model, expert_ids=[1, 2], sources=[address])) as actor,
        ):
            await until(lambda: actor._replica.find(0, 1) is not None)
            assert (await actor.info())["ready_layers"] == 0
            assert not actor._replica.opened.is_set()
            release.set()
            assert (await actor.wait_settled())["ready_layers"] == LAYERS
            assert_same_bits(actor, model, (1, 2))

    run(work())


def test_a_growing_replica_is_watched_once_it_serves_and_fails_for_good(model: Path) -> None:
    async def work() -> None:
        tamper, release = silent_from(FIRST_LAYER_SENT + 1)
        async with (
            started(**arguments(model)) as (_, donor),
            false_donor(donor["address"], tamper) as (address, _),
            begun(**nowhere(model, sources=[address], canary_pass_s=0.001)) as actor,
        ):
            await actor._replica.opened.wait()
            async with channel_to((await actor.info())["address"]) as channel:
                await ask(channel, 0, torch.ones(1, HIDDEN))
            assert (await actor.info())["canaries_total"] == 0, "layer 1 began before there were rows"
            column = actor._growth.columns[1]
            held = {layer: column._ffns[layer] for layer in column.layers}
            column._ffns[0] = ExpertColumn.load(Checkpoint.open(model), 3, range(1), "fp16", "cpu")._ffns[0]
            release.set()
            info = await actor.wait_settled()
            await until(lambda: actor._replica.state == pb.REPLICA_STATE_FAILED)
            assert held, info
            assert "quarantined: canary of expert 1, layer 0" in (await actor.info())["detail"]

    run(work())


def test_draining_while_it_grows_stays_draining(model: Path) -> None:
    async def work() -> None:
        tamper, release = silent_from(FIRST_LAYER_SENT)
        async with (
            started(**arguments(model)) as (_, donor),
            false_donor(donor["address"], tamper) as (address, _),
            begun(**nowhere(model, sources=[address])) as actor,
        ):
            await actor._replica.opened.wait()
            await actor.drain(1)
            release.set()
            assert (await actor.wait_settled())["state"] == "draining"

    run(work())


def test_stop_does_not_wait_for_a_silent_peer_nor_for_the_pace(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either would be waited for longer than this test may take."""
    monkeypatch.setattr(Peer.__init__, "__kwdefaults__", {"piece_s": 1000.0})
    monkeypatch.setattr(loading_module, "MIN_BYTES_PER_S", 1)

    async def work() -> None:
        tamper, _ = silent_from(0)
        async with started(**arguments(model)) as (_, donor):
            async with (
                false_donor(donor["address"], tamper) as (address, false),
                begun(**arguments(model, sources=[address])),
            ):
                await until(lambda: false.open > 0)
            async with begun(**arguments(model, load_bytes_per_s=1)) as actor:
                await until(lambda: actor._growth._loader is not None)

    run(work())


class Clock:
    """Time passes only by waiting."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> bool:
        self.waits.append(seconds)
        self.now_s += seconds
        return False


def loader(model: Path, pace: Pace, *peers: Peer, disk: bool = True) -> LayerLoader:
    checkpoint = Checkpoint.open(model)
    return LayerLoader(
        facts=ModelFacts.of(checkpoint),
        disk=checkpoint.expecting(checksums(model)) if disk else None,
        why_no_disk="there is no disk",
        peers=peers,
        kernel="fp16",
        device=torch.device("cpu"),
        checksums=checksums(model),
        pace=pace,
        progress=LoadProgress(),
    )


@pytest.mark.parametrize("rate", [1 << 16, 10_000_000])
def test_a_disk_is_read_at_the_pace_and_in_small_portions(model: Path, rate: int) -> None:
    clock = Clock()
    reading = loader(model, Pace(rate, clock, clock.sleep))
    for layer in range(LAYERS):
        reading.load(1, layer)
    assert clock.now_s - 100.0 == pytest.approx((COLUMN_BYTES - BURST_BYTES) / rate, rel=1e-6)
    assert max(clock.waits) <= (256 << 10) / rate * 1.01
    assert len(clock.waits) > (COLUMN_BYTES - BURST_BYTES) // (256 << 10)


def test_a_peer_is_read_at_the_pace(model: Path) -> None:
    async def work() -> None:
        clock = Clock()
        async with started(**arguments(model)) as (_, donor):
            peer = Peer(donor["address"], credentials())
            reading = loader(model, Pace(1 << 20, clock, clock.sleep), peer, disk=False)
            for layer in range(LAYERS):
                await asyncio.to_thread(reading.load, 1, layer)
            await peer.close()
        assert clock.now_s - 100.0 == pytest.approx((COLUMN_BYTES - BURST_BYTES) / (1 << 20), rel=1e-6)

    run(work())


def test_a_silent_peer_has_a_deadline_for_each_piece_and_so_many_chances(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work() -> None:
        tamper, release = silent_from(1)
        async with (
            started(**arguments(model)) as (_, donor),
            false_donor(donor["address"], tamper) as (address, false),
        ):
            read = PieceStream._read

            async def read_once_begun(stream: PieceStream) -> bytes:
                calls = false.calls
                if stream._call is None:
                    stream._call = stream._begin()
                    await until(lambda: false.calls > calls)  # a call that is given up before is not seen there
                return await read(stream)

            monkeypatch.setattr(PieceStream, "_read", read_once_begun)
            peer = Peer(address, credentials(), piece_s=0.2)
            reading = loader(model, Pace(None), peer)
            for expert in (1, 1, 1, 1, 1):
                await asyncio.to_thread(reading.load, expert, 0)
            assert (peer.strikes, false.calls) == (MAX_STRIKES, MAX_STRIKES)
            release.set()
            monkeypatch.undo()
            await peer.close()
            with pytest.raises(PeerError, match=r"its channel closed"):
                await asyncio.to_thread(peer.fetch(1, 0).next)

    run(work())


def test_without_a_disk_peers_are_asked_again_after_a_pause_and_stopping_ends_that(model: Path) -> None:
    async def work() -> None:
        clock = Clock()
        async with started(**arguments(model, expert_ids=[2])) as (_, donor):
            peer = Peer(donor["address"], credentials())
            pace = Pace(None, clock, clock.sleep)
            with pytest.raises(
                LoadError, match=f"expert 1, layer 0: not had from peers .{donor['address']}., and there"
            ):
                await asyncio.to_thread(loader(model, pace, peer, disk=False).load, 1, 0)
            assert clock.waits == [1.0] * 4
            assert peer.strikes == 0, "it said in good order that it has nothing"
            pace.stop()
            with pytest.raises(LoadError, match="stopped while loading"):
                await asyncio.to_thread(loader(model, pace).load, 1, 0)
            await peer.close()

    run(work())


def test_a_thread_that_stands_behind_leaves_others_where_they_are() -> None:
    seen: list[tuple[int, int]] = []

    def look() -> None:
        tid = threading.get_native_id()
        seen.append((os.getpriority(os.PRIO_PROCESS, tid), os.sched_getscheduler(0)))

    look()
    assert behind.run_behind(lambda: look() or threading.get_native_id()) != threading.get_native_id()
    inherited = threading.Thread(target=look)
    behind.run_behind(lambda: (inherited.start(), inherited.join()))
    look()
    before, stood_back, child, after = seen
    assert before == after
    assert stood_back == child == (min(19, before[0] + behind.NICE), os.SCHED_BATCH)
    with pytest.raises(KeyError, match="whatever"):
        behind.run_behind(lambda: {}["whatever"])


def test_a_process_that_is_ready_has_the_priority_that_it_was_started_with(model: Path) -> None:
    """Whatever was imported and loaded behind others: none of the threads that are left stands there."""

    async def work() -> None:
        process, info = await expert_process.spawn(**arguments(model), gentle=True)
        try:
            assert info["state"] == "ready", info["detail"]
            own = os.getpriority(os.PRIO_PROCESS, 0)
            ends_s = time.monotonic() + 120  # a thread that has done its work may still be on its way out
            while (found := expert_process.priorities(process)) != {(own, os.SCHED_OTHER), (own, os.SCHED_BATCH)}:
                assert time.monotonic() < ends_s, found
                await asyncio.sleep(0.02)
        finally:
            await expert_process.end(process)

    run(work())


def test_a_process_is_an_actor_whose_imports_stood_behind(model: Path) -> None:
    async def work() -> None:
        process = ExpertProcess(**arguments(model), gentle=True)
        address = await process.start()
        try:
            assert (await process.wait_settled())["state"] == "ready"
            assert (await process.info())["address"] == address
            ending = asyncio.create_task(process.ended())
            assert await process.drain(1) == 0
            assert not ending.done()
        finally:
            await process.stop()
        await ending
        methods = {name for name in vars(ExpertActor) if not name.startswith("_")}
        assert methods == {name for name in vars(ExpertProcess) if not name.startswith("_")}

    run(work())
