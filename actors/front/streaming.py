"""Server-sent events as OpenAI frames them, and noticing at once that a client is gone.

Starlette cancels nothing when the client of a plain response leaves, and a stream only when it next writes;
here the work is cancelled the moment the connection says so, and with it the request at its coordinator.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, NamedTuple, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from actors.front.openai_errors import ApiError, internal
from actors.front.request_ids import id_of

LOG = logging.getLogger(__name__)

Result = TypeVar("Result")
DONE = "data: [DONE]\n\n"
# Made once: `json.dumps` would make an encoder for every event.
_to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


class ClientGone(Exception):
    """The client closed its connection before it had its answer."""


class Event(NamedTuple):
    """What one event says, and its id: where a cut stream goes on."""

    data: dict[str, Any]
    id: str


def frame(data: dict[str, Any], event_id: str | None = None) -> str:
    """One event. ASCII only, so that no client takes a character for a line end.

    One without an id, such as an error's, leaves the client with that of the event before it.
    """
    head = "" if event_id is None else f"id: {event_id}\n"
    return f"{head}data: {_to_json(data)}\n\n"


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves first. Raises ClientGone.

    The request's body must have been read: what `receive` says next is that the connection closed.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_closed(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        watch.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _closed(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come, then `[DONE]`. A failure before the first is a plain error response.

    There may be no event at all: a stream may be resumed after its last one.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[Event, None], on_error: Callable[[ApiError], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI call. Raises ClientGone."""
        async with aclosing(self._events):
            await unless_gone(receive, self._run(scope, receive, send))

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            first = await anext(self._events, None)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            if first is not None:
                await _send(send, frame(*first))
            async for event in self._events:
                await _send(send, frame(*event))
        except ApiError as error:
            self._on_error(error)
            await _send(send, frame(error.body()))
        except OSError:
            raise ClientGone from None
        except Exception:  # the headers are out: this is the last place that can tell the client
            LOG.exception("a stream failed, request %s", id_of(scope))
            self._on_error(internal())
            await _send(send, frame(internal().body()))
        await _send(send, DONE, more=False)


async def _send(send: Send, text: str, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": text.encode("ascii"), "more_body": more})
