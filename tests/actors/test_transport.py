"""One connection: futures by sequence number, every kind of bad reply, and what its end does to what is unanswered."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import grpc
import pytest
import torch

from actors.channels import WireCredentials, serve_grpc
from actors.dispatch.attach import Attacher
from actors.dispatch.transport import (
    ExpertReply,
    ExpertRequest,
    ExpertRows,
    ExpertTransport,
    TransportError,
    WireCounters,
)
from actors.expert.service import SERVICE
from cluster.expert_map import ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from protos import codec
from protos import expert_pb2 as pb
from protos.limits import MAX_MESSAGE_BYTES
from tests.support.experts import FAR_FUTURE_US, WIDTH, FakeColumn, answer, credentials, run, served


def rows(count: int = 2) -> torch.Tensor:
    return torch.arange(float(count * WIDTH)).view(count, WIDTH) - 3


def question(count: int = 2, expert: int = 0, layer: int = 1) -> ExpertRequest:
    return ExpertRequest(layer, 1, FAR_FUTURE_US, (ExpertRows(expert, slice(0, count)),), rows(count))


@asynccontextmanager
async def connected(replica: ReplicaInfo) -> AsyncIterator[tuple[ExpertTransport, WireCounters]]:
    counters = WireCounters()
    transport = await Attacher(credentials())(replica, counters, 100)
    assert transport.lane == "grpc"
    try:
        yield transport, counters
    finally:
        await transport.close()


Script = Callable[[pb.ForwardRequest], list[bytes]]


@asynccontextmanager
async def scripted(script: Script, lane: str = "grpc") -> AsyncIterator[ReplicaInfo]:
    """A replica that answers each request with whatever `script` says; no bytes at all end the stream."""

    async def forward(_requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        while isinstance(data := await context.read(), bytes):
            for reply in script(codec.split_request(data).header):
                if not reply:
                    return
                await context.write(reply)

    async def attach(_request: bytes, _context: object) -> bytes:
        return pb.AttachReply(lane=lane).SerializeToString()

    async def info(_request: bytes, _context: object) -> bytes:
        return pb.InfoReply(replica_id="scripted", numerics_domain="fake").SerializeToString()

    def register(server: grpc.aio.Server) -> None:
        methods: dict[str, Any] = {
            "Forward": grpc.stream_stream_rpc_method_handler(forward),
            "Attach": grpc.unary_unary_rpc_method_handler(attach),
            "Info": grpc.unary_unary_rpc_method_handler(info),
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))

    server = await serve_grpc(register, service=SERVICE, host="127.0.0.1", port=0, credentials=credentials())
    try:
        yield ReplicaInfo(
            replica_id=ReplicaId("scripted"),
            expert_ids=(ExpertId(0),),
            first_layer=LayerId(0),
            num_layers=2,
            address=server.address,
            node_id=NodeId("node"),
            numerics_domain="fake",
        )
    finally:
        await server.stop(0)


def fine(request: pb.ForwardRequest, count: int = 2) -> bytes:
    header = pb.ForwardReply(sequence=request.sequence, status=pb.STATUS_OK)
    return codec.encode_reply(header, answer(0, 1, rows(count)), request)


def test_rows_go_out_and_come_back() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, connected(there.info()) as (transport, counters):
            replies = await asyncio.gather(*(transport.forward(question(count)) for count in (1, 5, 3)))
            for count, reply in zip((1, 5, 3), replies, strict=True):
                assert reply.status == pb.STATUS_OK
                assert reply.output is not None
                assert torch.equal(reply.output, answer(0, 1, rows(count)))
            assert counters.messages == 3
            assert counters.bytes_sent > 9 * WIDTH * 4
            assert counters.bytes_received > 9 * WIDTH * 4
            assert (counters.late_replies, counters.corrupt_replies) == (0, 0)

    run(work())


def test_a_refusal_comes_back_as_it_was_said() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, connected(there.info()) as (transport, _):
            reply = await transport.forward(question(expert=9))
            expected = ExpertReply(pb.STATUS_NOT_HELD, "this replica does not hold expert 9 in layer 1")
            assert reply == expected

    run(work())


def test_replies_may_come_in_any_order() -> None:
    async def work() -> None:
        held: list[bytes] = []

        def backwards(request: pb.ForwardRequest) -> list[bytes]:
            held.insert(0, fine(request, request.sequence))
            return held if len(held) == 3 else []

        async with scripted(backwards) as replica, connected(replica) as (transport, _):
            replies = await asyncio.gather(*(transport.forward(question(count)) for count in (1, 2, 3)))
            assert [len(reply.output) for reply in replies if reply.output is not None] == [1, 2, 3]

    run(work())


def test_a_second_answer_and_one_that_nobody_waits_for_are_ignored() -> None:
    async def work() -> None:
        def twice(request: pb.ForwardRequest) -> list[bytes]:
            if request.sequence == 1:
                return []
            first = pb.ForwardRequest(sequence=1, layer_id=1)
            return [fine(request), fine(request), fine(first)]

        async with scripted(twice) as replica, connected(replica) as (transport, counters):
            abandoned = transport.forward(question())
            abandoned.cancel()
            assert (await transport.forward(question())).status == pb.STATUS_OK
            assert (await transport.forward(question())).status == pb.STATUS_OK  # everything before it was read
            assert counters.late_replies >= 2
            assert not transport.closed.is_set()

    run(work())


def bad_replies() -> list[tuple[str, Callable[[pb.ForwardRequest], bytes], pb.Status, str]]:
    def header(request: pb.ForwardRequest) -> pb.ForwardReply:
        return pb.ForwardReply(sequence=request.sequence, status=pb.STATUS_OK)

    def flipped(request: pb.ForwardRequest) -> bytes:
        data = bytearray(fine(request))
        data[-1] ^= 1
        return bytes(data)

    def other_expert(request: pb.ForwardRequest) -> bytes:
        asked = pb.ForwardRequest()
        asked.CopyFrom(request)
        asked.expert_ids[0] += 1
        return codec.encode_reply(header(request), rows(), asked)

    return [
        ("flipped", flipped, pb.STATUS_CORRUPT, "CRC-32"),
        ("of another expert", other_expert, pb.STATUS_CORRUPT, "CRC-32"),
        ("not a reply", lambda _: b"\xff" * 9, pb.STATUS_CORRUPT, "not a ForwardReply"),
        ("of no request", lambda _: pb.ForwardReply(detail="what?").SerializeToString(), pb.STATUS_CORRUPT, "what"),
        ("too few rows", lambda r: fine(r, 1), pb.STATUS_INVALID, "1 rows came back for 2"),
        ("too many rows", lambda r: fine(r, 3), pb.STATUS_INVALID, "3 rows, expected 1 to 2"),
        ("no rows", lambda r: header(r).SerializeToString(), pb.STATUS_CORRUPT, "without an output"),
        (
            "another dtype",
            lambda r: codec.encode_reply(header(r), rows().half(), r),
            pb.STATUS_INVALID,
            "dtype is DTYPE_FLOAT16",
        ),
        (
            "another width",
            lambda r: codec.encode_reply(header(r), torch.ones(2, WIDTH + 1), r),
            pb.STATUS_INVALID,
            "rows of 5 elements",
        ),
    ]


@pytest.mark.parametrize(("name", "reply", "status", "said"), bad_replies(), ids=lambda value: str(value)[:20])
def test_a_bad_reply_is_a_failure_never_rows(
    name: str, reply: Callable[[pb.ForwardRequest], bytes], status: pb.Status, said: str
) -> None:
    async def work() -> None:
        def script(request: pb.ForwardRequest) -> list[bytes]:
            return [reply(request) if request.sequence == 1 else fine(request)]

        async with scripted(script) as replica, connected(replica) as (transport, _):
            failed = await transport.forward(question())
            assert (failed.status, failed.output) == (status, None)
            assert said in failed.detail
            assert (await transport.forward(question())).status == pb.STATUS_OK

    run(work())


def test_a_damaged_reply_puts_everything_unanswered_in_doubt() -> None:
    async def work() -> None:
        def script(request: pb.ForwardRequest) -> list[bytes]:
            return [b"\xff" * 9] if request.sequence == 3 else []

        async with scripted(script) as replica, connected(replica) as (transport, counters):
            replies = await asyncio.gather(*(transport.forward(question()) for _ in range(3)))
            assert {reply.status for reply in replies} == {pb.STATUS_CORRUPT}
            assert counters.corrupt_replies == 1

    run(work())


def test_the_end_of_the_stream_fails_what_is_unanswered_at_once() -> None:
    async def work() -> None:
        async with scripted(lambda _: [b""]) as replica, connected(replica) as (transport, _):
            reply = transport.forward(question())
            with pytest.raises(TransportError):
                await reply
            assert transport.closed.is_set()
            assert transport.reason
            with pytest.raises(TransportError):
                await transport.forward(question())

    run(work())


def test_a_killed_server_fails_what_is_unanswered_at_once() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with served(column, experts=[0]) as there, connected(there.info()) as (transport, _):
            reply = transport.forward(question())
            assert await asyncio.to_thread(column.entered.wait, 100)
            stopping = asyncio.create_task(there.server.stop(0))
            with pytest.raises(TransportError):
                await reply
            await transport.closed.wait()
            column.gate.set()
            await stopping

    run(work())


def test_close_fails_what_is_unanswered_and_may_be_repeated() -> None:
    async def work() -> None:
        async with scripted(lambda _: []) as replica, connected(replica) as (transport, _):
            reply = transport.forward(question())
            await transport.close()
            with pytest.raises(TransportError, match="closed here"):
                await reply
            await transport.close()

    run(work())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"replica_id": "someone"}, "replica_id is 'replica', the map says 'someone'"),
        ({"numerics_domain": "other"}, "numerics_domain is 'fake', the map says 'other'"),
    ],
)
def test_a_replica_that_the_map_does_not_mean_is_refused(change: dict[str, Any], said: str) -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there:
            with pytest.raises(TransportError, match=said):
                await Attacher(credentials())(replace(there.info(), **change), WireCounters(), 100)

    run(work())


def test_an_unknown_lane_is_refused() -> None:
    async def work() -> None:
        async with scripted(lambda _: [], lane="pigeon") as replica:
            with pytest.raises(TransportError, match="offers lane 'pigeon'"):
                await Attacher(credentials())(replica, WireCounters(), 100)

    run(work())


def test_a_wrong_token_says_so() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there:
            with pytest.raises(TransportError, match="UNAUTHENTICATED: missing or wrong bearer token"):
                await Attacher(WireCredentials("wrong"))(there.info(), WireCounters(), 100)

    run(work())


def test_nobody_there_is_an_error_after_the_time_allowed() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there:
            gone = there.info()
        with pytest.raises(TransportError, match="DEADLINE_EXCEEDED"):
            await Attacher(credentials())(gone, WireCounters(), 0.2)

    run(work())


def test_rows_that_fit_no_message_are_refused_here() -> None:
    async def work() -> None:
        async with served(FakeColumn(0), experts=[0]) as there, connected(there.info()) as (transport, _):
            wide = torch.zeros(1024, MAX_MESSAGE_BYTES // 4096)
            too_many = ExpertRequest(0, 1, FAR_FUTURE_US, (ExpertRows(0, slice(0, 1024)),), wide)
            with pytest.raises(ValueError, match="a message of"):
                transport.forward(too_many)
            assert (await transport.forward(question())).status == pb.STATUS_OK

    run(work())
