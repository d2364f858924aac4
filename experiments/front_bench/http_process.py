"""The front door behind uvicorn in a process of its own, without Ray: `python -m experiments.front_bench.http_process`.

Reads where the cluster is from its first line of input, answers with its URL, and serves until its input ends.
"""

import asyncio
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn

from actors.channels import WireCredentials
from actors.front.bounded_http import BoundedHttp
from actors.front.coordinator_client import CoordinatorClient
from actors.front.front_door import FrontLimits, load_front
from actors.front.http_app import create_app
from actors.supervision.launch import Endpoints
from experiments.engine_bench.peers.child import Handler, Request, serve
from experiments.engine_bench.peers.process import JsonProcess

START_TIMEOUT_S = 60.0


def start_http_process(endpoints: Endpoints, request_timeout_s: float, max_requests: int) -> JsonProcess:
    """The child; `facts["url"]` is where it serves. Raises BenchError."""
    request = {
        "coordinators": list(endpoints.coordinators),
        "token": endpoints.credentials.token,
        "model_path": endpoints.model_path,
        "model": endpoints.served_model_name,
        "max_model_len": endpoints.max_model_len,
        "system_fingerprint": endpoints.system_fingerprint,
        "request_timeout_s": request_timeout_s,
        "max_requests": max_requests,
    }
    return JsonProcess("the front door without Ray", [sys.executable, "-m", __spec__.name], request)


def start(request: Request) -> tuple[dict[str, Any], Handler]:
    """Serves on a thread from now on, and refuses every further request. Raises TimeoutError."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    begun = threading.Event()
    threading.Thread(target=lambda: asyncio.run(_serve(request, listener, begun)), name="http", daemon=True).start()
    if not begun.wait(START_TIMEOUT_S):
        raise TimeoutError(f"HTTP did not start within {START_TIMEOUT_S:g} s")
    return {"url": f"http://127.0.0.1:{listener.getsockname()[1]}"}, _refuse


async def _serve(request: Request, listener: socket.socket, begun: threading.Event) -> None:
    front = load_front(
        Path(request["model_path"]),
        [CoordinatorClient(one, WireCredentials(request["token"])) for one in request["coordinators"]],
        model_id=request["model"],
        max_model_len=request["max_model_len"],
        system_fingerprint=request["system_fingerprint"],
        request_timeout_s=request["request_timeout_s"],
        limits=FrontLimits(max_requests=request["max_requests"]),
    )

    async def tell() -> None:
        begun.set()

    app = create_app(front, background=tell)
    await uvicorn.Server(uvicorn.Config(app, log_level="warning", http=BoundedHttp)).serve(sockets=[listener])


def _refuse(_: Request) -> dict[str, Any]:
    raise ValueError("there is nothing to ask but over HTTP")


if __name__ == "__main__":
    serve(start)
