"""Listens to the coordinators of a running cluster until it is enough, and merges what they tell.

A coordinator that is lost, or comes later, changes nothing for the others; where they are is asked again and again.
Writing the file is the caller's. Nothing that is recorded says what the tokens are.
"""

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from actors import ray_runtime
from actors.channels import WireCredentials, open_channel
from actors.command.added_commands import CommandError
from actors.command.status import where_is
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SUPERVISOR_NAME
from cluster.routing_trace import TraceError
from experiments.simulation.commands import save
from experiments.trace_merge import TraceMerger
from protos.coordinator_pb2 import TraceChunk, TraceRequest
from protos.coordinator_pb2_grpc import CoordinatorServiceStub

LOOK_AGAIN_S = 2.0
LOOK_TIMEOUT_S = 10.0
DEFAULT_MAX_TOKENS = 5_000_000

Look = Callable[[], Awaitable[Mapping[str, WireCredentials]]]
"""How to speak to each coordinator that serves now, by address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Enough:
    """When a recording ends by itself; None is never, `max_tokens` always."""

    seconds: float | None = None
    requests: int | None = None
    max_tokens: int = DEFAULT_MAX_TOKENS

    def reached(self, merger: TraceMerger) -> bool:
        """True when requests or tokens are enough."""
        return merger.num_tokens >= self.max_tokens or (self.requests is not None and merger.num_ended >= self.requests)


def seconds_of(text: str) -> float:
    """`90`, `60s`, `5m` or `1h` in seconds. Raises CommandError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h|)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if not seconds > 0:
        raise CommandError(f"--for is {text!r}, but it must be a time such as 60s, 5m or 1h")
    return seconds


def record_command(out: Path, enough: Enough, *, address: str | None, namespace: str) -> None:
    """`octavo trace record`: to its end, or to Ctrl-C, and then the file. Raises CommandError or RuntimeFailure."""
    if not out.parent.is_dir():
        raise CommandError(f"{out}: there is no directory {out.parent}")
    ray_runtime.connect(where_is(address), namespace)
    try:
        merger = asyncio.run(_until_stopped(lambda: _coordinators(namespace), enough))
    finally:
        ray_runtime.disconnect()
    try:
        trace = merger.trace()
    except TraceError as error:
        raise CommandError(f"{error}: {out} was not written") from None
    save(trace, out)
    dropped = f", {merger.dropped_tokens} dropped" if merger.dropped_tokens else ""
    print(f"{out}: {len(trace.arrival_s)} requests, {len(trace.experts)} tokens of routing{dropped}")


async def record(look: Look, enough: Enough, stop: asyncio.Event, say: Callable[[str], None]) -> TraceMerger:
    """What is told until it is enough or `stop` is set. Raises what the first `look` raises."""
    merger = TraceMerger()
    ends_s = None if enough.seconds is None else time.monotonic() + enough.seconds
    streams: dict[str, asyncio.Task[None]] = {}
    found = await look()
    count = 0
    try:
        while True:
            for address, credentials in found.items():
                if address not in streams or streams[address].done():
                    count += 1
                    hears = _listen(f"{address} ({count})", address, credentials, merger, enough, stop, say)
                    streams[address] = asyncio.create_task(hears)
            if await _wait(stop, ends_s):
                return merger
            with contextlib.suppress(RuntimeFailure, TimeoutError):  # who is heard is heard on
                found = await look()
    finally:
        for task in streams.values():
            task.cancel()
        await asyncio.gather(*streams.values(), return_exceptions=True)


async def _wait(stop: asyncio.Event, ends_s: float | None) -> bool:
    """For a while; True where it is over."""
    left_s = LOOK_AGAIN_S if ends_s is None else min(LOOK_AGAIN_S, max(0.0, ends_s - time.monotonic()))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(left_s):
            await stop.wait()
    return stop.is_set() or (ends_s is not None and time.monotonic() >= ends_s)


async def _listen(
    name: str,
    address: str,
    credentials: WireCredentials,
    merger: TraceMerger,
    enough: Enough,
    stop: asyncio.Event,
    say: Callable[[str], None],
) -> None:
    """One stream to its end; says why it ended."""
    async with open_channel(address, credentials) as channel:
        stub: Any = CoordinatorServiceStub(channel)  # type: ignore[no-untyped-call]
        try:
            heard = False
            async for chunk in stub.Trace(TraceRequest()):
                assert isinstance(chunk, TraceChunk)
                if not heard:
                    heard = True
                    say(f"recording {chunk.coordinator_id} at {address}; Ctrl-C ends it")
                merger.add(name, chunk)
                if enough.reached(merger):
                    stop.set()
            say(f"the coordinator at {address} has ended")
        except grpc.aio.AioRpcError as error:
            say(f"the coordinator at {address} is not heard: {error.code().name}: {error.details()}")
        except TraceError as error:
            say(f"what the coordinator at {address} says is left out: {error}")
            await asyncio.Event().wait()  # it would say the same again


async def _until_stopped(look: Look, enough: Enough) -> TraceMerger:
    """`record` until Ctrl-C; a second one ends the process as usual."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()

    def asked() -> None:
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asked)
    return await record(look, enough, stop, lambda text: print(text, file=sys.stderr, flush=True))


async def _coordinators(namespace: str) -> dict[str, WireCredentials]:
    """Raises RuntimeFailure or TimeoutError where there is no cluster that serves, or nobody who knows."""
    async with asyncio.timeout(LOOK_TIMEOUT_S):
        supervisor = await ray_runtime.aside(lambda: ray_runtime.find(SUPERVISOR_NAME, namespace))
        if supervisor is None:
            raise RuntimeFailure(f"no octavo cluster named {namespace!r} runs there")
        found = await supervisor.call("endpoints", timeout_s=LOOK_TIMEOUT_S)
    if found is None:
        raise RuntimeFailure("the cluster is not ready yet: see octavo status")
    return dict.fromkeys(found["coordinators"], found["credentials"])
