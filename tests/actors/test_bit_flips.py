"""A flipped bit in what is said is found, whichever lane it took: in headers and rows, of requests and of replies.

Every flip is one bit at a place drawn from a seed. What comes of it is an error, silence, or the right rows where the
bit means nothing; never other rows.
"""

import asyncio
import ctypes
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing

import pytest
import torch

from actors.dispatch.grpc_transport import _Stream
from actors.dispatch.lane_transport import LaneMemory, LaneTransport
from actors.dispatch.transport import ExpertReply, ExpertRequest, ExpertRows, PendingReply, TransportError, WireCounters
from actors.shared_rows import SharedRows
from protos import expert_pb2 as pb
from protos.codec import encode_reply, encode_request, reply_seed, restore, split_reply, split_request
from protos.frames import Frame
from protos.lane import MAX_FRAME_BYTES, TICKET_BYTES, Hello, LaneReply, LaneRequest, Segment, is_welcome, welcome
from tests.support.experts import FAR_FUTURE_US, WIDTH, FakeColumn, Served, answer, channel_to, run, served

FLIPS = 2_500
"""Of each of four kinds: requests and replies, by gRPC and by the same-node lane."""

METHOD = "/octavo.ExpertService/Forward"
ROWS = 6
COUNTS = (4, 2)


def flipped(data: bytes, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def some_rows() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3))


def right(x_MD: torch.Tensor) -> torch.Tensor:
    return torch.cat([answer(0, 1, x_MD[:4]), answer(1, 1, x_MD[4:])])


# ---- gRPC -------------------------------------------------------------------------------------------------


def asked(*, merged: bool = False) -> pb.ForwardRequest:
    header = pb.ForwardRequest(
        sequence=5, layer_id=1, expert_ids=[0, 1], expert_rows=COUNTS, map_epoch=3, deadline_unix_us=FAR_FUTURE_US
    )
    if merged:
        header.merge.entries = torch.arange(ROWS, dtype=torch.int32).numpy().tobytes()
        header.merge.weights = torch.ones(ROWS).numpy().tobytes()
    return header


@pytest.mark.parametrize("merged", [False, True])
def test_requests_by_grpc(merged: bool) -> None:
    """The replica answers with an error, or with the right rows where the bit means nothing; and goes on."""

    async def work() -> None:
        draw = random.Random(1 + merged)
        x_MD, header = some_rows(), asked(merged=merged)
        data = encode_request(header, x_MD)
        errors = 0
        async with (
            served(FakeColumn(0), FakeColumn(1), experts=[0, 1]) as there,
            channel_to(there.server.address) as channel,
        ):
            call = channel.stream_stream(METHOD)()
            for _ in range(FLIPS // 2):
                await call.write(flipped(data, draw.randrange(8 * len(data))))
                reply, frame = split_reply(await call.read())
                if reply.status == pb.STATUS_OK:
                    assert frame is not None
                    assert torch.equal(restored(frame, header), right(x_MD))
                else:
                    assert frame is None
                    errors += 1
            assert there.compute.failures == 0
            assert there.replica.inflight_tokens == 0
            call.cancel()
        assert errors > 0.98 * FLIPS / 2  # the others fell on bytes without a meaning

    run(work())


def restored(frame: Frame[pb.ForwardReply], request: pb.ForwardRequest) -> torch.Tensor:
    seed = reply_seed(request)
    return restore(frame.claim, frame.payload, max_rows=ROWS, width=WIDTH, dtypes=(torch.float32,), seed=seed)


class Call:
    """A stream whose other end is the test."""

    def __init__(self) -> None:
        self.sent: asyncio.Queue[bytes] = asyncio.Queue()
        self.replies: asyncio.Queue[bytes] = asyncio.Queue()

    async def write(self, data: bytes) -> None:
        self.sent.put_nowait(data)

    async def read(self) -> bytes:
        return await self.replies.get()


def test_replies_by_grpc() -> None:
    """One of two that wait gets a damaged answer: both end in an error, or with their own rows; none is left."""

    async def work() -> None:
        draw = random.Random(3)
        x_ND, call, counters = some_rows(), Call(), WireCounters()
        stream = _Stream("replica", call, counters, lambda _reason: None)  # type: ignore[arg-type]
        errors = 0
        for _ in range(FLIPS):
            waiting = []
            for _ in range(2):
                reply = PendingReply()
                stream.send(question(x_ND), x_ND, reply)
                waiting.append(reply)
            first, second = [split_request(await call.sent.get()).header for _ in range(2)]
            good = [
                encode_reply(pb.ForwardReply(sequence=one.sequence, status=pb.STATUS_OK), right(x_ND), one)
                for one in (first, second)
            ]
            call.replies.put_nowait(flipped(good[0], draw.randrange(8 * len(good[0]))))
            call.replies.put_nowait(good[1])
            outcomes = [await reply for reply in waiting]
            for outcome in outcomes:
                if outcome.status == pb.STATUS_OK:
                    assert outcome.output is not None
                    assert torch.equal(outcome.output, right(x_ND))
                else:
                    assert outcome.output is None
                    assert outcome.status == pb.STATUS_CORRUPT
            errors += outcomes[0].status == pb.STATUS_CORRUPT
        assert errors > 0.95 * FLIPS  # the others fell on the times it took, or on bytes without a meaning
        stream.end("enough")
        await stream.join()

    run(work())


def question(x_ND: torch.Tensor) -> ExpertRequest:
    parts = (ExpertRows(0, slice(0, 4)), ExpertRows(1, slice(4, 6)))
    return ExpertRequest(1, 3, FAR_FUTURE_US, parts, x_ND)


# ---- the same-node lane -----------------------------------------------------------------------------------


def greet(there: Served, rows: SharedRows, replies: SharedRows) -> socket.socket:
    offer = there.lanes.offer(there.replica.describe().machine_id)
    assert offer is not None
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.connect(f"\0{offer.endpoint}")
    hello = Hello(offer.ticket, WIDTH, rows.num_rows, replies.num_rows)
    socket.send_fds(peer, [hello.pack()], [rows.fd, replies.fd])
    peer.setblocking(False)
    return peer


def flip_row_bit(rows_MD: torch.Tensor, bit: int) -> None:
    (ctypes.c_uint8 * rows_MD.nbytes).from_address(rows_MD.data_ptr())[bit // 8] ^= 1 << bit % 8


def test_requests_by_the_lane() -> None:
    """A damaged frame ends the lane; damaged rows are refused as corrupt, and the lane goes on."""

    async def work() -> None:
        loop, draw = asyncio.get_running_loop(), random.Random(5)
        x_MD = some_rows()
        rows, replies = SharedRows.create(16, WIDTH), SharedRows.create(16, WIDTH)
        rows.tensor[2:8] = x_MD
        segments = (Segment(0, 2, 4), Segment(1, 6, 2))
        frame = LaneRequest(7, 1, 3, FAR_FUTURE_US, 5, segments, rows.checksum((2, 6))).pack()
        async with served(FakeColumn(0), FakeColumn(1), experts=[0, 1]) as there:
            peer = greet(there, rows, replies)
            assert is_welcome(await loop.sock_recv(peer, MAX_FRAME_BYTES))
            for number in range(FLIPS):
                replies.tensor.zero_()
                in_rows = number % 2 == 0
                bit = draw.randrange(8 * (x_MD.nbytes if in_rows else len(frame)))
                if in_rows:
                    flip_row_bit(rows.tensor[2:8], bit)
                await loop.sock_sendall(peer, frame if in_rows else flipped(frame, bit))
                said = await loop.sock_recv(peer, MAX_FRAME_BYTES)
                assert not replies.tensor.any()
                if in_rows:
                    assert LaneReply.unpack(said)[:2] == (7, pb.STATUS_CORRUPT)
                    flip_row_bit(rows.tensor[2:8], bit)
                else:
                    assert said == b""
                    peer.close()
                    peer = greet(there, rows, replies)
                    assert is_welcome(await loop.sock_recv(peer, MAX_FRAME_BYTES))
            await loop.sock_sendall(peer, frame)
            good = LaneReply.unpack(await loop.sock_recv(peer, MAX_FRAME_BYTES))
            assert (good.sequence, good.status, good.rows_crc) == (7, pb.STATUS_OK, replies.checksum((5, 6)))
            assert torch.equal(replies.tensor[5:11], right(x_MD))
            assert there.compute.failures == 0
            assert there.replica.inflight_tokens == 0
            peer.close()
        rows.close()
        replies.close()

    run(work())


@asynccontextmanager
async def lane_to_the_test(mine: LaneMemory) -> AsyncIterator[tuple[LaneTransport, socket.socket, SharedRows]]:
    """A transport whose replica is the test, with the region for its answers."""
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        endpoint = f"octavo-test-{random.SystemRandom().getrandbits(64):x}"
        listener.bind(f"\0{endpoint}")
        listener.listen(1)
        listener.setblocking(False)
        connecting = asyncio.create_task(mine.connect("r", endpoint, b"t" * TICKET_BYTES, WireCounters(), 120))
        peer, _ = await loop.sock_accept(listener)
    with closing(peer):
        peer.send(welcome())
        transport = await connecting
        frame, fds, _, _ = socket.recv_fds(peer, MAX_FRAME_BYTES, 2)
        hello = Hello.unpack(frame)
        SharedRows.adopt(fds[0], hello.num_rows, WIDTH).close()
        replies = SharedRows.adopt(fds[1], hello.num_replies, WIDTH)
        peer.setblocking(False)
        yield transport, peer, replies
        await transport.close()
        replies.close()


def test_replies_by_the_lane() -> None:
    """A damaged frame ends the lane, and whoever waits is told; damaged answers are corrupt, and the lane goes on."""

    async def work() -> None:
        loop, draw = asyncio.get_running_loop(), random.Random(6)
        mine = LaneMemory.create(64, WIDTH, 64)
        x_ND = some_rows()
        left = FLIPS
        while left:
            async with lane_to_the_test(mine) as (transport, peer, replies):
                while left and not transport.closed.is_set():
                    left -= 1
                    waiting = transport.forward(question(x_ND))
                    asked = LaneRequest.unpack(await loop.sock_recv(peer, MAX_FRAME_BYTES), num_rows=64, num_replies=64)
                    place = replies.tensor[asked.reply_row : asked.reply_row + ROWS]
                    place.copy_(right(x_ND))
                    crc = replies.checksum((asked.reply_row, ROWS))
                    frame = LaneReply(asked.sequence, pb.STATUS_OK, 5, 6, rows_crc=crc).pack()
                    in_rows = draw.random() < 0.9
                    if in_rows:
                        flip_row_bit(place, draw.randrange(8 * place.nbytes))
                    else:
                        frame = flipped(frame, draw.randrange(8 * len(frame)))
                    await loop.sock_sendall(peer, frame)
                    await waiting.wait()
                    outcome = waiting.outcome()
                    if in_rows:
                        assert isinstance(outcome, ExpertReply)
                        assert (outcome.status, outcome.output) == (pb.STATUS_CORRUPT, None)
                    else:
                        assert isinstance(outcome, TransportError)
                        assert transport.closed.is_set()
        mine.close()

    run(work())
