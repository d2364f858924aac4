"""The inside of a peer's process: reads one JSON request a line, answers one JSON line, ends with its input.

Standard library only: a peer's interpreter need not have ours. What a library prints goes to stderr, so that nothing
but answers is on stdout.
"""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

Request = dict[str, Any]
Handler = Callable[[Request], dict[str, Any]]


def serve(start: Callable[[Request], tuple[dict[str, Any], Handler]]) -> None:
    """The first line is given to `start`, which returns the facts to answer with and the handler of all other lines.

    An error of a handler is an answer, `{"error": ...}`; one of `start` also ends the process.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # C libraries too
    sys.stdout = sys.stderr

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    handler: Handler | None = None
    for line in sys.stdin:
        try:
            if handler is None:
                facts, handler = start(json.loads(line))
                answer(facts)
            else:
                answer(handler(json.loads(line)))
        except Exception as error:  # noqa: BLE001 - the top of the loop: whatever it is, the other side must hear of it
            answer({"error": f"{type(error).__name__}: {error}"})
            if handler is None:
                return
