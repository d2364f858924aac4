"""A coordinator, or a front door, in a process of its own and without Ray: `python -m tests.chaos.plain_process JSON`.

Prints one line of JSON with its address, and lives until its standard input ends. Experts are
`tests.support.expert_process`.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

from actors.channels import WireCredentials
from actors.coordinator.actor import Coordinator
from actors.front.coordinator_client import CoordinatorClient
from actors.front.front_door import load_front
from actors.front.http_app import create_app
from cluster.config import ClusterConfig
from tests.support.front import serving

ROOT = Path(__file__).resolve().parent.parent.parent


async def spawn(role: str, log: Path, **arguments: Any) -> tuple[Process, str]:
    """Starts a process and returns it with its address. What it complains of goes to `log`."""
    command = (sys.executable, "-m", "tests.chaos.plain_process", json.dumps({"role": role, **arguments}))
    with log.open("ab") as errors:
        process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=PIPE, stdout=PIPE, stderr=errors)
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line, f"the {role} ended before it had an address: see {log}"
    return process, str(json.loads(line)["address"])


async def _coordinator(auth_token: str, config: dict[str, Any]) -> None:
    coordinator = Coordinator(coordinator_id="coordinator-0", config=ClusterConfig(**config), auth_token=auth_token)
    _say(await coordinator.start())
    await asyncio.to_thread(sys.stdin.read)
    await coordinator.stop()


async def _front(auth_token: str, model: str, coordinator: str, max_model_len: int, model_id: str) -> None:
    front = load_front(
        Path(model),
        [CoordinatorClient(coordinator, WireCredentials(auth_token))],
        model_id=model_id,
        max_model_len=max_model_len,
        system_fingerprint="fp_chaos",
        request_timeout_s=600.0,
    )
    async with serving(create_app(front)) as url:
        _say(url)
        await asyncio.to_thread(sys.stdin.read)


def _say(address: str) -> None:
    print(json.dumps({"address": address}), flush=True)


async def _main(role: str, **arguments: Any) -> None:
    await (_coordinator if role == "coordinator" else _front)(**arguments)


if __name__ == "__main__":
    asyncio.run(_main(**json.loads(sys.argv[1])))
