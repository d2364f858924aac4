"""The HTTP side: one aiohttp session, one streamed request at a time per call, every failure turned into a result.

Answers are read by `stream_record`; how many requests go out and when is `load`'s. aiohttp, since its C parser leaves
the machine's cores to a server that shares them.
"""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from experiments.serving.prompts import Prompt
from experiments.serving.results import RequestFailed, RequestResult
from experiments.serving.settings import BenchError, ServeSettings
from experiments.serving.sse import EventReader
from experiments.serving.stream_record import StreamRecord

CONNECT_TIMEOUT_S = 10.0
PROBE_TIMEOUT_S = 10.0
IDLE_CONNECTION_S = 2.0  # less than any server keeps one, so that none is closed just as it is used again
MAX_ERROR_BYTES = 4096
MAX_MODELS_BYTES = 2**20


class Client:
    """Speaks to the server of `settings` as `model`."""

    def __init__(self, session: aiohttp.ClientSession, settings: ServeSettings, model: str) -> None:
        self._session = session
        self._settings = settings
        self._model = model
        self._url = settings.base_url + settings.endpoint

    async def send(self, prompt: Prompt) -> RequestResult:
        """Sends one prompt and reads its answer to the end. Never raises for what a server or a network can do."""
        body = json.dumps(request_body(self._settings, self._model, prompt)).encode()
        start_s = time.perf_counter()
        try:
            return await self._stream(body, start_s)
        except RequestFailed as error:
            return RequestResult(start_s=start_s, error=str(error))
        except TimeoutError:
            reason = RequestFailed("timeout", f"no full answer within {self._settings.timeout_s:g} s")
        except (aiohttp.ClientError, OSError) as error:
            reason = RequestFailed("connection", str(error) or type(error).__name__)
        return RequestResult(start_s=start_s, error=str(reason))

    async def _stream(self, body: bytes, start_s: float) -> RequestResult:
        record, reader = StreamRecord(is_chat=self._settings.is_chat), EventReader()
        async with self._session.post(self._url, data=body, headers={"Content-Type": "application/json"}) as response:
            if response.status != 200:
                raise RequestFailed(f"http_{response.status}", await _error_message(response))
            async for piece in response.content.iter_any():
                at_s = time.perf_counter() - start_s
                for event in reader.push(piece):
                    record.add(event, at_s)
        return record.result(start_s)


def request_body(settings: ServeSettings, model: str, prompt: Prompt) -> dict[str, Any]:
    """The JSON of one request."""
    body: dict[str, Any] = {
        "model": model,
        "temperature": settings.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.ignores_eos:
        body["ignore_eos"] = True
    if settings.is_chat:
        content = {"role": "user", "content": prompt}
        return {**body, "messages": [content], "max_completion_tokens": settings.output_len}
    return {**body, "prompt": prompt, "max_tokens": settings.output_len}


@asynccontextmanager
async def open_session(settings: ServeSettings, api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session whose only queue is the caller's. Proxies of the environment are not used: they would be measured."""
    timeout = aiohttp.ClientTimeout(total=settings.timeout_s, sock_connect=CONNECT_TIMEOUT_S)
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_CONNECTION_S)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, headers=headers) as session:
        yield session


async def find_model(session: aiohttp.ClientSession, settings: ServeSettings) -> str:
    """The model to name in requests: the one asked for if the server has it, else the first that it lists.

    Raises BenchError when nobody answers there, or the answer is no list of models, or the model is not on it.
    """
    url = f"{settings.base_url}/v1/models"
    try:
        timeout = aiohttp.ClientTimeout(total=PROBE_TIMEOUT_S)
        async with session.get(url, timeout=timeout) as response:
            body = await _read(response, MAX_MODELS_BYTES)
            status = response.status
    except (TimeoutError, aiohttp.ClientError, OSError) as error:
        raise BenchError(f"URL is {settings.url}, but nothing answers there: {error or type(error).__name__}") from None
    served = _model_ids(body) if status == 200 else []
    if not served:
        raise BenchError(f"URL is {settings.url}, but {url} answers {status} and no list of models")
    if settings.model not in (None, *served):
        raise BenchError(f"--model is {settings.model!r}, but the server has {', '.join(served[:10])}")
    return settings.model or served[0]


def _model_ids(body: bytes) -> list[str]:
    try:
        return [str(card["id"]) for card in json.loads(body)["data"]]
    except (ValueError, TypeError, KeyError, RecursionError):
        return []


async def _error_message(response: aiohttp.ClientResponse) -> str:
    """What an error response says, in OpenAI's form or in any."""
    body = await _read(response, MAX_ERROR_BYTES)
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return body.decode("utf-8", "replace") or response.reason or ""


async def _read(response: aiohttp.ClientResponse, most: int) -> bytes:
    """The body's first `most` bytes; the rest is not read."""
    body = b""
    async for piece in response.content.iter_any():
        body += piece
        if len(body) >= most:
            break
    return body[:most]
