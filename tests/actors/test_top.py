"""`octavo top` as it is used: over a served stream, in a real terminal, into a pipe; and from a supervisor."""

import asyncio
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, cast

import pytest
from rich.console import Console

from actors.command.top import NotSeen, first_frame, top_by_url
from actors.front.http_app import create_app
from actors.metrics.facts import facts_of
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient
from actors.supervision.status import ClusterStatus
from actors.window.remote import Trouble, from_supervisor, from_url
from tests.support.front import VOCAB, run, serving
from tests.support.tokenizers import write_byte_tokenizer
from tests.support.window import SeenCluster

TIMEOUT_S = 120.0


@contextmanager
def seen_at(model_dir: Path, cluster: SeenCluster) -> Iterator[str]:
    """A front door in a thread of its own, for callers that block."""
    write_byte_tokenizer(model_dir, VOCAB)
    url: list[str] = []
    up, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(create_app(cluster.front(model_dir))) as found:
            url.append(found)
            up.set()
            await asyncio.to_thread(over.wait)

    thread = threading.Thread(target=lambda: run(serve(), 2 * TIMEOUT_S))
    thread.start()
    try:
        assert up.wait(TIMEOUT_S)
        yield url[0]
    finally:
        over.set()
        thread.join(TIMEOUT_S)


# --- where snapshots come from ---


def test_a_stream_is_read_and_read_again_when_it_ends(tmp_path: Path) -> None:
    cluster = SeenCluster()
    cluster.more["state"] = "draining"  # then a stream is one snapshot long
    with seen_at(tmp_path, cluster) as url:
        found = list(islice(from_url(url + "/", None, sleep=lambda _: None), 3))
    assert [one["cluster"]["state"] for one in found if not isinstance(one, Trouble)] == ["draining"] * 3


def test_who_is_not_there_is_asked_again_with_pauses() -> None:
    pauses: list[float] = []
    found = list(islice(from_url("http://127.0.0.1:9", None, sleep=pauses.append), 6))
    assert all(isinstance(one, Trouble) and not one.final and "127.0.0.1:9" in one.why for one in found)
    assert pauses == [1.0, 2.0, 4.0, 8.0, 10.0]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://localhost/x", "nonsense"])
def test_only_http_is_read(url: str) -> None:
    (found,) = islice(from_url(url, None, sleep=lambda _: None), 1)
    assert isinstance(found, Trouble)
    assert "passwd" not in str(found) or "not an http" in found.why


class Answering:
    """An HTTP server that gives one answer to everything, and keeps what it was asked."""

    def __init__(self, status: str, body: str) -> None:
        self.asked = ""
        self._answer = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()

    def once(self, key: str | None = None) -> Any:
        """What `from_url` makes of it."""
        import socket

        with socket.create_server(("127.0.0.1", 0)) as listener:

            def answer() -> None:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as lines:
                    self.asked = b"".join(takewhile(lambda line: line.strip(), lines)).decode()
                    connection.sendall(self._answer)

            thread = threading.Thread(target=answer)
            thread.start()
            found = next(from_url(f"http://127.0.0.1:{listener.getsockname()[1]}", key, sleep=lambda _: None))
            thread.join(TIMEOUT_S)
        return found


def test_a_key_is_sent_and_its_refusal_is_final() -> None:
    server = Answering("401 Unauthorized", "{}")
    found = server.once("sk-secret")
    assert "Authorization: Bearer sk-secret" in server.asked
    assert found.final
    assert "--api-key-env" in found.why
    assert "sk-secret" not in found.why
    assert Answering("401 Unauthorized", "{}").once().final


def test_a_refusal_is_told_in_the_servers_words() -> None:
    error = json.dumps({"error": {"message": "open 16 times"}})
    assert Answering("429 Too Many Requests", error).once() == Trouble("open 16 times")
    assert Answering("502 Bad Gateway", "<html>").once().why.endswith("answers 502")
    assert Answering("404 Not Found", "").once().final


@pytest.mark.parametrize("body", ["data: {}\n\n", "data: [1]\n\n", 'data: {"version": 99}\n\n', "data: {oops\n\n"])
def test_what_is_no_snapshot_is_not_shown(body: str) -> None:
    assert isinstance(Answering("200 OK", body).once(), Trouble)


class Away(SupervisorClient):
    """A supervisor that answers in its second life."""

    def __init__(self, cluster: SeenCluster) -> None:
        self.cluster = cluster

    def window(self) -> tuple[ClusterStatus, list[dict[str, Any]]]:
        self.cluster.generated += 70
        return self.cluster.status(), [dict(facts_of(self.cluster.reply())), {"state": "loading"}]


def test_a_supervisor_is_looked_for_again_and_rates_are_between_looks() -> None:
    now_s = [0.0]

    def sleep(seconds: float) -> None:
        now_s[0] += seconds

    found_s: list[SupervisorClient | Exception | None] = [RuntimeFailure("no head"), None]

    def find() -> SupervisorClient | None:
        one = found_s.pop(0) if found_s else Away(cluster)
        if isinstance(one, Exception):
            raise one
        return one

    cluster = SeenCluster()
    found = list(islice(from_supervisor(find, 2.0, sleep, lambda: now_s[0]), 4))
    assert found[:2] == [Trouble("no head"), Trouble("the supervisor is away")]
    first, second = cast(Any, found[2:])
    assert first["source"] == "supervisor"
    assert first["front"] is None
    assert first["totals"]["generated_tokens_per_s"] is None
    assert second["totals"]["generated_tokens_per_s"] == 35.0
    assert second["load"]["tokens"] == cluster.load


# --- the command ---


def test_into_a_pipe_it_prints_one_frame(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with seen_at(tmp_path, SeenCluster()) as url, out.open("w") as file:
        top_by_url(url, None, once=False, console=Console(file=file, width=100))
    text = out.read_text()
    assert "\x1b" not in text
    assert text.count("octavo mixtral-tiny  ready") == 1
    assert "     7 " in text
    assert "0.0 tok/s" in text, "a frame has rates: it is of a second look"


def test_trouble_at_once_is_an_error() -> None:
    with pytest.raises(NotSeen, match="gone"):
        first_frame(iter([Trouble("gone")]), 2, Console())


class Terminal:
    """`octavo top --url URL` in a terminal of its own."""

    def __init__(self, url: str, *options: str, lines: int = 24, columns: int = 80) -> None:
        self.text = ""
        self._me, other = pty.openpty()
        self.resize(lines, columns)
        self._before = termios.tcgetattr(other)
        self._other = other
        env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "", "LINES": ""}
        env = {name: value for name, value in env.items() if value}
        command = [sys.executable, "-m", "actors.cli", "top", "--url", url, *options]
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, env=env, start_new_session=True, preexec_fn=_controls
        )

    def resize(self, lines: int, columns: int) -> None:
        fcntl.ioctl(self._me, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, text: bytes) -> None:
        os.write(self._me, text)

    def until(self, found: Callable[[str], bool]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not found(self.text):
            assert time.monotonic() < deadline, self.text[-3000:]
            if select.select([self._me], [], [], 0.5)[0]:
                self.text += os.read(self._me, 65536).decode(errors="replace")

    def end(self) -> int:
        """Its exit status. Whatever it still writes is read."""
        deadline = time.monotonic() + TIMEOUT_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.text[-3000:]
            if select.select([self._me], [], [], 0.1)[0]:
                self.text += os.read(self._me, 65536).decode(errors="replace")
        while select.select([self._me], [], [], 0.1)[0]:
            self.text += os.read(self._me, 65536).decode(errors="replace")
        return self.process.returncode

    @property
    def as_before(self) -> bool:
        """The terminal echoes and waits for lines again."""
        return termios.tcgetattr(self._other)[3] == self._before[3]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._me)
        os.close(self._other)


def _controls() -> None:
    """The terminal is the process's own, so that Ctrl-C reaches it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@contextmanager
def terminal(url: str, *options: str) -> Iterator[Terminal]:
    one = Terminal(url, *options)
    try:
        yield one
    finally:
        one.close()


ALTERNATE, NORMAL = "\x1b[?1049h", "\x1b[?1049l"


@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_a_terminal_is_drawn_live_and_left_as_it_was(tmp_path: Path, key: bytes) -> None:
    cluster = SeenCluster()
    with seen_at(tmp_path, cluster) as url, terminal(url) as one:
        one.until(lambda text: ALTERNATE in text and "mixtral-tiny" in text and "ready" in text)
        cluster.states["expert-3-r0"] = ("dead", "exit code -9")
        one.until(lambda text: "degraded" in text and "exit code -9" in text)
        one.text = ""
        one.resize(40, 120)
        os.killpg(one.process.pid, 28)  # SIGWINCH
        one.until(lambda text: len(text.split("mixtral-tiny")) > 2)
        one.type(key)
        assert one.end() == 0
        assert NORMAL in one.text
        assert "Traceback" not in one.text
        assert one.as_before


def test_who_is_told_to_end_leaves_the_terminal_as_it_was(tmp_path: Path) -> None:
    with seen_at(tmp_path, SeenCluster()) as url, terminal(url) as one:
        one.until(lambda text: ALTERNATE in text and "mixtral-tiny" in text)
        one.process.terminate()
        assert one.end() == 128 + 15
        assert NORMAL in one.text
        assert "Traceback" not in one.text
        assert one.as_before


def test_a_refusal_for_good_ends_it_with_one_line(tmp_path: Path) -> None:
    with seen_at(tmp_path, SeenCluster()) as url, terminal(f"{url}/nowhere") as one:
        assert one.end() == 1
        assert "Invalid URL" in one.text
        assert "Traceback" not in one.text
        assert one.as_before


def test_the_front_door_may_come_later(tmp_path: Path) -> None:
    with terminal("http://127.0.0.1:9") as one:
        one.until(lambda text: "127.0.0.1:9" in text and "refused" in text)
        one.type(b"q")
        assert one.end() == 0
