"""A server that answers completions without a model and lies on demand: what the suite must catch, it is shown.

Its tokens are a function of the request's body, so that two runs agree; `Script` says how it misbehaves.
"""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from tests.chaos.clusters import Counters, NotWhole, Process

STEP_S = 0.02
"""Long beside what a token costs here: how fast tokens come is to be the script's affair, not the machine's."""


@dataclass(slots=True)
class Script:
    """From now on: another token in each answer, a pause before the next token, an answer that is cut, a refusal.

    `misdeeds` counts what was done so.
    """

    wrong: bool = False
    twice: bool = False
    pause_s: float = 0.0
    cut: bool = False
    error: bool = False
    status: int = 200
    misdeeds: int = 0


class ScriptedCluster:
    """See `tests.chaos.clusters.Cluster`. It is whole unless `whole` is False."""

    def __init__(self, url: str, script: Script) -> None:
        self.url = url
        self.model_id = "scripted"
        self.script = script
        self.whole = True
        self.calls = 0
        self.extra = 0

    async def replicas(self) -> Sequence[Process]:
        return [Process("expert-0-r0", 0, "ready", (0,))]

    async def coordinators(self) -> Sequence[Process]:
        return []

    async def counters(self) -> Counters:
        return Counters(self.calls, self.extra)

    async def wait_whole(self, timeout_s: float = 1.0) -> None:
        if not self.whole:
            raise NotWhole("scripted to be broken")


@asynccontextmanager
async def scripted_cluster() -> AsyncIterator[ScriptedCluster]:
    """A server on a free port of the loopback."""
    script = Script()

    async def completions(request: web.Request) -> web.StreamResponse:
        return await _answer(request, script)

    app = web.Application()
    app.router.add_post("/v1/completions", completions)
    runner = web.AppRunner(app, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield ScriptedCluster(f"http://{host}:{port}", script)
    finally:
        await runner.cleanup()


def tokens_of(body: dict[str, Any]) -> list[int]:
    """What the scripted model says to a request."""
    asked = {name: value for name, value in body.items() if name != "cache_salt"}  # which changes no token
    seed = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).digest()
    return [seed[place % len(seed)] for place in range(body["max_tokens"])]


async def _answer(request: web.Request, script: Script) -> web.StreamResponse:
    body = await request.json()
    if script.status != 200:
        script.misdeeds += 1
        return web.json_response({"error": {"message": "scripted"}}, status=script.status)
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    tokens = tokens_of(body)
    for place, token in enumerate(tokens):
        await asyncio.sleep(STEP_S)
        doubled = script.twice and place == 1
        script.misdeeds += bool(script.wrong or script.pause_s or script.cut or script.error or doubled)
        if script.pause_s:
            await asyncio.sleep(script.pause_s)
        if script.cut:
            request.transport.abort()  # type: ignore[union-attr]
            return response
        if script.error:
            await response.write(b'data: {"error": {"message": "scripted"}}\n\n')
            break
        said = [token + script.wrong] * (2 if doubled else 1)
        finish = "length" if place == len(tokens) - 1 else None
        choice = {"token_ids": said, "finish_reason": finish, "logprobs": None}
        await response.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response
