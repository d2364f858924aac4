"""`octavo top`: the dashboard in a terminal. Draws when there is news, when the size changes, and every second.

What a frame looks like is `actors.window.frame`'s, where snapshots come from `actors.window.remote`'s.
"""

import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from actors.command.status import with_supervisor
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient, find_supervisor
from actors.window.frame import frame
from actors.window.remote import Trouble, from_supervisor, from_url
from actors.window.snapshot import Snapshot

REDRAW_S = 1.0
LAST_LOOK_S = 2.0  # for a look that is under way at the end
QUIT = b"qQ\x03"
READINGS_OF_A_RATE = 2
PIPE_LINES = 60

Snapshots = Iterator[Snapshot | Trouble]


class NotSeen(RuntimeFailure):
    """There is no snapshot to show."""


def top_by_supervisor(address: str | None, namespace: str, interval_s: float, *, once: bool, console: Console) -> None:
    """Asks the supervisor of the cluster at `address`, or of this user's. Raises RuntimeFailure when there is none."""

    def watch(supervisor: SupervisorClient) -> None:
        found: list[SupervisorClient] = [supervisor]

        def find() -> SupervisorClient | None:
            return found.pop() if found else find_supervisor(namespace)

        _top(lambda sleep: from_supervisor(find, interval_s, sleep), console, once=once)

    with_supervisor(address, namespace, watch)


def top_by_url(url: str, key: str | None, *, once: bool, console: Console) -> None:
    """Reads a front door's stream. Raises NotSeen when it refuses for good."""
    _top(lambda sleep: from_url(url, key, sleep), console, once=once)


def _top(begin: Callable[[Callable[[float], object]], Snapshots], console: Console, *, once: bool) -> None:
    if once or not console.is_terminal:
        console.print(first_frame(begin(time.sleep), READINGS_OF_A_RATE, console), soft_wrap=True)
    else:
        watch(begin, console)


def first_frame(snapshots: Snapshots, readings: int, console: Console) -> Text:
    """One frame of the last of so many snapshots. Raises NotSeen when there is trouble instead."""
    last: Snapshot | None = None
    for snapshot in snapshots:
        if isinstance(snapshot, Trouble):
            raise NotSeen(snapshot.why)
        last = snapshot
        readings -= 1
        if readings <= 0:
            break
    assert last is not None
    return frame(last, console.width, console.height if console.is_terminal else PIPE_LINES)


@dataclass
class _Seen:
    """What the reading thread has got, for the drawing one."""

    snapshot: Snapshot | None = None
    at_s: float = 0.0
    trouble: Trouble | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, news: Snapshot | Trouble) -> None:
        with self.lock:
            if isinstance(news, Trouble):
                self.trouble = news
            else:
                self.snapshot, self.at_s, self.trouble = news, time.monotonic(), None

    def draw(self, console: Console) -> Text:
        with self.lock:
            snapshot, at_s, trouble = self.snapshot, self.at_s, self.trouble
        if snapshot is None:
            return Text(trouble.why if trouble else "waiting for the first look …")
        note = "" if trouble is None else f"no news: {trouble.why}"
        return frame(snapshot, console.width, console.height, age_s=time.monotonic() - at_s, note=note)


def watch(begin: Callable[[Callable[[float], object]], Snapshots], console: Console) -> None:
    """Draws until q or Ctrl-C. Raises NotSeen when there is nothing to see, for good."""
    seen, over = _Seen(), threading.Event()
    news_in, news_out = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # the thread may ring to the end: never closed

    def read() -> None:
        try:
            for news in begin(over.wait):
                if over.is_set():
                    return
                seen.take(news)
                _ring(news_out)
        except Exception as error:  # noqa: BLE001 - told on the screen; at the end nobody looks any more
            seen.take(Trouble(f"{type(error).__name__}: {error}", final=True))
            _ring(news_out)

    reading = threading.Thread(target=read, name="snapshots", daemon=True)
    reading.start()
    try:
        with (
            _keys() as keys,
            _signals(news_out) as told,
            Live(console=console, screen=True, auto_refresh=False) as live,
        ):
            while True:
                if told:
                    _obey(told[0])
                live.update(seen.draw(console), refresh=True)
                ready, _, _ = select.select([news_in, *keys], [], [], REDRAW_S)
                if news_in in ready:
                    os.read(news_in, 4096)
                if any(_wants_to_quit(one) for one in ready if one != news_in):
                    return
                if seen.trouble is not None and seen.trouble.final:
                    raise NotSeen(seen.trouble.why)
    except KeyboardInterrupt:
        return
    finally:
        over.set()
        reading.join(LAST_LOOK_S)


def _ring(pipe: int) -> None:
    with contextlib.suppress(BlockingIOError):  # full: whoever reads it is awake already
        os.write(pipe, b".")


def _wants_to_quit(keys: int) -> bool:
    typed = os.read(keys, 64)
    return not typed or any(one in QUIT for one in typed)


@contextlib.contextmanager
def _keys() -> Iterator[list[int]]:
    """The keyboard, key by key; nothing where standard input is no terminal."""
    if not sys.stdin.isatty():
        yield []
        return
    keyboard = sys.stdin.fileno()
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield [keyboard]
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)


def _obey(number: int) -> None:
    """Raises what ends the drawing, so that the terminal is left as it was."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    sys.exit(128 + number)


@contextlib.contextmanager
def _signals(pipe: int) -> Iterator[list[int]]:
    """Wakes the drawing when the terminal's size changes and when it is told to end; yields by which signals it was.

    SIGINT too, which who was started in the background has ignored. The first is not raised where it is heard: what is
    raised while an object is being deleted is lost. A second one is, for a terminal that takes no more output.
    """
    told: list[int] = []

    def end(number: int, _: object) -> None:
        told.append(number)
        _ring(pipe)
        if len(told) > 1:
            _obey(number)

    handlers: dict[int, Any] = {signal.SIGWINCH: lambda *_: _ring(pipe)}
    handlers |= dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), end)
    before: dict[int, Any] = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
