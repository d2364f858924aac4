"""One streamed completion over HTTP, written down token by token as it arrives. Failures become the stream's error.

When to ask what is `tests.chaos.player`'s; what the record means is `tests.chaos.figures`'s.
"""

import asyncio
import json
import time
from collections.abc import Mapping
from typing import Any

import aiohttp

from experiments.serving.results import RequestFailed
from experiments.serving.sse import EventReader
from tests.chaos.figures import Stream

DONE = b"[DONE]"
MAX_ERROR_CHARS = 120


async def ask(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], stream: Stream) -> None:
    """Asks and fills `stream` to its end. Raises nothing that a server or a network can cause."""
    try:
        await _read(session, url, body, stream)
    except TimeoutError:
        stream.error = "no full answer in time"
    except RequestFailed as error:
        stream.error = str(error)[:MAX_ERROR_CHARS]
    except (aiohttp.ClientError, OSError, ValueError, KeyError) as error:
        stream.error = f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
    except asyncio.CancelledError:
        stream.error = "still not answered when the trial was over"
        raise
    finally:
        stream.ended_s = time.monotonic()


async def _read(session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], stream: Stream) -> None:
    reader, finish, done = EventReader(), "", False
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RequestFailed(f"http_{response.status}", (await response.text())[:MAX_ERROR_CHARS])
        async for piece in response.content.iter_any():
            now_s = time.monotonic()
            for event in reader.push(piece):
                if event.strip() == DONE:
                    done = True
                else:
                    finish = take(stream, json.loads(event), now_s) or finish
    if not done:
        raise RequestFailed("cut", "the stream ended before [DONE]")
    if finish != "length":
        raise RequestFailed("finish", f"the stream ended with finish_reason {finish!r}")


def take(stream: Stream, chunk: Mapping[str, Any], now_s: float) -> str:
    """Writes a chunk's tokens down and returns its finish reason. Raises RequestFailed for an error event."""
    if chunk.get("error"):
        error = chunk["error"]
        raise RequestFailed("server_error", str(error.get("message", error)))
    finish = ""
    for choice in chunk["choices"]:
        tokens = choice["token_ids"]
        stream.tokens += tokens
        stream.times_s += [now_s] * len(tokens)
        if choice.get("logprobs"):
            stream.logprobs += choice["logprobs"]["token_logprobs"]
        finish = choice.get("finish_reason") or finish
    return finish
