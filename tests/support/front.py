"""Front doors for tests: over scripted coordinators, called in-process or served on a port of their own."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import uvicorn
from fastapi import FastAPI

from actors.front.bounded_http import BoundedHttp
from actors.front.coordinator_pool import Coordinator, CoordinatorPool
from actors.front.front_door import FrontDoor
from actors.front.http_app import create_app
from actors.front.metrics import FrontMetrics
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import load_tokenizer
from model.text.tokenizer_info import tokenizer_info
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

MODEL = "tiny"
VOCAB = 300
CONTEXT = 512

Result = TypeVar("Result")


def run(work: Awaitable[Result], timeout_s: float = 240.0) -> Result:
    """Runs a test's coroutine, not for ever; the bound is for one that hangs, on the slowest of machines."""
    return asyncio.run(_bounded(work, timeout_s))


async def _bounded(work: Awaitable[Result], timeout_s: float) -> Result:
    async with asyncio.timeout(timeout_s):
        return await work


def make_front(model_dir: Path, *coordinators: Coordinator, **changes: Any) -> FrontDoor:
    """A front door with the byte tokenizer, whose clock stands still and whose seeds are 1000."""
    if not (model_dir / "tokenizer.json").exists():
        write_byte_tokenizer(model_dir, VOCAB)
    tokenizer = load_tokenizer(model_dir)
    template = changes.get("chat_template") or ChatTemplate.load(model_dir, tokenizer)
    pool = changes.get("coordinators") or CoordinatorPool(coordinators)
    parts: dict[str, Any] = {
        "model_id": MODEL,
        "system_fingerprint": "fp_test",
        "created": 1_700_000_000,
        "max_model_len": CONTEXT,
        "vocab_size": VOCAB,
        "eos_ids": frozenset({EOS_ID}),
        "request_timeout_s": 600.0,
        "tokenizer": tokenizer,
        "chat_template": template,
        "tokenizer_info": tokenizer_info(model_dir, tokenizer, template),
        "coordinators": pool,
        "metrics": FrontMetrics(MODEL, lambda: pool.last_snapshots, lambda: pool.resubmissions),
        "wall_clock": lambda: 1_800_000_000.0,
        "draw_seed": lambda: 1000,
    }
    return FrontDoor(**{**parts, **changes})


def client_of(front: FrontDoor) -> httpx2.AsyncClient:
    """A client that calls the application in-process."""
    transport = httpx2.ASGITransport(app=create_app(front))
    return httpx2.AsyncClient(transport=transport, base_url="http://octavo")


Request = Callable[[httpx2.AsyncClient], Awaitable[Result]]


def ask(front: FrontDoor, request: Request[Result]) -> Result:
    """Runs one request, or a few, against the application in-process."""

    async def work() -> Result:
        async with client_of(front) as client:
            return await request(client)

    return run(work())


def post(front: FrontDoor, path: str, **body: Any) -> httpx2.Response:
    """One POST of a JSON body, with the model's name unless given."""
    return ask(front, lambda client: client.post(path, json={"model": MODEL, **body}))


@asynccontextmanager
async def serving(app: FastAPI, http: type[BoundedHttp] = BoundedHttp) -> AsyncIterator[str]:
    """The application behind uvicorn on a free port of the loopback; gives its URL.

    A client may be silent between two requests for as long as its machine makes it.
    """
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    waits: dict[str, Any] = {"timeout_keep_alive": 600, "timeout_graceful_shutdown": 5}
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", http=http, **waits))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await serving
        listener.close()
