"""A peer's process without an engine, for tests of what is said to such processes: `python -m tests.support.fake_peer`.

It answers prompts with tokens that count up from each prompt's last one, one every "second".
"""

import ctypes
import os
import sys
from typing import Any

from experiments.engine_bench.peers.child import Handler, Request, serve


def start(request: Request) -> tuple[dict[str, Any], Handler]:
    """{"model": "broken"} does not load."""
    if request["model"] == "broken":
        raise ValueError("no such model")
    print("chatter of a library")
    ctypes.CDLL(None).puts(b"chatter of a C library")
    return {"facts": {"library": "fake 1.0", "threads": request["threads"]}}, handle


def handle(request: Request) -> dict[str, Any]:
    """Prompt [7] refuses, prompt [8] dies, all others are answered."""
    prompts, length = request["prompts"], request["output_len"]
    if prompts == [[7]]:
        raise RuntimeError("seven is refused")
    if prompts == [[8]]:
        print("eight is fatal", file=sys.stderr, flush=True)
        os._exit(3)
    return {
        "tokens": [[prompt[-1] + 1 + step for step in range(length)] for prompt in prompts],
        "arrivals_s": [[1.0 + step for step in range(length)] for _ in prompts],
        "facts": {"answered": len(prompts)},
    }


if __name__ == "__main__":
    serve(start)
