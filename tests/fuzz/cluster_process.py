"""A whole tiny cluster with both fronts in a process of its own: `python -m tests.fuzz.cluster_process JSON`.

JSON has `model_dir` and fields of a ClusterConfig. Prints one line of JSON, its addresses, and lives until its standard
input ends. What it says goes to a log, so that a campaign can look for what went wrong.
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

import psutil

from actors.front.http_app import create_app
from tests.support.expert_process import ROOT
from tests.support.front import serving
from tests.support.tiny_cluster import tiny_cluster

TIDY = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "131072"}
"""For processes whose memory is measured: what they let go of is the system's again, with however many threads."""


async def spawn(log: Path, **arguments: Any) -> tuple[Process, dict[str, str]]:
    """Starts the process, whose memory can be measured; its `address` (gRPC) and `url` (HTTP)."""
    command = (sys.executable, "-m", "tests.fuzz.cluster_process", json.dumps(arguments))
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(
            *command, cwd=ROOT, env={**os.environ, **TIDY}, stdin=PIPE, stdout=PIPE, stderr=errors
        )
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line, f"the cluster ended before it had an address: see {log}"
    facts: dict[str, str] = json.loads(line)
    return process, facts


async def end(process: Process) -> None:
    """Lets it close, and kills it if it does not."""
    if process.returncode is None and process.stdin is not None:
        process.stdin.close()
        try:
            async with asyncio.timeout(30):
                await process.wait()
        except TimeoutError:
            process.kill()
    await process.wait()


def rss(pid: int) -> int:
    """Bytes of memory that the process has."""
    return int(psutil.Process(pid).memory_info().rss)


async def _main(model_dir: str, **config: Any) -> None:
    async with (
        tiny_cluster(Path(model_dir), **config) as cluster,
        serving(create_app(cluster.front)) as url,
    ):
        print(json.dumps({"address": cluster.address, "url": url}), flush=True)
        await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(**json.loads(sys.argv[1])))
