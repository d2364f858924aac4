"""Hostile messages to a coordinator's port, strangers' and those of somebody who has the token."""

import asyncio
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import grpc

from actors.channels import WireCredentials, open_channel
from protos.coordinator_pb2 import Cancel, GenerateReply, GenerateRequest, Sampling, SequenceOutput, Submit
from protos.expert_pb2 import STATUS_OK, Status
from tests.fuzz.expert_foe import TOKEN, strangers
from tests.fuzz.mutation import damaged
from tests.fuzz.target import Target

SERVICE = "/octavo.CoordinatorService/"
METHODS = ("Generate", "PublishMap", "Snapshot", "Drain", "Trace", "Nothing")
WINDOW = 32
FOES = 12
"""Streams at a time, each on a connection of its own."""
MESSAGES_OF_A_PROCESS = 2_000
STREAMS = 8
"""One after another on one connection."""
GOLDEN_S = 0.25
SETTLE_S = 120.0
_OWN_WRITE_FAILED = "Internal error from Core"
"""What this side's gRPC says where the other side had ended the stream before a write."""


_WRONG: tuple[dict[str, Any], ...] = (
    {"prompt_token_ids": [300]},
    {"prompt_token_ids": []},
    {"prompt_token_ids": [5] * 100_000},
    {"max_tokens": 2**32 - 1},
    {"max_tokens": 0},
    {"min_tokens": 5},
    {"stop_token_ids": [2**32 - 1]},
    {"stop_token_ids": [1] * 5000},
    {"logprobs": 2**32 - 1},
    {"prompt_logprobs": 21},
    {"generated_token_ids": [5] * 9},
    {"return_routed_experts": True},
    {"sampling": Sampling(temperature=float("nan"), top_p=1, repetition_penalty=1)},
    {"sampling": Sampling(temperature=1, top_p=-1, repetition_penalty=1)},
    {"sampling": Sampling(temperature=1, top_p=1, repetition_penalty=float("inf"))},
    {"sampling": None},
    {"deadline_unix_us": 1},
    {},  # right
)


async def coordinator_strangers(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """Garbage with wrong tokens to every method."""
    address = places.cluster_facts["address"]
    await strangers(address, SERVICE, METHODS, messages=messages, seed=seed, report=report)


def submit_of(request_id: int, **changes: Any) -> Submit:
    """A right request but for the changes: four tokens, greedily."""
    sampling = Sampling(temperature=0, top_p=1, repetition_penalty=1, seed=1)
    fields: dict[str, Any] = {"prompt_token_ids": [5, 6, 7], "max_tokens": 4, "ignore_eos": True, "sampling": sampling}
    return Submit(request_id=request_id, **{**fields, **changes})


class Golden:
    """One right request, and the tokens that it had before anybody was hostile."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel
        self._expected: list[tuple[int, float]] | None = None

    async def ask(self, report: Any) -> None:
        """Asks again on a stream of its own, and counts an answer that is another."""
        report.golden_asked += 1
        call: Any = _generate(self._channel)(timeout=60)
        await call.write(GenerateRequest(submit=submit_of(1, max_tokens=12, logprobs=0)).SerializeToString())
        said: list[tuple[int, float]] = []
        last: SequenceOutput | None = None
        while last is None or not last.finish_reason:
            reply = await call.read()
            if not isinstance(reply, GenerateReply):
                report.golden_wrong += 1
                return
            for last in reply.outputs:
                said += [(one.chosen.token_id, one.chosen.logprob) for one in last.logprobs]
        call.cancel()
        self._expected = self._expected or said
        report.golden_wrong += last.status != STATUS_OK or len(said) != 12 or said != self._expected


def _generate(channel: grpc.aio.Channel) -> Any:
    return channel.stream_stream(SERVICE + "Generate", None, GenerateReply.FromString)


async def attack_coordinator(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """Generate streams of nonsense among right requests, several at a time, and nonsense to the other methods.

    One after another they would mostly wait: a stream costs a few round trips, and a right request as many steps as it
    has tokens, which streams beside it share.
    """
    address = places.cluster_facts["address"]
    async with open_channel(address, WireCredentials(TOKEN)) as channel:
        golden = Golden(channel)
        await golden.ask(report)
        asking = asyncio.create_task(_keep_asking(golden, report))
        try:
            for number, begun in enumerate(range(0, messages, MESSAGES_OF_A_PROCESS)):
                part = min(MESSAGES_OF_A_PROCESS, messages - begun)
                await _in_a_process(address, part, (seed << 10) ^ number, report)
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        await golden.ask(report)


async def _in_a_process(address: str, messages: int, seed: int, report: Any) -> None:
    """The foes in a process of their own, which takes its connections with it when it ends.

    This side's gRPC keeps a connection open, closed channel or not, on which a stream was ended while it wrote.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.fuzz.coordinator_foe", address, str(messages), str(seed)),
        stdout=asyncio.subprocess.PIPE,
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, process.returncode
    found = json.loads(said)
    report.messages += found["messages"]
    report.crashes += found["crashes"]
    report.answers.update(found["answers"])


@dataclass
class FoesReport:
    """What the foes of one process did and were told."""

    messages: int = 0
    crashes: int = 0
    answers: Counter[str] = field(default_factory=Counter)


async def _all_foes(address: str, messages: int, seed: int) -> FoesReport:
    report = FoesReport()
    await asyncio.gather(*(_one_foe(address, messages, seed, number, report) for number in range(FOES)))
    return report


async def _one_foe(address: str, messages: int, seed: int, number: int, report: Any) -> None:
    """One stream after another, until all foes together have sent enough.

    A stream that the other side has ended keeps its place among a connection's until its last word is read, which is
    not done here: each connection has only a few.
    """
    chance = random.Random((seed << 8) ^ number)
    while report.messages < messages:
        async with open_channel(address, WireCredentials(TOKEN)) as channel:
            for _ in range(STREAMS):
                if report.messages < messages:
                    await _one_stream(channel, chance, seed, report)
            await _other_methods(channel, chance, report)


async def _keep_asking(golden: Golden, report: Any) -> None:
    """The right request again and again, while others are hostile. Ends only by being cancelled."""
    while True:
        await golden.ask(report)
        await asyncio.sleep(GOLDEN_S)


async def _one_stream(channel: grpc.aio.Channel, chance: random.Random, seed: int, report: Any) -> None:
    """Messages until the coordinator ends the stream, or this side has had enough of it."""
    call: Any = _generate(channel)(timeout=300)
    await call.initial_metadata()
    expected = 0
    try:
        for _ in range(WINDOW):
            data, answered = hostile(chance, seed)
            report.messages += 1
            await call.write(data)
            expected += answered
        expected = await _settle(call, expected, report)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
        pass
    except TimeoutError:
        report.crashes += 1  # something that is always answered was not
    if call.done():
        code: grpc.StatusCode = await call.code()
        own = await call.details() == _OWN_WRITE_FAILED
        report.answers["ended while writing" if own else code.name] += 1
        report.crashes += not own and code not in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK)
    call.cancel()


async def _settle(call: Any, expected: int, report: Any) -> int:
    """Reads until everything is answered, or the stream ends; how many last outputs are missing."""
    async with asyncio.timeout(SETTLE_S):
        while expected > 0:
            reply = await call.read()
            if not isinstance(reply, GenerateReply):
                break
            for output in reply.outputs:
                report.answers[Status.Name(output.status)] += 1
                expected -= bool(output.finish_reason)
    return expected


def hostile(chance: random.Random, seed: int) -> tuple[bytes, int]:
    """One message, and how many last outputs it is sure to bring."""
    kind = chance.randrange(24)
    number = chance.getrandbits(31)
    name = number + 1
    if kind == 0:
        return b"\xff" + chance.randbytes(chance.choice((1, 10, 300))), 0
    if kind == 1:
        return bytes(3 << 20 if chance.random() < 1 / 8 else 3000), 0  # larger than any valid one, or just wrong
    if kind == 2:
        return damaged(_TARGET, seed, number), 0
    if kind == 3:
        return GenerateRequest(cancel=Cancel(request_id=chance.choice((0, name, 2**64 - 1)))).SerializeToString(), 0
    if kind == 4:
        return b"", 0
    return GenerateRequest(submit=submit_of(name, **chance.choice(_WRONG))).SerializeToString(), 1


async def _other_methods(channel: grpc.aio.Channel, chance: random.Random, report: Any) -> None:
    for method, data in (
        ("PublishMap", chance.randbytes(40)),
        ("PublishMap", b"\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x10\xff\xff\xff\xff\x0f\x18\xff\xff\xff\xff\x0f"),
        ("Snapshot", b"\xff\xff"),
        ("Drain", b"\xff\xff"),
        ("Nothing", b""),
    ):
        call: Any = channel.unary_unary(SERVICE + method)(data, timeout=60)
        code: grpc.StatusCode = await call.code()
        report.messages += 1
        report.answers[f"{method}: {code.name}"] += 1


def _never(data: bytes) -> object:
    raise NotImplementedError


_TARGET = Target(
    name="generate",
    decode=_never,
    errors=(),
    seeds=(GenerateRequest(submit=submit_of(1, logprobs=2, stop_token_ids=[3])).SerializeToString(),),
)


if __name__ == "__main__":
    print(json.dumps(vars(asyncio.run(_all_foes(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))))
