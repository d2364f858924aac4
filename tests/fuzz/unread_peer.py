"""A hostile peer in a process of its own, which speaks HTTP/2 by hand: `python -m tests.fuzz.unread_peer JSON`.

It opens as many connections as it is told and as many streams on each as it may, sends as many bytes as the port lets
it, and grants none for answers. When nothing moves any more it prints a line of JSON with what it got rid of, and holds
on to all of it until its standard input ends.
"""

import asyncio
import json
import selectors
import socket
import struct
import sys
import time
from asyncio.subprocess import PIPE, Process
from dataclasses import dataclass, field
from typing import Any

from tests.support.expert_process import ROOT

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MAX_STREAMS, INITIAL_WINDOW = 3, 4
MOST_STREAMS = 1024
"""For a port that allows any number."""
OUT_BYTES = 1 << 18
STILL_S = 2.0
"""Nothing moves any more when nothing did for so long, unless more is expected: the other side may be slow."""


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame of HTTP/2."""
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def header_block(path: str, token: str) -> bytes:
    """What begins a call, each header as a literal without index."""
    fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x", "te": "trailers"}
    fields["content-type"] = "application/grpc"
    if token:
        fields["authorization"] = f"Bearer {token}"
    pairs = ((name.encode(), value.encode()) for name, value in fields.items())
    return b"".join(b"\x00" + bytes((len(n),)) + n + bytes((len(v),)) + v for n, v in pairs)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`message`, hexadecimal, is sent again and again on each stream, in frames of `frame_bytes`.

    A stream that the port ends makes room for another, for `longest_s` seconds at most. The port is expected to take
    `enough_bytes`, and given that time for them.
    """

    address: str
    path: str
    token: str = ""
    connections: int = 1
    message: str = ""
    frame_bytes: int = 16384
    enough_bytes: int = 0
    longest_s: float = 30.0


@dataclass
class Connection:
    """One connection and its windows, of bytes that the port still takes."""

    plan: Plan
    sock: socket.socket
    window: int = 65535
    initial: int = 65535
    most_streams: int = 0
    streams: dict[int, int] = field(default_factory=dict)
    closed: bool = False
    ended: int = 0
    sent: int = 0
    _next: int = 1
    _in: bytes = b""
    _out: bytearray = field(default_factory=bytearray)
    _at: dict[int, int] = field(default_factory=dict)

    def begin(self) -> None:
        """Says that this side takes no byte of an answer."""
        self._out += PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW, 0))

    def move(self, message: bytes) -> None:
        """Reads what there is, then sends what it may."""
        try:
            self._read()
            while len(self.streams) < self.most_streams and len(self._out) < OUT_BYTES and self.initial:
                self.streams[self._next] = self.initial
                self._out += frame(HEADERS, 4, self._next, header_block(self.plan.path, self.plan.token))
                self._next += 2
            for stream in list(self.streams):
                self._fill(stream, message)
            if self._out:
                del self._out[: self.sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:
            self.closed = True

    def _fill(self, stream: int, message: bytes) -> None:
        while (
            len(self._out) < OUT_BYTES and (room := min(self.streams[stream], self.window, self.plan.frame_bytes)) > 0
        ):
            at = self._at.get(stream, 0)
            piece = message[at : at + room]
            self._at[stream] = (at + len(piece)) % len(message)
            self._out += frame(DATA, 0, stream, piece)
            self.streams[stream] -= len(piece)
            self.window -= len(piece)
            self.sent += len(piece)

    def _read(self) -> None:
        try:
            while data := self.sock.recv(1 << 16):
                self._in += data
                self._take_frames()
            self.closed = True
        except BlockingIOError:
            pass

    def _take_frames(self) -> None:
        while len(self._in) >= 9 and len(self._in) >= 9 + (size := int.from_bytes(self._in[:3], "big")):
            kind, flags, stream = self._in[3], self._in[4], int.from_bytes(self._in[5:9], "big")
            payload, self._in = self._in[9 : 9 + size], self._in[9 + size :]
            self._on(kind, flags, stream, payload)

    def _on(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == SETTINGS and not flags & 1:
            self._settings(payload)
            self._out += frame(SETTINGS, 1, 0)
        elif kind == PING and not flags & 1:
            self._out += frame(PING, 1, 0, payload)
        elif kind == WINDOW_UPDATE and stream == 0:
            self.window += int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE and stream in self.streams:
            self.streams[stream] += int.from_bytes(payload, "big")
        elif (kind == RST_STREAM or (kind == HEADERS and flags & 1)) and self.streams.pop(stream, None) is not None:
            self.ended += 1
        elif kind == GOAWAY:
            self.closed = True

    def _settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == MAX_STREAMS:
                self.most_streams = min(value, MOST_STREAMS)
            elif key == INITIAL_WINDOW:
                self.streams = {stream: left + value - self.initial for stream, left in self.streams.items()}
                self.initial = value


def send_all(plan: Plan) -> tuple[list[Connection], dict[str, int]]:
    """Sends until nothing moves; the connections, still open, and what became of them."""
    host, port = plan.address.rsplit(":", 1)
    message = bytes.fromhex(plan.message) or b"\xff" * 65536
    connections = []
    for _ in range(plan.connections):
        connection = Connection(plan, socket.create_connection((host, int(port))))
        connection.sock.setblocking(False)
        connection.begin()
        connections.append(connection)
    began = moved = time.monotonic()
    before = (-1, -1)
    with selectors.DefaultSelector() as waiting:
        for connection in connections:
            waiting.register(connection.sock, selectors.EVENT_READ)
        while time.monotonic() - began < plan.longest_s and (
            time.monotonic() - moved < STILL_S or before[0] < plan.enough_bytes
        ):
            for connection in connections:
                if not connection.closed:
                    connection.move(message)
            now = (sum(one.sent for one in connections), sum(one.ended for one in connections))
            if now != before:
                before, moved = now, time.monotonic()
            else:
                waiting.select(0.01)
    facts = {
        "sent": before[0],
        "ended": before[1],
        "streams": sum(len(one.streams) for one in connections if not one.closed),
        "closed": sum(one.closed for one in connections),
    }
    return connections, facts


async def spawn(**plan: Any) -> tuple[Process, dict[str, int]]:
    """Starts the peer; what it got rid of. It holds on until `tests.fuzz.cluster_process.end`."""
    command = (sys.executable, "-m", "tests.fuzz.unread_peer", json.dumps(plan))
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdin=PIPE, stdout=PIPE)
    assert process.stdout is not None
    line = await process.stdout.readline()
    assert line, "the hostile peer ended before it had said anything"
    facts: dict[str, int] = json.loads(line)
    return process, facts


if __name__ == "__main__":
    _held, _facts = send_all(Plan(**json.loads(sys.argv[1])))
    print(json.dumps(_facts), flush=True)
    sys.stdin.read()
