"""The outermost layer: a server that lost its client says so in its own way, and that is no defect of ours."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message

from actors.front.front_door import FrontDoor
from actors.front.http_app import create_app
from tests.support.front import make_front
from tests.support.scripted_coordinator import ScriptedCoordinator, saying


class TaskCancelledError(Exception):
    """As Ray Serve's receive raises, where a client leaves before its body's end."""


def posted(front: FrontDoor, end: Exception) -> list[Message]:
    """What is answered to a request whose body never comes: `receive` raises instead."""
    told: list[Message] = []

    async def receive() -> Message:
        raise end

    async def send(message: Message) -> None:
        told.append(message)

    head = [(b"host", b"x"), (b"content-type", b"application/json"), (b"content-length", b"50")]
    scope: dict[str, Any] = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": head}
    scope |= {"raw_path": b"/v1/completions", "query_string": b"", "http_version": "1.1", "client": ("127.0.0.1", 1)}
    scope |= {"scheme": "http", "server": ("127.0.0.1", 2), "root_path": "", "asgi": {"version": "3.0"}}
    asyncio.run(create_app(front)(scope, receive, send))
    return told


@pytest.mark.parametrize("end", [TaskCancelledError("is canceled"), RuntimeError("gone"), ClientDisconnect()], ids=repr)
def test_a_server_that_raises_instead_of_a_body_has_lost_its_client(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, end: Exception
) -> None:
    coordinator = ScriptedCoordinator(saying([7]))
    front = make_front(tmp_path, coordinator)
    posted(front, end)
    page = front.metrics.render().decode()
    assert "octavo_unexpected_errors_total 0.0" in page
    assert "octavo_client_disconnects_total 1.0" in page
    assert "unexpected error" not in caplog.text
    assert coordinator.submits == []
