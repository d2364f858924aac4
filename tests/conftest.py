"""What all tests share: an environment that is nobody's own, loops that may end, garbage that is its file's own.

One compute thread, no usage reports, a Ray that asks for its own token, no way out for what is meant for this machine.
Whoever starts the tests may have other values for these: with them clusters of other numerics would be waited for.
"""

import ast
import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings

_LOCAL = "127.0.0.1,localhost"

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="token",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    NO_PROXY=_LOCAL,
    no_proxy=_LOCAL,
)
for _name in [
    name
    for name in os.environ
    if name.startswith(("OTEL_", "OPENAI_")) or name in ("MKL_NUM_THREADS", "RAY_ADDRESS", "RAY_NAMESPACE")
]:
    del os.environ[_name]

if os.environ.get("OCTAVO_EXAMPLES") != "random":
    settings.load_profile("ci")  # the same examples everywhere: what fails here fails again, and on any machine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As a shell has it for what it starts in the background: processes of the tests would not hear of Ctrl-C either.
    signal.signal(signal.SIGINT, signal.default_int_handler)

_call_soon_threadsafe = asyncio.BaseEventLoop.call_soon_threadsafe


def _call_in_a_loop_that_lives(loop: Any, callback: Callable[..., Any], *args: Any, context: Any = None) -> Any:
    """gRPC's completion queue is the process's, and a call's last word may come when its test's loop is closed.

    The loop of the test that runs then is the one that would raise, though it is nobody's fault there.
    """
    if loop.is_closed() and str(getattr(callback, "__module__", "")).startswith("grpc._cython"):
        return None
    return _call_soon_threadsafe(loop, callback, *args, context=context)


asyncio.BaseEventLoop.call_soon_threadsafe = _call_in_a_loop_that_lives  # type: ignore[method-assign]

_parse = ast.parse


def _parse_in_peace(*args: Any, **options: Any) -> Any:
    """Python before 3.11.8 keeps one recursion depth for all parsers (CPython #106905).

    What is collected in the middle of one may be logged with its traceback, for which another parses; then the first
    raises SystemError, and pytest ends without a word on what had failed.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        return _parse(*args, **options)
    finally:
        if enabled:
            gc.enable()


if sys.version_info < (3, 11, 8):
    ast.parse = _parse_in_peace


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that walked it all would hold every event loop up for half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def _on_its_own() -> Iterator[None]:
    """A file draws the same numbers whichever ran before; what it leaves unclosed is said of it, not of another."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
    yield
    gc.collect()
