"""What a copy costs its neighbours: step times of a decode stream while one more replica starts, loads and is ready.

`python -m experiments.copy_cost MODEL`: all experts and a coordinator, each a process of its own on this machine,
without Ray; `--batch` sequences decode all the time, and now and then a further replica of expert 0 is started, from
disk or from its sibling. Prints one line of JSON per phase: quiet, and moving.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any

from actors.channels import WireCredentials, open_channel
from actors.expert.behind import NICE
from actors.expert.model_facts import ModelFacts
from actors.front.coordinator_client import CoordinatorClient
from actors.map_wire import map_to_wire
from actors.supervision.blueprint import process_env
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from model.config import ModelConfig
from model.storage.checkpoint import Checkpoint
from protos.coordinator_pb2 import Sampling, Submit
from protos.coordinator_pb2_grpc import CoordinatorServiceStub

MAX_TOKENS = 5000
TOKEN = "copy-cost-only-here"
WARM_S = 3.0


async def main(arguments: argparse.Namespace, undo: AsyncExitStack) -> None:
    """Starts everything, measures, and ends it all."""
    checkpoint = Checkpoint.open(arguments.model)
    shape, facts = checkpoint.config, ModelFacts.of(checkpoint).plain()
    processes: list[Process] = []

    def expert(number: int, copy: int, **more: Any) -> dict[str, Any]:
        return {
            "replica_id": f"expert-{number}-r{copy}",
            "expert_ids": [number],
            "first_layer": 0,
            "num_layers": shape.num_layers,
            "model": arguments.model,
            "kernel": "auto",
            "device": "cpu",
            "auth_token": TOKEN,
            "model_facts": facts,
            **more,
        }

    try:
        first = [await _spawn(processes, "expert", expert(number, 0)) for number in range(shape.num_experts)]
        infos = [json.loads(await process.stdout.readline()) for process in first]  # type: ignore[union-attr]
        address = await _coordinator(processes, arguments.model, shape, infos)
        client = CoordinatorClient(address, WireCredentials(TOKEN))
        undo.push_async_callback(client.close)
        await _until_ready(client)
        steps = _Steps(client, arguments.batch)
        undo.push_async_callback(steps.stop)
        await asyncio.sleep(WARM_S)
        for nice in arguments.nice * arguments.rounds:
            _say("quiet", await steps.during(asyncio.sleep(arguments.quiet_s)))
            more = {"load_bytes_per_s": arguments.bytes_per_s}
            if arguments.source == "peer":
                more |= {"sources": [infos[0]["address"]], "model": "/nothing/here"}
            began_s = time.monotonic()
            kwargs = expert(0, 1, **more) | {"_nice": nice}
            gaps = await steps.during(_started(processes, kwargs))
            _say("moving", gaps, seconds=round(time.monotonic() - began_s, 2), nice=nice)
            processes.pop().kill()
    finally:
        for process in processes:
            process.kill()


async def _main(arguments: argparse.Namespace) -> None:
    async with AsyncExitStack() as undo:
        await main(arguments, undo)


async def _started(processes: list[Process], kwargs: dict[str, Any]) -> None:
    process = await _spawn(processes, "expert", kwargs)
    assert process.stdout is not None
    info = json.loads(await process.stdout.readline())
    assert info["state"] == "ready", info


async def _spawn(processes: list[Process], kind: str, kwargs: dict[str, Any]) -> Process:
    command = (sys.executable, "-m", "experiments.copy_cost_child", kind, json.dumps(kwargs))
    env = {**os.environ, **process_env(1)}
    process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, env=env)
    processes.append(process)
    return process


class _Steps:
    """When the steps of one stream ended: the moments when tokens of its first sequence came."""

    def __init__(self, client: CoordinatorClient, batch: int) -> None:
        self._client = client
        self._ends_s: list[float] = []
        self._streams = [asyncio.create_task(self._decode(number)) for number in range(batch)]

    async def _decode(self, number: int) -> None:
        """One sequence that does not end while this runs."""
        prompt = [1 + number, *range(20, 27)]
        submit = Submit(
            request_id=number,
            prompt_token_ids=prompt,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            sampling=Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0),
            deadline_unix_us=time.time_ns() // 1000 + 3_600_000_000,
        )
        async for output in self._client.generate(submit):
            assert not output.error, output.error
            if number == 0:
                self._ends_s.append(time.monotonic())

    async def during(self, work: Coroutine[Any, Any, None]) -> Sequence[float]:
        """Seconds of the steps that ended while `work` was done."""
        before = len(self._ends_s)
        await work
        assert not any(stream.done() for stream in self._streams), "a sequence ended: give fewer rounds"
        ends_s = self._ends_s[before:]
        return [after - ended for ended, after in itertools.pairwise(ends_s)]

    async def stop(self) -> None:
        """The sequences end here."""
        for stream in self._streams:
            stream.cancel()
        await asyncio.gather(*self._streams, return_exceptions=True)


async def _coordinator(processes: list[Process], model: str, shape: ModelConfig, infos: Sequence[Any]) -> str:
    """The address of a coordinator whose map has these replicas."""
    process = await _spawn(processes, "coordinator", {"model": model, "auth_token": TOKEN})
    assert process.stdout is not None
    address = (await process.stdout.readline()).decode().strip()
    replicas = [
        ReplicaInfo(
            replica_id=ReplicaId(info["replica_id"]),
            expert_ids=(ExpertId(number),),
            first_layer=LayerId(0),
            num_layers=shape.num_layers,
            address=info["address"],
            node_id=NodeId("here"),
            numerics_domain=info["numerics_domain"],
        )
        for number, info in enumerate(infos)
    ]
    message = map_to_wire(ExpertMap(1, shape.num_layers, shape.num_experts, tuple(replicas)))
    async with open_channel(address, WireCredentials(TOKEN)) as channel:
        await CoordinatorServiceStub(channel).PublishMap(message, timeout=10)  # type: ignore[no-untyped-call]
    return address


async def _until_ready(client: CoordinatorClient) -> None:
    await client.connect()
    while (await client.snapshot()).state != "ready":  # noqa: ASYNC110 - it tells nobody
        await asyncio.sleep(0.1)


def _say(phase: str, steps_s: Sequence[float], **more: object) -> None:
    ordered = sorted(steps_s)
    median = statistics.median(ordered)
    print(
        json.dumps(
            {
                "phase": phase,
                "steps": len(ordered),
                "median_ms": round(median * 1e3, 1),
                "p99_ms": round(ordered[int(0.99 * len(ordered))] * 1e3, 1),
                "max_ms": round(ordered[-1] * 1e3, 1),
                "over_2x": sum(one > 2 * median for one in ordered),
                **more,
            }
        ),
        flush=True,
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quiet-s", type=float, default=8.0)
    parser.add_argument("--source", choices=["disk", "peer"], default="disk")
    parser.add_argument("--bytes-per-s", type=int, default=None)
    parser.add_argument("--nice", type=int, nargs="+", default=[NICE], help="one variant after the other")
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(_main(_parse()))
