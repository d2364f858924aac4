"""A real expert actor in a process of its own, to be killed: `python -m tests.support.expert_process JSON`.

Prints one line of JSON, what `info` says, once the actor has settled, and lives until its standard input
ends. With `call_s` each of its calls takes so much longer: a machine with slow memory. With `says_s` that is how long
one took by its own account, however busy the machine was.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from actors.expert.desk import Admitted, Desk, Outcome
from actors.expert.process import ExpertProcess

ROOT = Path(__file__).resolve().parent.parent.parent


async def spawn(env: Mapping[str, str] | None = None, **arguments: Any) -> tuple[Process, dict[str, Any]]:
    """Starts the process, with more variables or without, and returns it with the actor's `info`."""
    command = (sys.executable, "-m", "tests.support.expert_process", json.dumps(arguments))
    environ = {**os.environ, **(env or {})}
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, env=environ, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    facts: dict[str, Any] = json.loads(await process.stdout.readline())
    return process, facts


def priorities(process: Process) -> set[tuple[int, int]]:
    """(nice, scheduling policy) of all its threads."""
    return {(int(fields[16]), int(fields[38])) for fields in _threads(process.pid)}


async def freeze(process: Process) -> None:
    """Stops the process, and returns when all of it stands still: on a busy machine that takes a moment."""
    process.send_signal(signal.SIGSTOP)
    while not _stands_still(process.pid):  # noqa: ASYNC110 - the system tells nobody
        await asyncio.sleep(0.001)


def _stands_still(pid: int) -> bool:
    return all(fields[0] == "T" for fields in _threads(pid))


def _threads(pid: int) -> Iterator[list[str]]:
    """What the system says of each thread, from its state on."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
            yield (task / "stat").read_text().rpartition(")")[2].split()


async def end(process: Process) -> None:
    """Kills the process if it still lives, and waits for it."""
    if process.returncode is None:
        process.kill()
    await process.communicate()


class SlowColumn:
    """Computes what another column does, later; beside rows, only its canary is asked of a column that serves."""

    def __init__(self, column: Any, call_s: float) -> None:
        self._column = column
        self._call_s = call_s

    def forward(self, layer: int, x_MD: Any) -> Any:
        time.sleep(self._call_s)
        return self._column.forward(layer, x_MD)

    def canary(self, layer: int) -> bytes:
        told: bytes = self._column.canary(layer)
        return told


def _say(call_s: float) -> None:
    """Whoever is asked how long something took says that it was `call_s` for each expert."""
    compute = Desk.compute

    def told(desk: Desk, work: Admitted, *rows: Any) -> Outcome:
        return compute(desk, work, *rows)._replace(compute_us=round(1e6 * call_s * len(work.columns)))

    Desk.compute = told  # type: ignore[method-assign]


async def _main(arguments: dict[str, Any], call_s: float, says_s: float | None) -> None:
    if says_s is not None:
        _say(says_s)
    actor = ExpertProcess(**arguments)
    await actor.start()
    facts = await actor.wait_settled()
    if call_s:
        held: dict[tuple[int, int], Any] = actor.actor._replica._held
        held.update({place: SlowColumn(column, call_s) for place, column in held.items()})
    print(json.dumps(facts), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await actor.stop()


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    asyncio.run(_main(given, given.pop("call_s", 0.0), given.pop("says_s", None)))
