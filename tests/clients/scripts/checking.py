"""How a client's script runs its checks: one after another, each told as a line of JSON. Standard library alone.

The scripts run in environments that hold a client and nothing of ours. `tests.clients.runs` reads what they print.
"""

import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

RESULT = "RESULT "


class Unsupported(Exception):
    """The server says that it does not do this; the check is skipped."""


@dataclass(frozen=True)
class Server:
    """What is asked: its URL without a path, its model, its checkpoint, and a folder for files."""

    url: str
    model: str
    model_dir: str
    scratch: str
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def v1(self) -> str:
        """The base URL of OpenAI's API."""
        return f"{self.url}/v1"


def failure_of(call: Callable[[], object]) -> Exception:
    """What `call` raises; AssertionError where it raises nothing."""
    try:
        call()
    except Exception as error:  # noqa: BLE001 - whatever it is, the caller looks at it
        return error
    raise AssertionError("nothing was raised")


Check = Callable[[Server], None]


def main(namespace: dict[str, Any]) -> None:
    """Runs every `check_*` of a script's namespace and ends the process: a client's threads are not waited for."""
    server = Server(**json.loads(sys.argv[1]))
    for name, check in list(namespace.items()):
        if name.startswith("check_"):
            print(RESULT + json.dumps({"check": name, **outcome(check, server)}), flush=True)
    sys.stderr.flush()
    os._exit(0)


def outcome(check: Check, server: Server) -> dict[str, str]:
    """How one check went."""
    try:
        check(server)
    except Unsupported as reason:
        return {"outcome": "unsupported", "text": str(reason)}
    except Exception:
        logging.exception("%s failed", check.__name__)
        return {"outcome": "failed", "text": traceback.format_exc()}
    return {"outcome": "passed", "text": ""}
