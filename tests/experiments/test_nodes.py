"""A node's process that ends by itself is started again, a bounded number of times; its last words are the error."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from ray._private.utils import read_ray_address, write_ray_address

from actors import ray_runtime
from actors.ray_runtime import RuntimeFailure
from experiments.scenario.nodes import MAX_STARTS, NodeProcess


class Node:
    """`num_bad` starts that end with 3, then one that lasts."""

    def __init__(self, num_bad: int) -> None:
        self.starts = 0
        self._num_bad = num_bad

    def __call__(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        self.starts += 1
        program = (
            f"print('no luck {self.starts}\\n'); raise SystemExit(3)" if self.starts <= self._num_bad else "input()"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT
        )


@pytest.fixture
def log() -> Iterator[IO[bytes]]:
    with tempfile.TemporaryFile() as file:
        yield file


def ended(one: NodeProcess) -> None:
    one.process.communicate()


def test_what_ended_is_started_again_and_what_runs_is_left_alone(log: IO[bytes]) -> None:
    node = Node(num_bad=1)
    one = NodeProcess(node, log)
    ended(one)
    for _ in range(3):
        one.look()
    assert (node.starts, one.process.poll()) == (2, None)
    one.process.kill()
    ended(one)


def test_its_last_words_are_the_error(log: IO[bytes]) -> None:
    node = Node(num_bad=MAX_STARTS)
    one = NodeProcess(node, log)
    for _ in range(MAX_STARTS - 1):
        ended(one)
        one.look()
    ended(one)
    with pytest.raises(RuntimeFailure, match=f"ended with 3 {MAX_STARTS} times, at last with 'no luck {MAX_STARTS}'"):
        one.look()
    assert node.starts == MAX_STARTS


def test_the_address_that_ray_wrote_down_is_forgotten_unless_it_is_another_rays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    ray_runtime.forget("10.0.0.1:6379")
    (tmp_path / "ray").mkdir()
    write_ray_address("10.0.0.1:6379")
    ray_runtime.forget("10.0.0.2:6379")
    assert read_ray_address() == "10.0.0.1:6379"
    ray_runtime.forget("10.0.0.1:6379")
    assert read_ray_address() is None
