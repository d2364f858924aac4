"""What a replica answers: rows, errors that name what is wrong, and never the end of a stream or of the process."""

import asyncio
import os
import random
import socket
from typing import Any, cast

import grpc
import pytest
import torch

from actors.expert.reply_stream import MAX_UNREAD_BYTES, MAX_UNREAD_REPLIES, ReplyStream
from actors.expert.service import SERVICE
from protos import codec
from protos import expert_pb2 as pb
from tests.support.experts import FAR_FUTURE_US, TOKEN, WIDTH, FakeColumn, Served, answer, channel_to, run, served

FLOAT = (torch.float32,)


def rows(count: int = 2) -> torch.Tensor:
    return torch.arange(float(count * WIDTH)).view(count, WIDTH)


def header(sequence: int = 1, *, expert: int = 0, count: int = 2, **fields: Any) -> pb.ForwardRequest:
    said = {"layer_id": 1, "map_epoch": 3, "deadline_unix_us": FAR_FUTURE_US, **fields}
    return pb.ForwardRequest(sequence=sequence, expert_ids=[expert], expert_rows=[count], **said)


def forward(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(f"/{SERVICE}/Forward")()


async def ask(call: Any, request: pb.ForwardRequest, hidden: torch.Tensor) -> pb.ForwardReply:
    await call.write(codec.encode_request(request, hidden))
    return pb.ForwardReply.FromString(await call.read())


def output(reply: pb.ForwardReply, request: pb.ForwardRequest) -> torch.Tensor:
    seed = codec.reply_seed(request)
    return codec.decode_tensor(reply.output, max_rows=99, width=WIDTH, dtypes=FLOAT, seed=seed)


def unary(channel: grpc.aio.Channel, name: str, reply: Any) -> Any:
    return channel.unary_unary(f"/{SERVICE}/{name}", lambda message: message.SerializeToString(), reply.FromString)


async def until(served: Served, inflight: int) -> None:
    """Returns when that many tokens are in flight: the service has read what was sent."""
    async with channel_to(served.server.address) as channel:
        info = unary(channel, "Info", pb.InfoReply)
        while (await info(pb.InfoRequest())).inflight_tokens != inflight:
            pass


def test_rows_come_back_computed() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            request = header()
            reply = await ask(forward(channel), request, rows())
            assert (reply.status, reply.sequence) == (pb.STATUS_OK, 1)
            assert torch.equal(output(reply, request), answer(0, 1, rows()))
            counters = there.replica.counters
            assert (counters.messages_total, counters.tokens_total, counters.refused_total) == (1, 2, 0)
            assert there.replica.inflight_tokens == 0
            assert there.replica.map_epoch == 3

    run(work())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_answer_has_the_dtype_of_the_question(dtype: torch.dtype) -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            request = header()
            reply = await ask(forward(channel), request, rows().to(dtype))
            seed = codec.reply_seed(request)
            back = codec.decode_tensor(reply.output, max_rows=2, width=WIDTH, dtypes=(dtype,), seed=seed)
            assert torch.equal(back, answer(0, 1, rows().to(dtype)))

    run(work())


WRONG = [
    (header(0), rows(), pb.STATUS_INVALID, "sequence"),
    (header(deadline_unix_us=0), rows(), pb.STATUS_INVALID, "deadline_unix_us"),
    (header(deadline_unix_us=1), rows(), pb.STATUS_DEADLINE_EXCEEDED, "expired"),
    (header(layer_id=2), rows(), pb.STATUS_NOT_HELD, "expert 0 in layer 2"),
    (header(expert=1), rows(), pb.STATUS_NOT_HELD, "expert 1 in layer 1"),
    (header(map_epoch=1), rows(), pb.STATUS_STALE_EPOCH, "map_epoch 1 is older than 2"),
    (header(count=65), rows(65), pb.STATUS_INVALID, "65 rows, expected 1 to 64"),
    (header(count=3), rows(), pb.STATUS_INVALID, "2 rows of hidden for 3 routed rows"),
    (header(count=0), rows(), pb.STATUS_INVALID, "0 rows"),
    (header(), torch.zeros(2, WIDTH + 1), pb.STATUS_INVALID, f"rows of {WIDTH + 1} elements"),
]


@pytest.mark.parametrize(("request_", "hidden", "status", "said"), WRONG)
def test_a_wrong_message_is_answered_and_the_stream_goes_on(
    request_: pb.ForwardRequest, hidden: torch.Tensor, status: pb.Status, said: str
) -> None:
    async def work() -> None:
        column = FakeColumn(0)
        async with (
            served(column, experts=[0], max_queue_tokens=64, min_map_epoch=2) as there,
            channel_to(there.server.address) as channel,
        ):
            call = forward(channel)
            reply = await ask(call, request_, hidden)
            assert (reply.status, reply.sequence) == (status, request_.sequence)
            assert said in reply.detail
            assert not reply.HasField("output")
            assert column.calls == []
            assert there.replica.counters.refused_total == 1
            assert (await ask(call, header(2), rows())).status == pb.STATUS_OK

    run(work())


def damaged() -> list[tuple[bytes, pb.Status, int]]:
    good = codec.encode_request(header(5), rows())
    flipped = bytearray(good)
    flipped[-1] ^= 4
    wrong_expert = pb.ForwardRequest.FromString(good)
    wrong_expert.layer_id = 0
    return [
        (b"", pb.STATUS_INVALID, 0),
        (b"\xff" * 40, pb.STATUS_CORRUPT, 0),
        (good[:-3], pb.STATUS_CORRUPT, 0),
        (header(6).SerializeToString(), pb.STATUS_INVALID, 6),
        (bytes(flipped), pb.STATUS_CORRUPT, 5),
        (wrong_expert.SerializeToString(), pb.STATUS_CORRUPT, 5),
    ]


@pytest.mark.parametrize(("data", "status", "sequence"), damaged())
def test_damaged_bytes_are_answered_and_the_stream_goes_on(data: bytes, status: pb.Status, sequence: int) -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            call = forward(channel)
            await call.write(data)
            reply = pb.ForwardReply.FromString(await call.read())
            assert (reply.status, reply.sequence) == (status, sequence)
            assert (await ask(call, header(2), rows())).status == pb.STATUS_OK

    run(work())


def test_a_full_queue_says_so_and_empties() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with (
            served(column, experts=[0], max_queue_tokens=5) as there,
            channel_to(there.server.address) as channel,
        ):
            call = forward(channel)
            await call.write(codec.encode_request(header(1, count=3), rows(3)))
            await until(there, 3)
            reply = await ask(call, header(2, count=3), rows(3))
            assert (reply.sequence, reply.status) == (2, pb.STATUS_OVERLOADED)
            assert reply.detail == "3 rows, room for 2"
            await call.write(codec.encode_request(header(3, count=2), rows(2)))
            column.gate.set()
            answered = [pb.ForwardReply.FromString(await call.read()) for _ in range(2)]
            assert sorted((reply.sequence, reply.status) for reply in answered) == [(1, 1), (3, 1)]
            assert (await ask(call, header(4, count=5), rows(5))).status == pb.STATUS_OK

    run(work())


def test_rows_that_expire_in_the_queue_are_not_computed() -> None:
    async def work() -> None:
        column, now = FakeColumn(0), [1_000]
        column.gate.clear()
        async with (
            served(column, experts=[0], wall_us=lambda: now[0]) as there,
            channel_to(there.server.address) as channel,
        ):
            call = forward(channel)
            await call.write(codec.encode_request(header(1, deadline_unix_us=5_000), rows()))
            await asyncio.to_thread(column.entered.wait, 100)
            await call.write(codec.encode_request(header(2, deadline_unix_us=6_000), rows()))
            await until(there, 4)
            now[0] = 6_000
            column.gate.set()
            replies = [pb.ForwardReply.FromString(await call.read()) for _ in range(2)]
            assert [(reply.sequence, reply.status) for reply in replies] == [
                (1, pb.STATUS_OK),
                (2, pb.STATUS_DEADLINE_EXCEEDED),
            ]
            assert len(column.calls) == 1

    run(work())


def test_older_rows_go_first_even_from_another_stream() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with served(column, experts=[0]) as there, channel_to(there.server.address) as channel:
            one, two = forward(channel), forward(channel)
            await one.write(codec.encode_request(header(1, count=1), rows(1)))
            await asyncio.to_thread(column.entered.wait, 100)
            await one.write(codec.encode_request(header(2, deadline_unix_us=FAR_FUTURE_US + 9, count=2), rows(2)))
            await until(there, 3)
            await two.write(codec.encode_request(header(1, deadline_unix_us=FAR_FUTURE_US + 5, count=3), rows(3)))
            await until(there, 6)
            column.gate.set()
            for call in (one, one, two):
                await call.read()
            assert [count for _, count in column.calls] == [1, 3, 2]

    run(work())


def test_a_failing_kernel_fails_its_message_only(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        column = FakeColumn(0, error=RuntimeError("no memory"))
        async with served(column, experts=[0]) as there, channel_to(there.server.address) as channel:
            call = forward(channel)
            reply = await ask(call, header(1), rows())
            assert (reply.status, reply.detail) == (pb.STATUS_INTERNAL, "RuntimeError: no memory")
            assert there.replica.counters.errors_total == 1
            column.error = None
            assert (await ask(call, header(2), rows())).status == pb.STATUS_OK

    run(work())
    assert "layer 1 failed" in caplog.text


def test_what_a_client_left_behind_is_not_computed() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with served(column, experts=[0]) as there, channel_to(there.server.address) as channel:
            call = forward(channel)
            await call.write(codec.encode_request(header(1, count=1), rows(1)))
            await asyncio.to_thread(column.entered.wait, 100)
            for sequence in (2, 3):
                await call.write(codec.encode_request(header(sequence, count=2), rows(2)))
            await until(there, 5)
            call.cancel()
            while there.service._forwards:  # noqa: ASYNC110 - the server's end of the call has ended; nobody is told
                await asyncio.sleep(0.005)
            column.gate.set()
            await until(there, 0)
            assert column.calls == [(1, 1)]

    run(work())


def test_a_client_that_has_said_everything_gets_every_answer() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            call = forward(channel)
            for sequence in (1, 2, 3):
                await call.write(codec.encode_request(header(sequence), rows()))
            await call.done_writing()
            seen = []
            while (data := await call.read()) is not grpc.aio.EOF:
                seen.append(pb.ForwardReply.FromString(data).sequence)
            assert sorted(seen) == [1, 2, 3]
            assert await call.code() == grpc.StatusCode.OK

    run(work())


class SlowReader:
    """Stands in for the call of a client that reads one reply per `allow`."""

    def __init__(self) -> None:
        self.allow = asyncio.Semaphore(0)
        self.wrote = asyncio.Event()
        self.written: list[bytes] = []

    async def write(self, reply: bytes) -> None:
        await self.allow.acquire()
        self.written.append(reply)
        self.wrote.set()


def test_of_a_client_that_does_not_read_nothing_more_is_read() -> None:
    async def work() -> None:
        stream, client = ReplyStream(), SlowReader()
        writer = asyncio.create_task(stream.write_to(cast(Any, client)))
        for _ in range(MAX_UNREAD_REPLIES - 1):
            stream.push(b"reply")
        await stream.wait_for_room()
        for _ in range(3):
            stream.push(b"last")
        waiting = asyncio.create_task(stream.wait_for_room())
        client.allow.release()
        await client.wrote.wait()
        await asyncio.sleep(0)
        assert not waiting.done()  # one was read, one is in the writer's hands, and the rest is still too much
        client.allow.release()
        await waiting
        stream.end()
        for _ in range(MAX_UNREAD_REPLIES):
            client.allow.release()
        await writer
        assert client.written == [b"reply"] * (MAX_UNREAD_REPLIES - 1) + [b"last"] * 3

    run(work())


def test_of_a_client_that_leaves_large_replies_unread_nothing_more_is_read() -> None:
    async def work() -> None:
        stream, client = ReplyStream(), SlowReader()
        writer = asyncio.create_task(stream.write_to(cast(Any, client)))
        half = bytes(MAX_UNREAD_BYTES // 2)
        for _ in range(2):
            stream.push(half)
        waiting = asyncio.create_task(stream.wait_for_room())
        await asyncio.sleep(0)
        stream.push(half)  # what was computed meanwhile
        client.allow.release()
        await client.wrote.wait()
        await waiting  # one was read, one is in the writer's hands, and one may wait
        stream.end()
        client.allow.release()
        client.allow.release()
        await writer
        assert client.written == [half] * 3

    run(work())


def test_drain_answers_what_is_in_flight_and_takes_nothing_new() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with served(column, experts=[0]) as there, channel_to(there.server.address) as channel:
            call = forward(channel)
            drain = unary(channel, "Drain", pb.DrainReply)
            await call.write(codec.encode_request(header(1), rows()))
            await until(there, 2)
            assert (await drain(pb.DrainRequest(timeout_ms=10))).inflight_tokens == 2
            draining = asyncio.create_task(there.service.drain(200))
            assert (await ask(call, header(2), rows())).status == pb.STATUS_DRAINING
            column.gate.set()
            assert await draining == 0
            assert pb.ForwardReply.FromString(await call.read()).status == pb.STATUS_OK
            info = await unary(channel, "Info", pb.InfoReply)(pb.InfoRequest())
            assert info.state == pb.REPLICA_STATE_DRAINING

    run(work())


def test_info_describes_the_replica() -> None:
    async def work() -> None:
        columns = (FakeColumn(0), FakeColumn(3))
        async with served(*columns, experts=[0, 3]) as there, channel_to(there.server.address) as channel:
            info = await unary(channel, "Info", pb.InfoReply)(pb.InfoRequest())
            assert list(info.expert_ids) == [0, 3]
            assert (info.first_layer, info.num_layers) == (0, 2)
            assert (info.kernel, info.numerics_domain) == ("fake", "fake")
            assert (info.weight_bytes, info.hidden_size, info.pid) == (16, WIDTH, os.getpid())
            assert info.state == pb.REPLICA_STATE_READY
            assert info.machine_id

    run(work())


def test_attach_answers_when_the_replica_is_ready() -> None:
    async def work() -> None:
        async with (
            served(FakeColumn(0), experts=[0], ready=False) as there,
            channel_to(there.server.address) as channel,
        ):
            call = forward(channel)
            reply = await ask(call, header(), rows())
            assert (reply.status, reply.detail) == (pb.STATUS_NOT_HELD, "this replica is loading")
            attach = asyncio.ensure_future(unary(channel, "Attach", pb.AttachReply)(pb.AttachRequest(lanes=["x"])))
            await unary(channel, "Info", pb.InfoReply)(pb.InfoRequest())
            assert not attach.done()
            there.replica.settle(pb.REPLICA_STATE_READY)
            assert (await attach).lane == "grpc"

    run(work())


def test_attach_to_a_replica_that_cannot_load_fails_with_its_reason() -> None:
    async def work() -> None:
        async with (
            served(FakeColumn(0), experts=[0], ready=False) as there,
            channel_to(there.server.address) as channel,
        ):
            there.replica.settle(pb.REPLICA_STATE_FAILED, "no such file")
            with pytest.raises(grpc.aio.AioRpcError, match="replica is failed: no such file"):
                await unary(channel, "Attach", pb.AttachReply)(pb.AttachRequest())

    run(work())


def test_load_column_is_handed_on() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            load = unary(channel, "LoadColumn", pb.LoadColumnReply)
            reply = await load(pb.LoadColumnRequest(expert_id=2, first_layer=1, num_layers=3))
            assert (reply.status, reply.weight_bytes) == (pb.STATUS_OK, 123)
            assert there.loads == [(2, range(1, 4))]
            reply = await load(pb.LoadColumnRequest(expert_id=100))
            assert (reply.status, reply.detail) == (pb.STATUS_INVALID, "expert 100 does not exist")
            await there.service.drain(1)
            assert (await load(pb.LoadColumnRequest())).status == pb.STATUS_NOT_HELD

    run(work())


def test_a_hundred_hostile_messages_do_no_harm() -> None:
    """With the token: random bytes and mutated messages to every method. Without: whatever on a raw socket."""

    async def shout(address: str, data: bytes) -> None:
        host, port = address.split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(data)
        try:
            writer.write_eof()
            await asyncio.wait_for(reader.read(), 120)
        except OSError:
            pass  # the server may well slam the door
        finally:
            writer.close()

    async def work() -> None:
        rng = random.Random(7)
        async with served(FakeColumn(0), experts=[0]) as there, channel_to(there.server.address) as channel:
            call = forward(channel)
            good = codec.encode_request(header(1), rows())
            for attempt in range(100):
                message = bytearray(good if attempt % 2 else rng.randbytes(rng.randrange(400)))
                for _ in range(3 if message else 0):
                    message[rng.randrange(len(message))] = rng.randrange(256)
                await call.write(bytes(message))
                reply = pb.ForwardReply.FromString(await call.read())
                assert reply.status != pb.STATUS_OK or bytes(message) == good
            for name in ("Info", "Attach", "LoadColumn", "Drain"):
                raw: Any = channel.unary_unary(f"/{SERVICE}/{name}")
                for _ in range(5):
                    with pytest.raises(grpc.aio.AioRpcError):
                        await raw(b"\xff" + rng.randbytes(30), timeout=60)
            for data in (b"GET / HTTP/1.1\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + rng.randbytes(99)):
                await shout(there.server.address, data)
            for _ in range(20):
                await shout(there.server.address, rng.randbytes(200))
            assert (await ask(call, header(2), rows())).status == pb.STATUS_OK

    run(work())


def test_the_port_is_loopback_and_asks_for_the_token() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there:
            host = there.server.address.split(":")[0]
            assert host == "127.0.0.1"
            async with grpc.aio.insecure_channel(there.server.address) as stranger:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await forward(stranger).read()
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
            assert there.replica.counters.messages_total == 0
            socket.create_connection((host, there.server.port)).close()
            assert TOKEN not in repr(there)

    run(work())
