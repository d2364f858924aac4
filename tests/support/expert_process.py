"""A real expert actor in a process of its own, to be killed: `python -m tests.support.expert_process JSON`.

Prints one line of JSON, what `info` says, once the actor has settled, and lives until its standard input
ends.
"""

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path
from typing import Any

from actors.expert.actor import ExpertActor

ROOT = Path(__file__).resolve().parent.parent.parent


async def spawn(**arguments: Any) -> tuple[Process, dict[str, Any]]:
    """Starts the process and returns it with the actor's `info`."""
    command = (sys.executable, "-m", "tests.support.expert_process", json.dumps(arguments))
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    facts: dict[str, Any] = json.loads(await process.stdout.readline())
    return process, facts


async def end(process: Process) -> None:
    """Kills the process if it still lives, and waits for it."""
    if process.returncode is None:
        process.kill()
    await process.communicate()


async def _main(arguments: dict[str, Any]) -> None:
    actor = ExpertActor(**arguments)
    await actor.start()
    print(json.dumps(await actor.wait_settled()), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await actor.stop()


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
