"""How an actor's process begins, where that costs: its environment, and the import of what computes.

A class that is started so must come from a module that imports nothing which reads the environment as it is loaded,
torch first of all (see `actors.expert.process`).
"""

import gc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def with_env(actor_class: type, env: Mapping[str, str]) -> type:
    """`actor_class` under its own name, whose constructor begins by setting `env` in its process.

    Ray would start the process with it (`runtime_env`), by way of another Python that imports Ray: half a second of a
    processor for each process.
    """
    told = dict(env)

    def begin(self: Any, **kwargs: Any) -> None:
        os.environ.update(told)
        actor_class.__init__(self, **kwargs)  # type: ignore[misc]

    own = {"__init__": begin, "__module__": actor_class.__module__, "__doc__": actor_class.__doc__}
    return type(actor_class.__name__, (actor_class,), own)


@contextmanager
def importing() -> Iterator[None]:
    """Modules that are imported within stay for good: nobody looks for garbage among them, now or later.

    That search is a tenth of what importing torch takes, and afterwards a pause of 0.1 s now and then.
    """
    known, looks = len(sys.modules), gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if looks:
            gc.enable()
