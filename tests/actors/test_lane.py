"""Both ends of the same-node lane, against each other and against peers that lie, break off, are frozen or killed."""

import asyncio
import ctypes
import json
import os
import platform
import resource
import secrets
import socket
import struct
import sys
import threading
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory, LaneTransport
from actors.dispatch.remote_experts import RemoteExperts
from actors.dispatch.transport import (
    ExpertReply,
    ExpertRequest,
    ExpertRows,
    ExpertTransport,
    PendingReply,
    TransportError,
    WireCounters,
)
from actors.expert.lane_server import HELLO_S, MAX_LANES, MAX_TICKETS, TICKET_S, LaneServer, Offer
from actors.expert.service import SERVICE
from actors.machine import machine_id, same_user
from actors.shared_rows import SharedRows
from cluster.ids import ReplicaId
from model.dispatch import DispatchPlan
from protos import expert_pb2 as pb
from protos.checksum import checksum
from protos.lane import MAX_FRAME_BYTES, TICKET_BYTES, Hello, LaneReply, LaneRequest, Segment, is_welcome, welcome
from tests.support import expert_process
from tests.support.checkpoints import write_mixtral
from tests.support.experts import (
    FAR_FUTURE_US,
    TOKEN,
    WIDTH,
    FakeColumn,
    Served,
    answer,
    channel_to,
    credentials,
    map_of,
    run,
    served,
)
from tests.support.memory_map import num_descriptors, num_regions

ROOT = Path(__file__).resolve().parent.parent.parent
ZEROS_CRC = [checksum(bytes(4 * WIDTH * rows)) for rows in range(3)]
"""Of rows in memory that nobody has written to."""


# ---- helpers ----------------------------------------------------------------------------------------------


@asynccontextmanager
async def memory(num_rows: int = 64, num_replies: int = 64, width: int = WIDTH) -> AsyncIterator[LaneMemory]:
    made = LaneMemory.create(num_rows, width, num_replies)
    try:
        yield made
    finally:
        made.close()


async def attach(there: Served, mine: LaneMemory, counters: WireCounters | None = None) -> ExpertTransport:
    transport = await Attacher(credentials(), mine, lane_only=True)(there.info(), counters or WireCounters(), 100)
    assert transport.lane == "shm"
    return transport


@asynccontextmanager
async def lane_to(there: Served, **sizes: int) -> AsyncIterator[tuple[ExpertTransport, LaneMemory, WireCounters]]:
    counters = WireCounters()
    async with memory(**sizes) as mine:
        transport = await attach(there, mine, counters)
        try:
            yield transport, mine, counters
        finally:
            await transport.close()


def sealed(content: bytes) -> bytes:
    """A frame whose checksum is right, whatever is in it."""
    return struct.pack("<I", checksum(content)) + content


def parts(*counts: int) -> tuple[ExpertRows, ...]:
    """Rows for expert 0, 1, ..., one behind another."""
    stops = [sum(counts[: number + 1]) for number in range(len(counts))]
    return tuple(ExpertRows(e, slice(stop - n, stop)) for e, (stop, n) in enumerate(zip(stops, counts, strict=True)))


def question(x_ND: torch.Tensor, *asked: ExpertRows, layer: int = 1, **fields: int) -> ExpertRequest:
    said = {"map_epoch": 1, "deadline_unix_us": FAR_FUTURE_US, **fields}
    return ExpertRequest(layer_id=layer, parts=asked or parts(len(x_ND)), x_ND=x_ND, **said)


def routed(mine: LaneMemory, count: int, start: float = 0.0) -> torch.Tensor:
    rows = mine.rows.take(count)
    assert rows is not None
    return rows.copy_(torch.arange(start, start + count * WIDTH).view(count, WIDTH))


def expected(request: ExpertRequest) -> torch.Tensor:
    return torch.cat([answer(part.expert_id, request.layer_id, request.x_ND[part.rows]) for part in request.parts])


async def outcome(transport: ExpertTransport, request: ExpertRequest) -> tuple[ExpertReply, torch.Tensor]:
    """A reply, and its rows as they were when it came: later their memory is used again."""
    kept: list[torch.Tensor] = []

    def keep(reply: PendingReply) -> None:
        came = reply.outcome()
        if isinstance(came, ExpertReply) and came.output is not None:
            kept.append(came.output.clone())

    pending = transport.forward(request)
    pending.when_done(keep)
    return await pending, kept[0] if kept else torch.empty(0)


async def fine(transport: ExpertTransport, request: ExpertRequest) -> None:
    reply, rows = await outcome(transport, request)
    assert reply.status == pb.STATUS_OK, reply
    assert torch.equal(rows, expected(request))


async def until(true: Callable[[], bool]) -> None:
    """For what the kernel or another process does and nothing tells of; bounded by the test's own time."""
    while True:
        if true():
            return
        await asyncio.sleep(0.005)


async def fails(work: Awaitable[object], said: str) -> None:
    """`work` raises TransportError."""
    with pytest.raises(TransportError, match=said):
        await work


def doorbell() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)


def offered(there: Served) -> Offer:
    offer = there.lanes.offer(machine_id())
    assert offer is not None
    return offer


async def heard(peer: socket.socket) -> bytes:
    return await asyncio.get_running_loop().sock_recv(peer, MAX_FRAME_BYTES)


def greet(there: Served, mine: LaneMemory, replies: SharedRows, **said: Any) -> socket.socket:
    """A raw peer that has said hello."""
    offer = offered(there)
    peer = doorbell()
    peer.connect(f"\0{offer.endpoint}")
    hello = Hello(offer.ticket, WIDTH, mine.rows.region.num_rows, replies.num_rows)._replace(**said)
    socket.send_fds(peer, [hello.pack()], [mine.rows.region.fd, replies.fd])
    return peer


# ---- rows -------------------------------------------------------------------------------------------------


def test_rows_go_out_and_come_back() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, lane_to(there) as (transport, mine, counters):
            asked = [question(routed(mine, count, start=count)) for count in (1, 5, 3)]
            await asyncio.gather(*(fine(transport, one) for one in asked))
            assert (counters.messages, counters.lane_messages) == (3, 3)
            assert counters.bytes_sent > 9 * WIDTH * 4
            assert counters.bytes_received > 9 * WIDTH * 4
            assert (counters.late_replies, counters.corrupt_replies) == (0, 0)
            assert (there.replica.counters.messages_total, there.replica.counters.tokens_total) == (3, 9)
            assert there.replica.inflight_tokens == 0
            assert there.compute.failures == 0

    run(work())


def test_one_message_serves_several_experts_wherever_their_rows_lie() -> None:
    async def work() -> None:
        columns = [FakeColumn(expert) for expert in range(3)]
        async with served(*columns, experts=[0, 1, 2]) as there, lane_to(there) as (transport, mine, _):
            x_ND = routed(mine, 12)
            await fine(transport, question(x_ND, *parts(3, 4, 5)))
            apart = (ExpertRows(2, slice(9, 12)), ExpertRows(0, slice(1, 3)), ExpertRows(1, slice(3, 4)))
            await fine(transport, question(x_ND, *apart, layer=0))
            await fine(transport, question(x_ND, ExpertRows(1, slice(11, 12))))

    run(work())


def test_answers_are_there_without_a_turn_of_the_event_loop() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, lane_to(there) as (transport, mine, _):
            reply = transport.forward(question(routed(mine, 2)))
            while not reply.done():
                assert mine.doorbells.wait(100)
            assert isinstance(reply.outcome(), ExpertReply)
            assert not mine.doorbells.wait(0)

    run(work())


def test_two_coordinators_get_their_own_answers() -> None:
    async def work() -> None:
        async with (
            served(FakeColumn(0), experts=[0]) as there,
            lane_to(there) as (one, first, _),
            lane_to(there, num_rows=20, num_replies=20) as (two, second, _),
        ):
            asked = [(one, question(routed(first, 4, start=at))) for at in range(0, 80, 10)]
            asked += [(two, question(routed(second, 2, start=-at))) for at in range(0, 80, 10)]
            await asyncio.gather(*(fine(transport, request) for transport, request in asked))
            assert there.replica.counters.tokens_total == 8 * 4 + 8 * 2

    run(work())


def test_rows_that_are_not_in_shared_memory_are_copied_there_while_there_is_room() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        async with served(column, experts=[0]) as there, lane_to(there, num_rows=8) as (transport, mine, counters):
            outside = torch.arange(48.0).view(12, WIDTH)
            await fine(transport, question(outside, ExpertRows(0, slice(0, 5))))
            column.gate.clear()
            column.entered.clear()
            blocked = transport.forward(question(outside, ExpertRows(0, slice(0, 5))))
            full, _ = await outcome(transport, question(outside, ExpertRows(0, slice(4, 8))))
            assert full == ExpertReply(pb.STATUS_OVERLOADED, "no room for 4 rows in shared memory")
            column.gate.set()
            assert (await blocked).status == pb.STATUS_OK
            await fine(transport, question(outside, ExpertRows(0, slice(1, 3)), ExpertRows(0, slice(6, 12))))
            with pytest.raises(ValueError, match=r"rows of shape \(2, 5\)"):
                transport.forward(question(torch.ones(2, WIDTH + 1)))
            assert len(routed(mine, 8)) == 8  # everything was given back
            assert counters.messages == 3

    run(work())


def test_a_replica_without_room_for_answers_is_overloaded_until_it_has() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with served(column, experts=[0]) as there, lane_to(there, num_replies=4) as (transport, mine, _):
            x_ND = routed(mine, 5)
            first = transport.forward(question(x_ND[:3]))
            full = await transport.forward(question(x_ND[3:]))
            assert full == ExpertReply(pb.STATUS_OVERLOADED, "no room for 2 rows in shared memory")
            too_many = await transport.forward(question(x_ND))
            assert too_many.status == pb.STATUS_OVERLOADED
            column.gate.set()
            assert (await first).status == pb.STATUS_OK
            await fine(transport, question(x_ND[3:]))
            many = question(x_ND, *[ExpertRows(0, slice(0, 1))] * 65)
            assert (await transport.forward(many)).status == pb.STATUS_OVERLOADED
            await fine(transport, question(x_ND[1:]))

    run(work())


def test_a_late_answer_is_discarded_and_only_then_its_place_is_free() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with served(column, experts=[0]) as there, lane_to(there, num_replies=4) as (transport, mine, counters):
            x_ND = routed(mine, 4)
            abandoned = transport.forward(question(x_ND))
            abandoned.cancel()
            assert (await transport.forward(question(x_ND))).status == pb.STATUS_OVERLOADED
            assert counters.late_replies == 0
            column.gate.set()
            await until(lambda: counters.late_replies == 1)
            assert abandoned.cancelled()
            await fine(transport, question(x_ND))

    run(work())


# ---- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "status", "said"),
    [
        ({"layer": 2}, pb.STATUS_NOT_HELD, "expert 0 in layer 2"),
        ({"map_epoch": 0}, pb.STATUS_STALE_EPOCH, "map_epoch 0 is older than 1"),
        ({"deadline_unix_us": 1}, pb.STATUS_DEADLINE_EXCEEDED, "expired"),
        ({"deadline_unix_us": 0}, pb.STATUS_INVALID, "must not be 0"),
    ],
)
def test_a_refusal_says_why_and_the_lane_goes_on(change: dict[str, int], status: pb.Status, said: str) -> None:
    async def work() -> None:
        column = FakeColumn(0)
        async with (
            served(column, experts=[0], min_map_epoch=1) as there,
            lane_to(there, num_replies=2) as (transport, mine, _),
        ):
            x_ND = routed(mine, 2)
            reply = await transport.forward(question(x_ND, **change))
            assert (reply.status, reply.output) == (status, None)
            assert said in reply.detail
            assert (column.calls, there.replica.counters.refused_total) == ([], 1)
            await fine(transport, question(x_ND))

    run(work())


def test_experts_not_held_too_many_rows_a_full_queue_and_draining_are_refused() -> None:
    async def work() -> None:
        async with (
            served(FakeColumn(0), experts=[0], max_queue_tokens=6) as there,
            lane_to(there) as (transport, mine, _),
        ):
            x_ND = routed(mine, 7)
            reply = await transport.forward(question(x_ND, ExpertRows(0, slice(0, 1)), ExpertRows(9, slice(1, 2))))
            assert reply == ExpertReply(pb.STATUS_NOT_HELD, "this replica does not hold expert 9 in layer 1")
            reply = await transport.forward(question(x_ND))
            assert reply == ExpertReply(pb.STATUS_INVALID, "7 rows, expected 1 to 6")
            assert there.replica.take(5, 6) is None  # rows that came by another lane
            reply = await transport.forward(question(x_ND[:2]))
            assert reply == ExpertReply(pb.STATUS_OVERLOADED, "2 rows, room for 1")
            there.replica.give_back(5, tokens=0, queue_us=0, compute_us=0, errors=0)
            await fine(transport, question(x_ND[:6]))
            assert await there.service.drain(1) == 0
            reply = await transport.forward(question(x_ND[:2]))
            assert (reply.status, reply.output) == (pb.STATUS_DRAINING, None)
            assert there.replica.counters.refused_total == 4
            assert there.replica.inflight_tokens == 0

    run(work())


def test_a_deadline_that_passes_in_the_queue_is_not_computed() -> None:
    async def work() -> None:
        now_us = [10]
        column = FakeColumn(0)
        column.gate.clear()
        async with (
            served(column, experts=[0], wall_us=lambda: now_us[0]) as there,
            lane_to(there) as (one, first, _),
            lane_to(there) as (two, second, _),
        ):
            running = one.forward(question(routed(first, 1)))
            assert await asyncio.to_thread(column.entered.wait, 100)
            # Both are read before either runs, and the first to run lets the other's deadline pass.
            early = one.forward(question(routed(first, 2), deadline_unix_us=20))
            late = two.forward(question(routed(second, 3), deadline_unix_us=30))
            real, column.forward = column.forward, lambda layer, x_MD: _then(real(layer, x_MD), now_us)  # type: ignore[method-assign]
            column.gate.set()
            assert (await running).status == pb.STATUS_OK
            assert (await early).status == pb.STATUS_OK
            assert (await late).status == pb.STATUS_DEADLINE_EXCEEDED
            assert there.replica.inflight_tokens == 0

    run(work())


def _then(rows: torch.Tensor, now_us: list[int]) -> torch.Tensor:
    now_us[0] = 40
    return rows


def test_rows_that_a_kernel_chokes_on_are_an_error_and_nothing_else() -> None:
    async def work() -> None:
        column = FakeColumn(0, error=ArithmeticError("no"))
        async with served(column, experts=[0]) as there, lane_to(there, num_replies=2) as (transport, mine, _):
            x_ND = routed(mine, 2)
            reply = await transport.forward(question(x_ND))
            assert reply == ExpertReply(pb.STATUS_INTERNAL, "ArithmeticError: no")
            assert (there.replica.counters.errors_total, there.replica.inflight_tokens) == (1, 0)
            column.error = None
            await fine(transport, question(x_ND))

    run(work())


# ---- tickets, hellos and frames of peers that lie -----------------------------------------------------------


async def ask_for_a_lane(channel: grpc.aio.Channel, **said: Any) -> pb.AttachReply:
    ask: Any = channel.unary_unary(f"/{SERVICE}/Attach", pb.AttachRequest.SerializeToString, pb.AttachReply.FromString)
    request = pb.AttachRequest(**{"machine_id": machine_id(), "lanes": ["shm", "grpc"], **said})
    reply: pb.AttachReply = await ask(request)
    return reply


def test_a_peer_elsewhere_is_offered_grpc() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            for machine in ("", "elsewhere", machine_id() + "x"):
                assert await ask_for_a_lane(channel, machine_id=machine) == pb.AttachReply(lane="grpc")
            assert (await ask_for_a_lane(channel, lanes=["grpc"])).lane == "grpc"
            here = await ask_for_a_lane(channel)
            assert (here.lane, len(here.ticket)) == ("shm", TICKET_BYTES)
            assert here.endpoint

    run(work())


def test_a_ticket_is_good_once_and_not_for_long() -> None:
    async def work() -> None:
        now_s = [100.0]

        def make(*given: Any) -> LaneServer:
            return LaneServer(*given, clock=lambda: now_s[0])

        async with served(FakeColumn(0), experts=[0], make_lanes=make) as there, memory() as mine:
            offer = offered(there)

            async def connect(ticket: bytes) -> LaneTransport:
                return await mine.connect("r", offer.endpoint, ticket, WireCounters(), 100)

            for wrong in (b"x" * TICKET_BYTES, bytes(TICKET_BYTES)):
                with pytest.raises(TransportError, match="lane to r: the replica closed the lane"):
                    await connect(wrong)
            await (await connect(offer.ticket)).close()
            with pytest.raises(TransportError, match="closed the lane"):
                await connect(offer.ticket)
            late = offered(there).ticket
            now_s[0] += TICKET_S + 1
            with pytest.raises(TransportError, match="closed the lane"):
                await connect(late)
            tickets = {offered(there).ticket for _ in range(MAX_TICKETS)}
            assert len(tickets) == MAX_TICKETS
            assert there.lanes.offer(machine_id()) is None
            now_s[0] += TICKET_S + 1
            await (await connect(offered(there).ticket)).close()

    run(work())


def test_places_are_bounded_and_a_peer_that_says_nothing_loses_its_own() -> None:
    async def work() -> None:
        now_s = [100.0]

        def make(*given: Any) -> LaneServer:
            return LaneServer(*given, clock=lambda: now_s[0])

        async with (
            served(FakeColumn(0), experts=[0], make_lanes=make) as there,
            memory() as mine,
            AsyncExitStack() as stack,
        ):
            transport = await attach(there, mine)
            stack.push_async_callback(transport.close)
            silent = [stack.enter_context(closing(doorbell())) for _ in range(MAX_LANES - 1)]
            endpoint = offered(there).endpoint
            for peer in silent:
                peer.connect(f"\0{endpoint}")
            await all_let_in(there)
            now_s[0] += HELLO_S / 2
            await fails(attach_once(there, mine), "lane to r: ")  # closed before or after it has said hello
            now_s[0] += HELLO_S
            await (await attach_once(there, mine)).close()
            for peer in silent:
                assert await heard(peer) == b""
            await fine(transport, question(routed(mine, 3)))  # who has said hello stays

    run(work())


async def all_let_in(there: Served) -> None:
    """Returns once the listener was looked at `MAX_LANES` times: it is before every job, but perhaps the first."""
    for _ in range(MAX_LANES + 1):
        assert await there.compute.call(lambda: True)


async def attach_once(there: Served, mine: LaneMemory) -> LaneTransport:
    offer = offered(there)
    return await mine.connect("r", offer.endpoint, offer.ticket, WireCounters(), 100)


def bad_hellos() -> list[tuple[str, Callable[[socket.socket, Hello, Sequence[int]], object]]]:
    def unsealed() -> int:
        fd = os.memfd_create("octavo-rows")
        os.ftruncate(fd, 64 * WIDTH * 4)
        return fd

    def with_unsealed(peer: socket.socket, hello: Hello, fds: Sequence[int]) -> None:
        fd = unsealed()
        socket.send_fds(peer, [hello.pack()], [fds[0], fd])
        os.close(fd)

    def said(**change: Any) -> Callable[[socket.socket, Hello, Sequence[int]], object]:
        return lambda peer, hello, fds: socket.send_fds(peer, [hello._replace(**change).pack()], list(fds))

    return [
        ("nothing", lambda peer, _hello, _fds: peer.shutdown(socket.SHUT_WR)),
        ("an empty frame", lambda peer, _hello, _fds: peer.send(b"")),
        ("noise", lambda peer, _hello, fds: socket.send_fds(peer, [b"x" * 99], list(fds))),
        ("no regions", lambda peer, hello, _fds: peer.send(hello.pack())),
        ("one region", lambda peer, hello, fds: socket.send_fds(peer, [hello.pack()], list(fds[:1]))),
        ("many regions", lambda peer, hello, fds: socket.send_fds(peer, [hello.pack()[:-1]], list(fds) * 20)),
        ("another width", said(width=WIDTH + 1)),
        ("too many rows", said(num_rows=65)),
        ("too many answers", said(num_replies=2**63)),
        ("a region that could shrink", with_unsealed),
        ("a device", lambda peer, hello, fds: socket.send_fds(peer, [hello.pack()], [fds[0], 0])),
    ]


@pytest.mark.parametrize(("name", "say"), bad_hellos(), ids=lambda value: value if isinstance(value, str) else "")
def test_a_bad_hello_ends_that_lane_and_leaves_nothing(
    name: str, say: Callable[[socket.socket, Hello, Sequence[int]], object]
) -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, lane_to(there) as (transport, mine, _):
            replies = SharedRows.create(64, WIDTH)
            descriptors, regions = num_descriptors(), num_regions()
            with closing(doorbell()) as peer:
                offer = offered(there)
                peer.connect(f"\0{offer.endpoint}")
                say(peer, Hello(offer.ticket, WIDTH, 64, 64), [mine.rows.region.fd, replies.fd])
                assert await heard(peer) == b""
            await until(lambda: (num_descriptors(), num_regions()) == (descriptors, regions))
            replies.close()
            await fine(transport, question(routed(mine, 2)))
            assert there.compute.failures == 0

    run(work())


def test_a_frame_that_cannot_be_read_ends_its_lane_and_no_other() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, lane_to(there) as (transport, mine, _):
            replies = SharedRows.create(8, WIDTH)
            good = LaneRequest(1, 1, 1, FAR_FUTURE_US, 0, (Segment(0, 0, 2),))
            for frame in (b"x", b"", bytes(39), good._replace(sequence=0).pack(), bytes(MAX_FRAME_BYTES * 2)):
                with closing(greet(there, mine, replies)) as peer:
                    assert is_welcome(await heard(peer))
                    peer.send(frame)
                    assert await heard(peer) == b""
                await fine(transport, question(routed(mine, 2)))
            replies.close()
            assert there.compute.failures == 0
            assert there.replica.inflight_tokens == 0

    run(work())


def test_a_frame_that_points_outside_is_answered_and_its_lane_goes_on() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        async with served(column, experts=[0]) as there, memory() as mine:
            replies = SharedRows.create(8, WIDTH)
            with closing(greet(there, mine, replies)) as peer:
                assert is_welcome(await heard(peer))
                good = LaneRequest(1, 1, 1, FAR_FUTURE_US, 0, (Segment(0, 0, 2),), ZEROS_CRC[2])
                for sequence, change in enumerate(
                    ({"reply_row": 7}, {"segments": (Segment(0, 63, 2),)}, {"segments": (Segment(0, 2**63, 1),)}), 5
                ):
                    peer.send(good._replace(sequence=sequence, **change).pack())  # type: ignore[arg-type]
                    reply = LaneReply.unpack(await heard(peer))
                    assert (reply.sequence, reply.status) == (sequence, pb.STATUS_INVALID)
                peer.send(sealed(good._replace(sequence=8).pack()[4:] + b"x"))
                assert LaneReply.unpack(await heard(peer)).status == pb.STATUS_CORRUPT
                assert (column.calls, there.replica.counters.refused_total) == ([], 4)
                peer.send(good._replace(sequence=9, reply_row=6).pack())
                assert LaneReply.unpack(await heard(peer)).status == pb.STATUS_OK
                assert torch.equal(replies.tensor[6:], answer(0, 1, torch.zeros(2, WIDTH)))
                assert not replies.tensor[:6].any()
            replies.close()

    run(work())


def test_what_a_coordinator_that_left_had_queued_is_dropped() -> None:
    async def work() -> None:
        column, other = FakeColumn(0), FakeColumn(1)
        column.gate.clear()
        async with (
            served(column, other, experts=[0, 1]) as there,
            lane_to(there) as (transport, mine, _),
            memory() as gone,
        ):
            leaving = await attach(there, gone)
            blocked = transport.forward(question(routed(mine, 1)))
            assert await asyncio.to_thread(column.entered.wait, 100)
            lost = leaving.forward(question(routed(gone, 3), *parts(3), layer=0))
            await leaving.close()
            with pytest.raises(TransportError, match="closed here"):
                await lost
            with pytest.raises(TransportError, match="closed here"):
                await leaving.forward(question(routed(gone, 3)))
            column.gate.set()
            assert (await blocked).status == pb.STATUS_OK
            await fine(transport, question(routed(mine, 2)))
            await until(lambda: there.replica.inflight_tokens == 0)
            assert there.compute.failures == 0

    run(work())


def test_a_listener_without_descriptors_neither_spins_nor_gives_up(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, memory() as mine:
            offer = offered(there)
            peers = [doorbell() for _ in range(20)]
            soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
            try:
                for peer in peers:  # what others close meanwhile is a place for one of them
                    peer.connect(f"\0{offer.endpoint}")
                    for _ in range(3):
                        await there.compute.call(lambda: None)
                    if "no more lanes for now" in caplog.text:
                        break
                before = caplog.text.count("no more lanes")
                for _ in range(20):
                    await there.compute.call(lambda: None)  # each looks at every doorbell first
                assert caplog.text.count("no more lanes") == before == 1
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            await (await attach_once(there, mine)).close()  # after the one that waited
            for peer in peers:
                peer.close()

    run(work())


# ---- replicas that lie --------------------------------------------------------------------------------------


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[str, socket.socket]]:
    """An endpoint where something listens that is no replica."""
    endpoint = f"octavo-test-{secrets.token_hex(8)}"
    with closing(doorbell()) as listener:
        listener.bind(f"\0{endpoint}")
        listener.listen(4)
        yield endpoint, listener


@asynccontextmanager
async def lane_to_a_liar(
    mine: LaneMemory, counters: WireCounters, say: bytes = b""
) -> AsyncIterator[tuple[LaneTransport, socket.socket]]:
    loop = asyncio.get_running_loop()
    async with listening() as (endpoint, listener):
        connecting = asyncio.create_task(mine.connect("liar", endpoint, b"t" * TICKET_BYTES, counters, 100))
        peer, _ = await loop.sock_accept(listener)
        with closing(peer):
            peer.send(say or welcome())
            transport = await connecting
            yield transport, peer
            await transport.close()


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (b"x", "speaks another language: a frame of 1 bytes is damaged"),
        (LaneReply(3, pb.STATUS_OK).pack(), "speaks another language: an answer to message 3, which was not sent"),
        (sealed(b"\1" + bytes(7) + b"\xff" * 20), "speaks another language: status 4294967295 is unknown"),
        (b"", "the replica's process is gone"),
    ],
)
def test_a_reply_that_is_none_ends_the_lane_and_what_waits_on_it(frame: bytes, reason: str) -> None:
    async def work() -> None:
        counters = WireCounters()
        async with memory() as mine, lane_to_a_liar(mine, counters) as (transport, peer):
            waiting = transport.forward(question(routed(mine, 2)))
            copied = transport.forward(question(torch.ones(62, WIDTH)))
            Hello.unpack(await heard(peer))
            for sequence in (1, 2):
                assert LaneRequest.unpack(await heard(peer), num_rows=64, num_replies=64).sequence == sequence
            peer.send(frame)
            for reply in (waiting, copied):
                with pytest.raises(TransportError, match=reason):
                    await reply
            assert transport.closed.is_set()
            assert reason in transport.reason
            assert counters.corrupt_replies == (0 if not frame else 1)
            assert len(routed(mine, 62)) == 62

    run(work())


def test_a_second_answer_ends_the_lane() -> None:
    async def work() -> None:
        counters = WireCounters()
        async with memory() as mine, lane_to_a_liar(mine, counters) as (transport, peer):
            reply = transport.forward(question(routed(mine, 2)))
            peer.send(LaneReply(1, pb.STATUS_OK, rows_crc=ZEROS_CRC[2]).pack())
            peer.send(LaneReply(1, pb.STATUS_OK).pack())
            assert (await reply).status == pb.STATUS_OK
            await transport.closed.wait()
            assert "message 1, which was not sent" in transport.reason

    run(work())


def test_a_replica_that_reads_no_frames_is_overloaded_and_not_lost() -> None:
    async def work() -> None:
        counters = WireCounters()
        async with memory(num_replies=100_000) as mine, lane_to_a_liar(mine, counters) as (transport, peer):
            x_ND = routed(mine, 1)
            replies: list[PendingReply] = []
            while not (replies and replies[-1].done()):
                replies.append(transport.forward(question(x_ND)))
            assert replies[-1].outcome() == ExpertReply(pb.STATUS_OVERLOADED, "the replica reads no frames")
            assert len(replies) > 32
            assert not transport.closed.is_set()
            Hello.unpack(await heard(peer))
            for _ in replies[:-1]:
                await heard(peer)
            again = transport.forward(question(x_ND))
            request = LaneRequest.unpack(await heard(peer), num_rows=64, num_replies=100_000)
            assert request.reply_row == len(replies) - 1  # the place of the one that was not sent
            peer.send(LaneReply(request.sequence, pb.STATUS_OK, rows_crc=ZEROS_CRC[1]).pack())
            assert (await again).status == pb.STATUS_OK

    run(work())


def test_a_lane_that_cannot_be_opened_leaves_nothing() -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with memory() as mine, listening() as (endpoint, listener):
            descriptors, regions = num_descriptors(), num_regions()

            def connect(where: str, timeout_s: float) -> asyncio.Task[LaneTransport]:
                return loop.create_task(mine.connect("r", where, b"t" * TICKET_BYTES, WireCounters(), timeout_s))

            await fails(connect(endpoint, 0.01), "lane to r: no welcome in time")
            for nowhere in ("octavo-nowhere", "x" * 200):
                await fails(connect(nowhere, 100), "lane to r: ")
            (await loop.sock_accept(listener))[0].close()
            cancelled = connect(endpoint, 100)
            peer, _ = await loop.sock_accept(listener)
            cancelled.cancel()
            await asyncio.wait({cancelled})
            assert cancelled.cancelled()
            Hello.unpack(await heard(peer))  # it had got that far
            assert await heard(peer) == b""
            peer.close()
            wrong = connect(endpoint, 100)
            peer, _ = await loop.sock_accept(listener)
            peer.send(LaneReply(1, pb.STATUS_OK).pack())
            await fails(wrong, "not a welcome")
            peer.close()
            del cancelled, wrong
            await until(lambda: (num_descriptors(), num_regions()) == (descriptors, regions))

    run(work())


def test_the_end_of_the_watch_is_the_end_of_the_lane() -> None:
    async def work() -> None:
        closes: list[str] = []

        async def frozen() -> str:
            return "it does not answer pings"

        async def broken() -> str:
            raise ArithmeticError("no")

        for watch, reason in ((frozen, "it does not answer pings"), (broken, "nobody watches the replica any more")):

            async def close() -> None:
                closes.append("channel")

            async with memory() as mine, lane_to_a_liar(mine, WireCounters()) as (transport, _):
                reply = transport.forward(question(routed(mine, 1)))
                transport.guard(watch, close)
                with pytest.raises(TransportError, match=reason):
                    await reply
                assert transport.closed.is_set()
            async with memory() as mine, lane_to_a_liar(mine, WireCounters()) as (transport, _):
                transport.guard(watch, close)
                await transport.close()  # before the watch has begun
                await transport.close()
                assert transport.reason == "closed here"
        assert len(closes) == 4

    run(work())


# ---- another user ------------------------------------------------------------------------------------------

NOBODY = 65534
SETRESUID = 117  # of x86-64
can_be_another = pytest.mark.skipif(
    os.geteuid() != 0 or platform.machine() != "x86_64", reason="only root may act as another user"
)


def as_nobody(act: Callable[[], None]) -> None:
    """In a thread that is another user's: the system call, unlike the C library, changes the calling thread alone."""
    failed: list[BaseException] = []

    def body() -> None:
        try:
            assert ctypes.CDLL(None).syscall(SETRESUID, -1, NOBODY, -1) == 0
            act()
        except BaseException as error:  # noqa: BLE001 - it is handed to the thread that waits, whatever it is
            failed.append(error)

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert not failed, failed


@can_be_another
def test_another_users_process_is_not_let_in() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, memory() as mine, listening() as (endpoint, listener):
            offer = offered(there)
            with closing(doorbell()) as peer:
                as_nobody(lambda: peer.connect(f"\0{offer.endpoint}"))
                assert await heard(peer) == b""
            as_nobody(lambda: listener.listen(1))
            with pytest.raises(TransportError, match="the doorbell is another user's"):
                await mine.connect("r", endpoint, offer.ticket, WireCounters(), 100)
            await (await mine.connect("r", offer.endpoint, offer.ticket, WireCounters(), 100)).close()

    run(work())


def test_this_users_process_is_let_in() -> None:
    one, two = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with closing(one), closing(two):
        assert same_user(one)
        assert same_user(two)


# ---- falling back, and coming back ---------------------------------------------------------------------------


class _Elsewhere(LaneServer):
    """Offers a lane where nobody listens."""

    def offer(self, peer_machine: str) -> Offer | None:
        return Offer("octavo-nowhere", b"t" * TICKET_BYTES)


def plan_of(counts: Sequence[int], seed: int = 0) -> DispatchPlan:
    x_ND = torch.randn(sum(counts), WIDTH, generator=torch.Generator().manual_seed(seed))
    return DispatchPlan(x_ND, torch.arange(sum(counts)), tuple(counts), torch.empty(0, 1), torch.empty(0, 1))


def test_a_lane_that_is_offered_and_cannot_be_opened_is_grpc_unless_it_is_forced() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0], make_lanes=_Elsewhere) as there, memory() as mine:
            descriptors, regions = num_descriptors(), num_regions()
            forced = Attacher(credentials(), mine, lane_only=True)
            await fails(forced(there.info(), WireCounters(), 100), "lane to replica: .*refused")
            await until(lambda: (num_descriptors(), num_regions()) == (descriptors, regions))
            transport = await Attacher(credentials(), mine)(there.info(), WireCounters(), 100)
            assert transport.lane == "grpc"
            await fine(transport, question(torch.ones(2, WIDTH)))
            await transport.close()
            await until(lambda: (num_descriptors(), num_regions()) == (descriptors, regions))

    run(work())


def test_without_a_lane_on_offer_a_forced_one_is_an_error() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, memory() as mine:
            await there.compute.call(there.lanes.close)
            with pytest.raises(TransportError, match="no same-node lane with this replica, and transport is shm"):
                await Attacher(credentials(), mine, lane_only=True)(there.info(), WireCounters(), 100)

    run(work())


def test_a_lane_that_is_lost_is_replaced_by_what_the_replica_offers_then() -> None:
    async def work() -> None:
        plan, name = plan_of([3]), ReplicaId("replica")
        expected_rows = answer(0, 1, plan.x_ND)
        mine = LaneMemory.create(64, WIDTH, 64)
        experts = RemoteExperts(Attacher(credentials(), mine), lanes=mine)
        try:
            async with AsyncExitStack() as stack:
                there = await stack.enter_async_context(served(FakeColumn(0), experts=[0]))
                experts.apply_map(map_of(there.info(), experts=1))
                await experts.wait_ready(100)
                assert experts.lanes() == {name: "shm"}
                await there.compute.call(there.lanes.close)  # the lanes end, the replica does not
                assert torch.equal(await experts.run(1, plan), expected_rows)
                assert experts.lanes() == {name: "grpc"}
                port = there.server.port
            async with served(FakeColumn(0), experts=[0], port=port):
                assert torch.equal(await experts.run(1, plan), expected_rows)
                assert experts.lanes() == {name: "shm"}
            wire = experts.stats.wire
            assert wire.lane_messages >= 1
            assert wire.messages >= 2
            assert mine.rows.take(64) is not None
        finally:
            await experts.close()

    run(work())


def test_many_rounds_in_little_shared_memory_are_all_exact() -> None:
    """Rows and answers lie wherever there is room, are copied in, are refused and sent again: never mixed up."""

    async def work() -> None:
        mine = LaneMemory.create(24, WIDTH, 10)
        experts = RemoteExperts(Attacher(credentials(), mine, lane_only=True), lanes=mine)
        async with (
            served(FakeColumn(0), FakeColumn(1), experts=[0, 1], replica_id="a") as one,
            served(FakeColumn(2), experts=[2], replica_id="b") as two,
        ):
            experts.apply_map(map_of(one.info(), two.info(), experts=3))
            await experts.wait_ready(100, all_replicas=True)
            plans = [plan_of([1 + seed % 4, seed % 3, seed % 5], seed) for seed in range(40)]
            rounds = [experts.start(seed % 2, plan) for seed, plan in enumerate(plans)]  # all at once
            answers = await asyncio.gather(*(one.result() for one in rounds))
            for seed, (plan, rows) in enumerate(zip(plans, answers, strict=True)):
                pieces = [answer(expert, seed % 2, plan.x_ND[plan.rows(expert)]) for expert in range(3)]
                assert torch.equal(rows, torch.cat(pieces))
            assert experts.stats.retry_reasons["OVERLOADED"] > 0
            wire = experts.stats.wire
            assert (wire.lane_messages, wire.corrupt_replies) == (wire.messages, 0)
            assert mine.rows.take(24) is not None
            await experts.close()

    run(work())


# ---- real processes ------------------------------------------------------------------------------------------

HIDDEN = 32


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("mixtral")
    write_mixtral(path, hidden=HIDDEN, ffn=48, layers=2, experts=2, dtype=torch.float16)
    return {
        "replica_id": "r",
        "expert_ids": [0],
        "first_layer": 0,
        "num_layers": 2,
        "model": str(path),
        "kernel": "fp32",
        "device": "cpu",
        "auth_token": TOKEN,
    }


def test_a_killed_expert_is_noticed_at_once_and_leaves_nothing_here(arguments: dict[str, Any]) -> None:
    async def work() -> None:
        async with memory(width=HIDDEN) as mine:
            descriptors, regions = num_descriptors(), num_regions()
            await killed_expert(arguments, mine)
            await until(lambda: (num_descriptors(), num_regions()) == (descriptors, regions))

    run(work())


async def killed_expert(arguments: dict[str, Any], mine: LaneMemory) -> None:
    process, facts = await expert_process.spawn(**arguments)
    try:
        async with channel_to(facts["address"]) as channel:
            offer = await ask_for_a_lane(channel)
        # Without the health watch: the doorbell alone must tell.
        transport = await mine.connect("r", offer.endpoint, offer.ticket, WireCounters(), 100)
        x_ND = torch.ones(4, HIDDEN)
        assert (await transport.forward(question(x_ND))).status == pb.STATUS_OK
        process.kill()
        await transport.closed.wait()
        assert transport.reason == "the replica's process is gone"
        with pytest.raises(TransportError, match="process is gone"):
            await transport.forward(question(x_ND))
        await transport.close()
    finally:
        await expert_process.end(process)


def test_a_killed_coordinator_leaves_nothing_at_the_expert(arguments: dict[str, Any]) -> None:
    async def work() -> None:
        process, facts = await expert_process.spawn(**arguments)
        pid = process.pid
        about = json.dumps(
            {name: facts[name] for name in ("replica_id", "address", "numerics_domain")} | {"width": HIDDEN}
        )
        try:
            descriptors = num_descriptors(pid)
            command = (sys.executable, "-m", "tests.support.lane_coordinator", about)
            coordinator = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=PIPE, stdout=PIPE)
            assert coordinator.stdout is not None
            assert await coordinator.stdout.readline() == b"shm\n"
            assert num_regions(pid) == 2
            assert num_descriptors(pid) > descriptors
            await expert_process.end(coordinator)  # kills it
            await until(lambda: num_descriptors(pid) <= descriptors and num_regions(pid) == 0)
            async with channel_to(facts["address"]) as channel:
                ask: Any = channel.unary_unary(
                    f"/{SERVICE}/Info", pb.InfoRequest.SerializeToString, pb.InfoReply.FromString
                )
                while (await ask(pb.InfoRequest())).inflight_tokens:
                    pass
        finally:
            await expert_process.end(process)

    run(work())
