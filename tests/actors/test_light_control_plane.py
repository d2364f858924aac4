"""The processes that decide and pass on import nothing that only computing needs: it would be their longest second."""

import subprocess
import sys

import pytest

CODE = """
import importlib, sys
for name in sys.argv[1].split():
    importlib.import_module(name)
print(" ".join(one for one in sys.argv[2].split() if one in sys.modules))
"""


def imported(modules: str, *asked: str) -> list[str]:
    """Which of those asked for a fresh process has after importing `modules`."""
    arguments = [sys.executable, "-c", CODE, modules, " ".join(asked)]
    return subprocess.run(arguments, capture_output=True, text=True, check=True, timeout=120).stdout.split()


@pytest.mark.parametrize(
    "modules",
    [
        "actors.ingress",
        "actors.supervision.supervisor",
        "actors.cli actors.command.serve actors.command.demo_model",
        "actors.expert.process actors.coordinator.process",
    ],
)
def test_what_only_decides_and_passes_on_does_not_import_torch(modules: str) -> None:
    assert imported(modules, "torch") == []


@pytest.mark.parametrize(
    "modules", ["actors.supervision.supervisor", "actors.expert.actor", "actors.coordinator.actor"]
)
def test_only_the_front_door_and_who_opens_it_import_ray_serve(modules: str) -> None:
    assert imported(modules, "ray.serve", "fastapi") == []


def test_the_test_sees_torch_where_it_is() -> None:
    assert imported("actors.coordinator.actor actors.ingress", "torch", "ray.serve") == ["torch", "ray.serve"]
