"""Requests that nobody should send, as bytes for a socket: each a function of a seed and a number.

Most are a good request with a few things wrong; the rest are wrong paths and methods, headers that lie, and noise.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

from tests.fuzz.front_targets import CHAT, COMPLETION
from tests.fuzz.mutation import damaged
from tests.fuzz.target import Target

MODEL = "tiny"
PATHS = (
    *("/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/tiny", "/health", "/metrics", "/"),
    *("/v1/completions/", "/v1//completions", "/V1/COMPLETIONS", "/v1/models/..%2f..%2fetc", "/v1/models/%00", "/%ff"),
    *("/v1/embeddings", "/docs", "/openapi.json", "/v1/completions?x=%00", "/v1/models/" + "x" * 5000, "/-/healthz"),
)
METHODS = ("GET", "POST", "PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE", "post", "BREW", "")
_HEADERS: tuple[tuple[str, str], ...] = (
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", ""),
    ("Content-Encoding", "gzip"),
    ("Last-Event-ID", "1-x"),
    ("Last-Event-ID", f"1-{'a' * 16}-{'b' * 8}-{'c' * 16}-65f0c0de-{'d' * 24}-1f-3o"),
    ("Last-Event-ID", "9" * 3000),
    ("Authorization", "Bearer \xff\xfe"),
    ("Accept", "application/xml"),
    ("X-Request-Id", "x" * 4000),
    ("Expect", "200-maybe"),
    ("Cookie", "a=b; " * 500),
    ("Host", "\x00"),
    ("Origin", "http://evil"),
    ("X-Empty", ""),
)


@dataclass(frozen=True)
class Asked:
    """What goes over one connection. `well_formed`: HTTP itself is kept, so that an answer must come.

    `leave_after` bytes of the answer the client is gone; None: it reads all.
    """

    data: bytes
    well_formed: bool
    leave_after: int | None = None

    @property
    def kept(self) -> bool:
        """Whether the connection is as good as new afterwards."""
        return self.well_formed and self.leave_after is None


def _good(base: dict[str, Any], **changes: Any) -> bytes:
    return json.dumps({**base, "model": MODEL, "max_tokens": 2, **changes}).encode()


def _never(data: bytes) -> object:
    raise NotImplementedError


_BODIES = {
    "/v1/completions": (_good(COMPLETION), _good({"prompt": "hello"}), _good({"prompt": [5, 6, 7]}, stream=True)),
    "/v1/chat/completions": (_good(CHAT), _good({"messages": [{"role": "user", "content": "hi"}]}, stream=True)),
}
_TARGETS = {
    path: Target(
        name=path,
        decode=_never,
        errors=(),
        seeds=seeds,
        is_json=True,
        words=(b"null", b"[", b"]", b"{", b'"', b"\\ud800", b"1e999", b"-1", b"NaN", b'"stop":', b'"n": 999,'),
    )
    for path, seeds in _BODIES.items()
}


def asked(seed: int, number: int) -> Asked:
    """Request `number` of a campaign."""
    chance = random.Random((seed << 40) ^ number ^ 0x5EED)
    path = chance.choice(list(_BODIES))
    kind = chance.randrange(20)
    if kind < 12:
        return Asked(request("POST", path, damaged(_TARGETS[path], seed, number), keep=True), True)
    body = chance.choice(_BODIES[path])
    if kind == 12:
        return Asked(request("POST", path, body, dict([chance.choice(_HEADERS)])), False)
    if kind == 13:
        return Asked(request(chance.choice(METHODS), chance.choice(PATHS), b""), False)
    if kind == 14:
        return Asked(request("POST", chance.choice(PATHS), body, keep=True), True)
    if kind == 15:
        return Asked(chance.randbytes(chance.choice((1, 40, 5000))) + b"\r\n\r\n", False)
    if kind == 16:
        return Asked(_lying(chance, path, body), False, leave_after=0)
    if kind == 17:
        headers = {f"X-{n}": "y" * 50 for n in range(chance.choice((50, 400)))}
        return Asked(request("POST", path, body, headers), False)
    if kind == 18:
        whole = bytearray(request("POST", path, body))
        whole[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        return Asked(bytes(whole), False, leave_after=0 if chance.random() < 0.5 else None)
    streamed = _good({"prompt": "hello"}, stream=True, max_tokens=60, ignore_eos=True, n=3)
    return Asked(request("POST", "/v1/completions", streamed), True, leave_after=chance.choice((0, 1, 300, 2000)))


def _lying(chance: random.Random, path: str, body: bytes) -> bytes:
    """A body that is shorter than it is said to be, or in chunks that are none."""
    kind = chance.randrange(4)
    if kind == 0:
        return request("POST", path, body, {"Content-Length": str(len(body) + 50)})
    if kind == 1:
        return request("POST", path, body, {"Content-Length": chance.choice(("-1", "99999999999999999999", "x"))})
    if kind == 2:
        return request("POST", path, b"zz\r\n" + body, {"Transfer-Encoding": "chunked"})
    return request("POST", path, body, {"Content-Length": "1", "Transfer-Encoding": "chunked"})


def request(method: str, path: str, body: bytes, headers: dict[str, str] | None = None, *, keep: bool = False) -> bytes:
    """One request as bytes; `headers` replace those that it would have. `keep`: the connection is to be kept."""
    said = {"Host": "octavo", "Content-Type": "application/json", "Connection": "keep-alive" if keep else "close"}
    said |= {} if headers is not None and "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
    said |= headers or {}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in said.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
