"""A client that wants its whole answer: it streams, and when its connection is cut it goes on with `Last-Event-ID`.

For tests that break things under streams. It keeps the tokens in order, when they came, and how often it was cut.
"""

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx2 as httpx

RETRY_S = 0.1
TRYING_S = 240.0
_COME_BACK = (429, 502, 503)


@dataclass
class Told:
    """One answer: its token ids, when each event came (monotonic seconds), and what went wrong on the way.

    `failed` is why there is no whole answer. `refused` lists statuses that said to come back later.
    """

    token_ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    finish_reason: str | None = None
    cuts_s: list[float] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    failed: str | None = None
    last_event_id: str | None = None

    @property
    def worst_gap_s(self) -> float:
        """The longest time between two events."""
        return max((after - before for before, after in zip(self.times_s, self.times_s[1:], strict=False)), default=0.0)


def stream_completion(url: str, told: Told, *, resume: bool = True, **body: Any) -> None:
    """Reads one completion into `told`; `url` is the base URL without a path. Raises nothing: see `Told.failed`."""
    asked = {"stream": True, "return_token_ids": True, **body}
    give_up_at = time.monotonic() + TRYING_S
    while told.failed is None:
        try:
            if _read(f"{url}/v1/completions", asked, told):
                return
        except (httpx.HTTPError, OSError) as error:
            told.cuts_s.append(time.monotonic())
            if not resume:
                told.failed = f"cut: {error!r}"
        if time.monotonic() > give_up_at:
            told.failed = f"not whole after {TRYING_S:g} s: {len(told.cuts_s)} cuts, refused with {told.refused}"
        time.sleep(RETRY_S)


def stream_all(url: str, bodies: Sequence[dict[str, Any]], answers: Sequence[Told]) -> ThreadPoolExecutor:
    """Begins to read all at once, a thread each; leaving the pool's block waits for them."""
    pool = ThreadPoolExecutor(len(bodies))
    for body, told in zip(bodies, answers, strict=True):
        pool.submit(stream_completion, url, told, **body)
    return pool


def _read(url: str, body: dict[str, Any], told: Told) -> bool:
    """One connection; True when nothing more comes. Raises httpx.HTTPError when it is cut."""
    headers = {} if told.last_event_id is None else {"Last-Event-ID": told.last_event_id}
    with httpx.stream("POST", url, json=body, headers=headers, timeout=120) as response:
        if response.status_code in _COME_BACK:
            told.refused.append(response.status_code)
            return False
        if response.status_code != 200:
            response.read()
            told.failed = f"{response.status_code}: {response.text[:500]}"
            return True
        for line in response.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                told.last_event_id = value
            elif value == "[DONE]":
                return True
            elif name == "data":
                _take(json.loads(value), told)
                if told.failed is not None:
                    return True
    raise httpx.RemoteProtocolError("the stream ended without [DONE]")


def _take(data: dict[str, Any], told: Told) -> None:
    if "error" in data:
        told.failed = f"an error in the stream: {data['error']}"
        return
    told.times_s.append(time.monotonic())
    for choice in data["choices"]:
        told.token_ids += choice["token_ids"]
        told.finish_reason = choice["finish_reason"]
