"""Golden streams: eight requests whose answers are known, asked again and again while others misbehave.

Half are greedy and half seeded, half chats and half completions; what is compared is every text, every token's
log-probability and the end, not how many events they came in, which depends on the load.
"""

import asyncio
import contextlib
import json
from typing import Any

from tests.fuzz.http_client import ANSWER_S, read_body, read_head
from tests.fuzz.http_requests import MODEL, request

GOLDENS = 8
GOLDEN_TOKENS = 24
_FULL_PAUSE_S = 0.5


class Busy(Exception):
    """A full queue is full for goldens too."""


class Golden:
    """Stream `index`, over a connection that it keeps."""

    def __init__(self, host: str, port: int, index: int) -> None:
        self._place = (host, port)
        self._data = _asking(index)
        self._kept: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self) -> list[Any]:
        """Text, log-probabilities of all tokens, the reason of the end; or what was wrong. Raises Busy."""
        was_used = self._kept is not None
        said = await self._ask()
        if said is None and was_used:  # the other side had ended the connection, idle for long, before it had read this
            said = await self._ask()
        return ["the connection ended without an answer"] if said is None else said

    async def _ask(self) -> list[Any] | None:
        """None: the connection ended before an answer."""
        begun = False
        try:
            self._kept = self._kept or await asyncio.open_connection(*self._place, limit=1 << 20)
            reader, writer = self._kept
            async with asyncio.timeout(ANSWER_S):
                writer.write(self._data)
                status, fields = await read_head(reader)
                begun = True
                body = b"".join([piece async for piece in read_body(reader, fields)])
        except (OSError, EOFError, TimeoutError) as error:
            self.close()
            silent = isinstance(error, TimeoutError)
            return [f"{type(error).__name__}: {error}"] if begun or silent else None
        if status == 429:
            raise Busy
        return _said(body) if status == 200 else [status, body.decode(errors="replace")]

    async def keep_asking(self, expected: list[Any], stopping: asyncio.Event, report: Any) -> None:
        """Until the event: counts streams, and those that said anything else than expected."""
        while not stopping.is_set():
            try:
                said = await self.ask()
            except Busy:
                report.golden_refused += 1
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_FULL_PAUSE_S):
                        await stopping.wait()
                continue
            report.golden_streams += 1
            if said != expected:
                report.golden_wrong += 1
                report.show(f"golden said {str(said)[:400]}, expected {str(expected)[:400]}")

    def close(self) -> None:
        """Drops the connection."""
        if self._kept is not None:
            self._kept[1].transport.abort()
            self._kept = None


def _asking(index: int) -> bytes:
    body: dict[str, Any] = {"model": MODEL, "stream": True, "max_tokens": GOLDEN_TOKENS, "seed": index}
    body |= {"temperature": 0 if index % 2 else 0.9, "ignore_eos": True}
    if index % 4 < 2:
        return request(
            "POST", "/v1/completions", _json({**body, "prompt": f"golden {index}", "logprobs": 2}), keep=True
        )
    messages = [{"role": "user", "content": f"golden {index}"}]
    return request("POST", "/v1/chat/completions", _json({**body, "messages": messages, "logprobs": True}), keep=True)


def _json(body: dict[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _said(body: bytes) -> list[Any]:
    """All that the events of one stream say together."""
    text, places, end = "", [], None
    lines = [line.removeprefix(b"data: ") for line in body.split(b"\n") if line.startswith(b"data: ")]
    if not lines or lines[-1] != b"[DONE]":
        return ["the stream was cut", body[-300:].decode(errors="replace")]
    for line in lines[:-1]:
        event = json.loads(line)
        if "error" in event:
            return [event]
        for choice in event["choices"]:
            text += choice.get("text") or choice.get("delta", {}).get("content") or ""
            places += _logprobs(choice.get("logprobs"))
            end = choice["finish_reason"] or end
    return [text, places, end]


def _logprobs(said: dict[str, Any] | None) -> list[float]:
    if not said:
        return []
    return said["token_logprobs"] if "token_logprobs" in said else [one["logprob"] for one in said["content"]]
