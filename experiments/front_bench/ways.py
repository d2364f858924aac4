"""The ways into a cluster, each asked by one client on one event loop. Only what they tell is looked at, not its words.

Starting them is `experiments.front_bench.session`'s work, when to ask what `experiments.front_bench.measure`'s.
"""

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from actors.front.coordinator_client import CoordinatorClient
from experiments.engine_bench.failures import BenchError
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, Sampling, Submit
from protos.outputs import is_last

ENGINE = "engine"
_DONE = b"data: [DONE]\n\n"
_MAX_ERROR_CHARS = 300
_IDLE_S = 2.0  # less than any server keeps a connection, so that none is closed just as it is used again


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One request: a chat message, the same as `token_ids`, and a salt that shares no cached prefix with others."""

    text: str
    token_ids: Sequence[int]
    output_len: int
    salt: str


@dataclass(frozen=True, slots=True)
class Told:
    """Seconds from sending to the first token, or to the first byte that came of it, and to the end."""

    first_s: float
    whole_s: float


class Way(Protocol):
    """A way into the cluster."""

    name: str

    async def ask(self, wish: Wish) -> Told:
        """One request to its end. Raises BenchError where the answer is not as long as wished."""
        ...

    async def roundtrip(self) -> float | None:
        """Seconds of the least that can be asked this way; None where there is no such thing."""
        ...


class EngineWay:
    """Straight to a coordinator."""

    name = ENGINE

    def __init__(self, client: CoordinatorClient) -> None:
        self._client = client
        self._ids = itertools.count(1)

    async def ask(self, wish: Wish) -> Told:
        """Raises BenchError or CoordinatorLost."""
        submit = Submit(
            request_id=next(self._ids),
            prompt_token_ids=wish.token_ids,
            max_tokens=wish.output_len,
            ignore_eos=True,
            cache_salt=wish.salt.encode(),
            sampling=Sampling(temperature=0.0, top_p=1.0, repetition_penalty=1.0, seed=1),
        )
        began_s, first_s, num_tokens = time.perf_counter(), 0.0, 0
        async for output in self._client.generate(submit):
            first_s = first_s or time.perf_counter() - began_s
            num_tokens += len(output.token_ids)
            if is_last(output) and output.finish_reason != FINISH_REASON_LENGTH:
                raise BenchError(f"the cluster ended a sequence early: {output.error or output.finish_reason}")
        _check_length(self.name, num_tokens, wish)
        return Told(first_s, time.perf_counter() - began_s)

    async def roundtrip(self) -> float | None:
        """Nothing is lesser than a request."""
        return None


def open_session() -> aiohttp.ClientSession:
    """For `HttpWay`s: as many connections as there are requests at one time."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_S))


class HttpWay:
    """POST /v1/chat/completions as a stream; connections are kept."""

    def __init__(self, name: str, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self.name = name
        self._session = session
        self._url = url
        self._model = model

    async def ask(self, wish: Wish) -> Told:
        """Raises BenchError."""
        try:
            return await self._ask(wish)
        except (aiohttp.ClientError, OSError) as error:
            raise BenchError(f"{self.name} gave no whole answer: {error or type(error).__name__}") from None

    async def _ask(self, wish: Wish) -> Told:
        body = json.dumps(self._body(wish)).encode()
        began_s, first_s = time.perf_counter(), 0.0
        last = b""
        url, headers = f"{self._url}/v1/chat/completions", {"Content-Type": "application/json"}
        async with self._session.post(url, data=body, headers=headers) as response:
            if response.status != 200:
                raise BenchError(f"{self.name} answers {response.status}: {(await response.text())[:_MAX_ERROR_CHARS]}")
            async for piece in response.content.iter_any():
                first_s = first_s or time.perf_counter() - began_s
                last = (last + piece)[-4096:]
        whole_s = time.perf_counter() - began_s
        _check_length(self.name, _num_tokens(self.name, last), wish)
        return Told(first_s, whole_s)

    async def token_ids(self, text: str) -> list[int]:
        """The message as the model reads it. Raises BenchError."""
        body = {"model": self._model, "messages": [{"role": "user", "content": text}]}
        async with self._session.post(f"{self._url}/tokenize", json=body) as response:
            answer = await response.json()
        if response.status != 200:
            raise BenchError(f"{self.name} cannot tokenize a message: {str(answer)[:_MAX_ERROR_CHARS]}")
        return [int(token) for token in answer["tokens"]]

    async def roundtrip(self) -> float | None:
        """GET /version."""
        began_s = time.perf_counter()
        async with self._session.get(f"{self._url}/version") as response:
            await response.read()
        return time.perf_counter() - began_s

    def _body(self, wish: Wish) -> dict[str, Any]:
        return {
            "model": self._model,
            "messages": [{"role": "user", "content": wish.text}],
            "max_completion_tokens": wish.output_len,
            "temperature": 0,
            "ignore_eos": True,
            "cache_salt": wish.salt,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def _num_tokens(name: str, end: bytes) -> int:
    """Tokens of an answer by its last events. Raises BenchError where it has no proper end."""
    events = [one for one in end.removesuffix(_DONE).split(b"\n") if one.startswith(b"data: ")]
    if not end.endswith(_DONE) or not events:
        raise BenchError(f"{name} ended a stream without [DONE]")
    last = json.loads(events[-1].removeprefix(b"data: "))
    if not last.get("usage"):
        raise BenchError(f"{name} ended a stream without its usage: {str(last)[:_MAX_ERROR_CHARS]}")
    return int(last["usage"]["completion_tokens"])


def _check_length(name: str, num_tokens: int, wish: Wish) -> None:
    if num_tokens != wish.output_len:
        raise BenchError(f"{name} gave {num_tokens} tokens, not {wish.output_len}")
