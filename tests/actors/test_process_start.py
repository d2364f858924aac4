"""How an actor's process begins: it has its environment in time, and its modules are not searched for garbage."""

import gc
import os
import subprocess
import sys
from typing import Any

import pytest
from ray import cloudpickle

from actors.expert.process import ExpertProcess
from actors.process_start import importing, with_env
from actors.supervision.blueprint import process_env

THREADS = 1
"""What no machine with two cores would choose; torch takes no more than there are."""

FRESH_PROCESS = """
import pickle, sys
told = pickle.load(sys.stdin.buffer)
late = sorted({"torch", "grpc"} & set(sys.modules))
told()
import gc, torch
print(late, torch.get_num_threads(), gc.get_freeze_count() > 100_000, gc.isenabled())
"""


class Told:
    """Writes down what it saw when it was built."""

    def __init__(self, **kwargs: Any) -> None:
        self.seen = os.environ.get("OCTAVO_TEST_TOLD"), kwargs

    def answer(self) -> int:
        """What an actor's handle must find."""
        return 42


class Process(ExpertProcess):
    """Imports what an expert does, and then has nothing to hold."""

    def __init__(self) -> None:
        from actors.expert.process import _imported

        _imported()


def test_the_environment_is_there_when_the_actor_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_TEST_TOLD", "before")
    told = with_env(Told, {"OCTAVO_TEST_TOLD": "told"})
    assert (told.__name__, told.__module__) == ("Told", Told.__module__)
    assert os.environ["OCTAVO_TEST_TOLD"] == "before", "only the actor's process is told"
    actor = told(one=1)
    assert (actor.seen, actor.answer()) == (("told", {"one": 1}), 42)


def test_torch_has_the_threads_that_a_process_is_told_when_it_runs() -> None:
    told = cloudpickle.dumps(with_env(Process, process_env(THREADS)))
    environ = {name: value for name, value in os.environ.items() if name not in process_env(THREADS)}
    answer = subprocess.run(
        [sys.executable, "-c", FRESH_PROCESS], input=told, env=environ, capture_output=True, check=True, timeout=120
    )
    assert answer.stdout.decode().strip() == f"[] {THREADS} True True"


def test_modules_that_are_there_already_leave_garbage_to_be_found() -> None:
    __import__("torch")
    frozen = gc.get_freeze_count()
    with importing():
        __import__("torch")
    assert (gc.get_freeze_count(), gc.isenabled()) == (frozen, True)
