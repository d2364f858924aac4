"""Snapshots from outside the front door: from its stream over HTTP, or made of what the supervisor says.

Both are endless iterators for a thread of their own, which try again when they fail: what is wrong is said in place of
a snapshot. Nothing is drawn here.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient
from actors.window.reading import History, Reading
from actors.window.snapshot import VERSION, Snapshot, make_snapshot

TIMEOUT_S = 15.0
MAX_PAUSE_S = 10.0
MAX_LINE_BYTES = 8 * 2**20
MAX_ERROR_BYTES = 64 * 1024
Sleep = Callable[[float], object]


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why there is no snapshot now; when `final`, asking again would not help."""

    why: str
    final: bool = False


def from_supervisor(
    find: Callable[[], SupervisorClient | None],
    interval_s: float,
    sleep: Sleep = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Snapshot | Trouble]:
    """A snapshot every `interval_s`, without what only a front door knows. `find` finds the supervisor; it may raise
    RuntimeFailure."""
    history = History()
    while True:
        began_s = clock()
        try:
            supervisor = find()
            if supervisor is None:
                raise RuntimeFailure("the supervisor is away")
            status, coordinators = supervisor.window()
        except RuntimeFailure as error:
            yield Trouble(str(error))
        else:
            told = tuple(facts for facts in coordinators if facts.get("coordinator_id"))
            reading = Reading(at_s=time.time(), clock_s=clock(), status=status, coordinators=told)
            history = history.after(reading)
            yield make_snapshot(reading, history, "supervisor")
        sleep(max(0.0, interval_s - (clock() - began_s)))


def from_url(url: str, key: str | None, sleep: Sleep = time.sleep) -> Iterator[Snapshot | Trouble]:
    """The snapshots of a front door's stream, which is asked for again whenever it ends."""
    failures = 0
    while True:
        try:
            for snapshot in _stream(url, key):
                failures = 0
                yield snapshot
            sleep(0.2)
        except (OSError, http.client.HTTPException, ValueError) as error:
            failures += 1
            yield _trouble(url, error)
            sleep(min(MAX_PAUSE_S, 0.5 * 2.0**failures))


def _stream(url: str, key: str | None) -> Iterator[Snapshot]:
    headers = {"Accept": "text/event-stream", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = urllib.request.Request(f"{url.rstrip('/')}/dashboard/events", headers=headers)
    if request.type not in ("http", "https"):
        raise ValueError(f"{url!r} is not an http or https address")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as reply:
        while line := reply.readline(MAX_LINE_BYTES + 1):
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"an event is longer than {MAX_LINE_BYTES} bytes")
            if line.startswith(b"data:"):
                yield _checked(json.loads(line.removeprefix(b"data:")))


def _checked(value: Any) -> Snapshot:
    if not isinstance(value, dict) or value.get("version") != VERSION:
        raise ValueError(f"what comes is not a snapshot of version {VERSION}")
    return cast(Snapshot, value)


def _trouble(url: str, error: Exception) -> Trouble:
    if isinstance(error, urllib.error.HTTPError):
        with error:
            body = error.read(MAX_ERROR_BYTES)
        if error.code in (401, 403):
            return Trouble(f"{url} asks for a key (--api-key-env), or does not take this one", final=True)
        try:
            return Trouble(str(json.loads(body)["error"]["message"]), final=error.code == 404)
        except (ValueError, KeyError, TypeError):
            return Trouble(f"{url} answers {error.code}", final=error.code == 404)
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return Trouble(f"{url}: {reason}")
