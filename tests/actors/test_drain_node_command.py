"""`octavo drain-node` waits for the requests of the front door beside it, and never for longer than it was told."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from rich.console import Console

import actors.command.drain_node as command
from actors.command.added_commands import CommandError
from actors.front.metrics import FrontMetrics
from actors.ray_runtime import RuntimeFailure
from tests.support.served_cluster import free_port


@contextmanager
def front_door(metrics: FrontMetrics, key: str | None = None) -> Iterator[int]:
    """Shows these metrics over HTTP, as the ingress does, to whoever has the key; yields its port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = metrics.render()
            may = key is None or self.headers["Authorization"] == f"Bearer {key}"
            self.send_response((200 if may else 401) if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_it_counts_what_the_front_door_says() -> None:
    metrics = FrontMetrics("m", dict, dict, lambda: None)
    with front_door(metrics) as port:
        assert command.inflight_requests(port) == 0
        metrics.inflight.inc(3)
        assert command.inflight_requests(port) == 3
    assert command.inflight_requests(free_port()) == 0, "no front door, no requests"


def test_one_that_does_not_say_may_have_some(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = FrontMetrics("m", dict, dict, lambda: None)
    with front_door(metrics, key="a-key-of-this-test") as port:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        assert command.inflight_requests(port) == 1
        assert command.wait_for_requests(port, time.monotonic() + 0.1) == 1
        monkeypatch.setenv("OPENAI_API_KEY", "a-key-of-this-test")
        assert command.inflight_requests(port) == 0


def test_it_waits_until_the_last_request_has_ended() -> None:
    metrics = FrontMetrics("m", dict, dict, lambda: None)
    metrics.inflight.inc()
    with front_door(metrics) as port:
        began_s = time.monotonic()
        timer = threading.Timer(0.5, metrics.inflight.dec)
        timer.start()
        assert command.wait_for_requests(port, began_s + 60) == 0
        assert time.monotonic() - began_s >= 0.5
        timer.join()


def test_without_a_cluster_it_gives_streams_their_time_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kubelet sends SIGTERM when this ends, however it ended."""

    def nobody(*_: object) -> list[str]:
        raise RuntimeFailure("no cluster")

    monkeypatch.setattr(command, "with_supervisor", nobody)
    began_s = time.monotonic()
    _start_now(monkeypatch)
    with pytest.raises(CommandError, match="nothing was moved: no cluster"):
        command.drain_node(None, "octavo", timeout_s=5, settle_s=0.5, http_port=free_port(), console=Console())
    assert time.monotonic() - began_s >= 0.4


def test_what_is_left_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "with_supervisor", lambda *_: ["expert-3-r0"])
    _start_now(monkeypatch)
    metrics = FrontMetrics("m", dict, dict, lambda: None)
    metrics.inflight.inc(2)
    with front_door(metrics) as port, pytest.raises(CommandError, match=r"after 0\.1 s: expert-3-r0, 2 requests"):
        command.drain_node(None, "octavo", timeout_s=0.1, settle_s=0, http_port=port, console=Console())


def _start_now(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process, the tests', began long ago."""
    began = time.time()

    class Now:
        def create_time(self) -> float:
            return began

    monkeypatch.setattr(command.psutil, "Process", Now)
