"""Hostile messages to an expert's gRPC port, strangers' and those of somebody who has the token."""

import asyncio
import random
import time
from typing import Any

import grpc
import torch

from actors.channels import WireCredentials, open_channel
from protos.codec import describe, encode_request, request_seed, split_reply
from protos.expert_pb2 import STATUS_OK, ForwardRequest, Status
from protos.limits import MAX_MESSAGE_BYTES
from tests.fuzz.mutation import damaged
from tests.fuzz.target import Target

SERVICE = "/octavo.ExpertService/"
METHODS = ("Forward", "Info", "Attach", "LoadColumn", "FetchColumn", "Drain", "Nothing")
WIDTH, LAYERS = 32, 2
WINDOW = 64
REFUSED_S, REFUSED_PAUSE_S = 60.0, 0.5
"""A place at a port that has none is tried for again for so long: whoever frees one may be busy meanwhile."""
FAR_US = 2**60
TOKEN = "a-token-for-tests-only"

_WRONG_TOKENS: tuple[Any, ...] = (
    (),
    (("authorization", "Bearer wrong"),),
    (("authorization", TOKEN),),
    (("authorization", f"Bearer {TOKEN}x"),),
    (("authorization-bin", b"\xff\x00"),),
    (("authorization", "Bearer " + "x" * 4000),),
)


def request_of(rows: torch.Tensor, **changes: Any) -> bytes:
    """A right request to layer 0 of expert 0, but for the changes."""
    fields: dict[str, Any] = {
        "sequence": 1,
        "layer_id": 0,
        "expert_ids": [0],
        "expert_rows": [len(rows)],
        "map_epoch": 1,
        "deadline_unix_us": FAR_US,
    }
    return encode_request(ForwardRequest(**{**fields, **changes}), rows)


class Forward:
    """A Forward stream of raw bytes."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._call: Any = None

    async def ask(self, messages: list[bytes]) -> list[bytes]:
        """Sends all and reads as many replies. Raises AioRpcError; the next call begins a new stream."""
        if self._call is None:
            self._call = self._channel.stream_stream(SERVICE + "Forward")()
        try:
            for message in messages:
                await self._call.write(message)
            replies = []
            async with asyncio.timeout(60):
                for _ in messages:
                    reply = await self._call.read()
                    if not isinstance(reply, bytes):
                        await self._call.code()
                        raise EOFError("the stream ended")
                    replies.append(reply)
            return replies
        except BaseException:
            self.forget()
            raise

    def forget(self) -> None:
        if self._call is not None:
            self._call.cancel()
            self._call = None


class Golden:
    """One right request, and the answer that it had before anybody was hostile."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stream = Forward(channel)
        self._rows = torch.linspace(-1, 1, 3 * WIDTH).view(3, WIDTH).contiguous()
        self._expected: bytes | None = None

    async def ask(self, report: Any) -> None:
        """Asks again, and counts an answer that is another."""
        data = request_of(self._rows)
        report.golden_asked += 1
        (reply,) = await self._stream.ask([data])
        header, frame = split_reply(reply)
        if header.status != STATUS_OK or frame is None:
            report.golden_wrong += 1
            return
        said = bytes(frame.payload)
        self._expected = self._expected or said
        report.golden_wrong += said != self._expected


async def expert_strangers(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """Garbage with wrong tokens to every method: each call must be UNAUTHENTICATED."""
    await strangers(places.expert_info["address"], SERVICE, METHODS, messages=messages, seed=seed, report=report)


async def strangers(
    address: str, service: str, methods: tuple[str, ...], *, messages: int, seed: int, report: Any
) -> None:
    """Messages of bytes that no protobuf parser takes; an answer with any other code is noted as a crash."""
    chance = random.Random(seed)
    async with grpc.aio.insecure_channel(address) as channel:
        while report.messages < messages:
            calls = [
                _stranger(channel, service + chance.choice(methods), chance.choice(_WRONG_TOKENS), chance.randbytes(40))
                for _ in range(16)
            ]
            for code in await asyncio.gather(*calls):
                report.answers[code] += 1
                report.messages += 1
                report.crashes += code != "UNAUTHENTICATED"


async def _stranger(channel: grpc.aio.Channel, method: str, metadata: Any, data: bytes) -> str:
    """What is said to the call. One that got no place at the port, unread too, is made again: a connection has only so
    many, and the port may count one as taken for longer than this side does. A port that is gone stays UNAVAILABLE.
    """
    until = time.monotonic() + REFUSED_S
    while True:
        call: Any = channel.unary_stream(method)(b"\xff" + data, metadata=metadata, timeout=60)
        code: grpc.StatusCode = await call.code()
        if code is not grpc.StatusCode.UNAVAILABLE or time.monotonic() > until:
            break
        await asyncio.sleep(REFUSED_PAUSE_S)
    return code.name if code is grpc.StatusCode.UNAUTHENTICATED else f"{code.name}: {await call.details()}"


async def attack_expert(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """Forward streams full of nonsense, and now and then another method with nonsense."""
    chance = random.Random(seed)
    async with open_channel(places.expert_info["address"], WireCredentials(TOKEN)) as channel:
        golden, foe = Golden(channel), Forward(channel)
        await golden.ask(report)
        while report.messages < messages:
            batch = [hostile(chance, seed, report.messages + n) for n in range(WINDOW)]
            report.messages += len(batch)
            try:
                for reply in await foe.ask(batch):
                    header, _ = split_reply(reply)
                    report.answers[Status.Name(header.status)] += 1
            except grpc.aio.AioRpcError as error:
                report.answers[error.code().name] += 1
                report.crashes += error.code() is grpc.StatusCode.UNAVAILABLE
            if report.messages % (WINDOW * 20) == 0:
                await _other_methods(channel, chance, report)
            if report.messages % (WINDOW * 8) == 0:
                await golden.ask(report)
        await golden.ask(report)


async def _other_methods(channel: grpc.aio.Channel, chance: random.Random, report: Any) -> None:
    too_large = bytes(MAX_MESSAGE_BYTES + 1)
    for method, data in (
        ("Info", chance.randbytes(30)),
        ("Attach", chance.randbytes(30)),
        ("LoadColumn", b"\x08" + b"\xff" * 4 + b"\x0f\x18\xff\xff\xff\xff\x0f"),
        ("FetchColumn", chance.randbytes(30)),
        ("Forward", too_large),
        ("Nothing", b""),
    ):
        call: Any = channel.stream_stream(SERVICE + method)(timeout=60)
        try:
            await call.write(data)
            await call.done_writing()
            while isinstance(await call.read(), bytes):
                pass
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        report.answers[f"{method}: {(await call.code()).name}"] += 1


def hostile(chance: random.Random, seed: int, number: int) -> bytes:
    """One message: damaged, of a wrong shape or place, with giant claims, late, or seen before."""
    rows = torch.full((chance.choice((1, 2, 5)), WIDTH), chance.random())
    kind = chance.randrange(8)
    if kind == 0:
        return chance.randbytes(chance.choice((0, 1, 10, 300)))
    if kind == 1:
        return damaged(_TARGET, seed, number)
    if kind == 2:
        return request_of(torch.ones(2, chance.choice((1, 31, 33, 64))), expert_rows=[2])
    if kind == 3:
        return _claiming(rows, chance)
    if kind == 4:
        return request_of(rows, layer_id=chance.choice((LAYERS, 2**32 - 1)), sequence=number + 1)
    if kind == 5:
        wrong: dict[str, Any] = {"expert_ids": [chance.choice((1, 7, 2**32 - 1))], "sequence": chance.choice((0, 5))}
        return request_of(rows, **wrong)
    if kind == 6:
        return request_of(rows, expert_ids=[0] * 9, expert_rows=[chance.choice((0, 2**32 - 1))] * 9)
    return request_of(rows, deadline_unix_us=chance.choice((0, 1, FAR_US)), sequence=3)  # late, or a replay


def _claiming(rows: torch.Tensor, chance: random.Random) -> bytes:
    """A message whose shape says that it is gigantic, under a right checksum."""
    header = ForwardRequest(
        sequence=9, layer_id=0, expert_ids=[0], expert_rows=[2**31], map_epoch=1, deadline_unix_us=FAR_US
    )
    shape = chance.choice(([2**31, WIDTH], [2**32 - 1, 2**32 - 1], [0, WIDTH], [2] * 40, [len(rows), WIDTH * 2]))
    claim, payload = describe(rows, seed=request_seed(header))
    claim.ClearField("shape")
    claim.shape.extend(shape)
    header.hidden.CopyFrom(claim)
    header.hidden.payload = bytes(payload)
    return header.SerializeToString()


def _never(data: bytes) -> object:
    raise NotImplementedError


_TARGET = Target(
    name="forward",
    decode=_never,
    errors=(),
    seeds=(request_of(torch.ones(2, WIDTH)), request_of(torch.ones(1, WIDTH), layer_id=1)),
)
