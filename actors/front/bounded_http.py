"""uvicorn's HTTP protocol with bounds that it lacks: heads in size and time, readers and leftovers in time.

A connection that sends its request's head slowly, or too much of one, is answered and closed; one whose client does
not read for `WRITE_S` is cut, which the application sees as a client that left, so that its sequence is freed; one that
goes on sending a body after its answer is closed. What a request means is the application's.
"""

import asyncio
import json
import logging
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from actors.front.head_limits import (
    MAX_HEAD_BYTES,
    MAX_HEADERS,
    MAX_URL_BYTES,
    head_timeout,
    headers_too_large,
    too_many_headers,
    url_too_long,
)
from actors.front.openai_errors import ApiError

LOG = logging.getLogger(__name__)

HEAD_S = 20.0
"""From a connection's first moment, or a request's first byte, to the end of its head; and for a body's rest after its
answer."""
WRITE_S = 60.0
"""How long a client may leave full buffers unread. It must read some kilobytes in that time."""
MAX_CONNECTIONS = 4096
_SLACK_BYTES = 8 * 1024  # of the head's own punctuation


class BoundedHttp(HttpToolsProtocol):
    """Give it to uvicorn as `http`."""

    head_s = HEAD_S
    write_s = WRITE_S
    max_connections = MAX_CONNECTIONS

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = False
        self._head_bytes = 0
        self._refusal: ApiError | None = None
        self._late: asyncio.TimerHandle | None = None
        self._stuck: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Nobody may stay silent for long."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        self._expect_by(self.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._expect_by(None)
        self._unstick()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a head that is not complete count, however they are cut."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES + MAX_URL_BYTES + _SLACK_BYTES:
                self._refuse(headers_too_large())

    def on_message_begin(self) -> None:
        """A request's first byte."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        if self._late is None:
            self._expect_by(self.head_s)

    def on_url(self, url: bytes) -> None:
        """A part of it. Raises ApiError, which the parser turns into a refusal."""
        if len(self.url) + len(url) > MAX_URL_BYTES:
            self._refusal = url_too_long()
            raise self._refusal
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header. Raises ApiError, which the parser turns into a refusal."""
        if len(self.headers) >= MAX_HEADERS:
            self._refusal = too_many_headers()
            raise self._refusal
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there: how long the body may take is the application's decision."""
        self._in_head = False
        self._expect_by(None)
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The whole request is there."""
        super().on_message_complete()
        self._expect_by(None)

    def on_response_complete(self) -> None:
        """Answered. What is left of the body must not come for ever."""
        unread = self.cycle is not None and self.cycle.response_complete and self.cycle.more_body
        super().on_response_complete()
        if unread and not self.transport.is_closing():
            self._expect_by(self.head_s)

    def pause_writing(self) -> None:
        """Buffers are full."""
        super().pause_writing()
        self._unstick()
        self._stuck = self.loop.call_later(self.write_s, self._cut)

    def resume_writing(self) -> None:
        """The client has read."""
        super().resume_writing()
        self._unstick()

    def send_400_response(self, msg: str) -> None:
        """What the parser could not read, or was made to refuse."""
        self._refuse(self._refusal or ApiError(400, msg, code="invalid_http"))

    def _refuse(self, error: ApiError) -> None:
        self._in_head = False
        body = json.dumps(error.body(), separators=(",", ":")).encode()
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    def _expect_by(self, seconds: float | None) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = None if seconds is None else self.loop.call_later(seconds, self._too_late)

    def _too_late(self) -> None:
        self._late = None
        if self._in_head:
            self._refuse(head_timeout(self.head_s))
        else:
            self.transport.close()

    def _unstick(self) -> None:
        if self._stuck is not None:
            self._stuck.cancel()
            self._stuck = None

    def _cut(self) -> None:
        LOG.warning("a client has read nothing for %g s: its connection is cut", self.write_s)
        self._stuck = None
        self.transport.abort()
