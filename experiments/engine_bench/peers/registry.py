"""Which peers there are, what each needs, and a peer as a contestant."""

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.engine_bench.contestants import Prompts, Sample
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.memory import memory_use
from experiments.engine_bench.peers.process import JsonProcess, environment
from experiments.engine_bench.timing import Run

_ASK = "import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)"
CHECK_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerKind:
    """`module` is run; `imported` must be importable there, `requirement` provides it; `bytes_per_weight` in memory."""

    name: str
    module: str
    imported: str
    requirement: str
    bytes_per_weight: int
    reads_gguf: bool = False


PEERS: Mapping[str, PeerKind] = {
    kind.name: kind
    for kind in (
        PeerKind(
            name="transformers",
            module="experiments.engine_bench.peers.transformers_peer",
            imported="transformers",
            requirement="transformers",
            bytes_per_weight=4,
        ),
        PeerKind(
            name="llama.cpp",
            module="experiments.engine_bench.peers.llama_cpp_peer",
            imported="llama_cpp",
            requirement="llama-cpp-python",
            bytes_per_weight=2,
            reads_gguf=True,
        ),
    )
}


def find_peer(name: str, python: str = sys.executable, env: Mapping[str, str] | None = None) -> PeerKind:
    """The peer of that name, whose library `python` has with `env` added to its environment. Raises BenchError."""
    kind = PEERS.get(name)
    if kind is None:
        raise BenchError(f"--peer is {name!r}, but must be one of {', '.join(PEERS)}")
    try:
        ask = [python, "-c", _ASK, kind.imported]
        found = subprocess.run(ask, env=environment(env or {}), timeout=CHECK_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"--peer-python {python} does not run: {error}") from None
    if found.returncode != 0:
        raise BenchError(
            f"--peer {name} needs {kind.requirement}, which {python} does not have: "
            f"install it there (the extra is octavo[peers]), or name another interpreter with --peer-python"
        )
    return kind


def parse_env(assignments: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a mapping. Raises BenchError."""
    env = {}
    for text in assignments:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise BenchError(f"--peer-env is {text!r}, but must be NAME=VALUE")
        env[name] = value
    return env


class PeerContestant:
    """A peer's process under the interface of all contestants."""

    is_ours = False
    prefills_first = True

    def __init__(
        self,
        kind: PeerKind,
        model: str,
        threads: int,
        python: str = sys.executable,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Loads `model`, a checkpoint's directory or a .gguf file, as the peer reads it. Raises BenchError."""
        first = {"model": model, "threads": threads}
        self._process = JsonProcess(kind.name, [python, "-m", kind.module], first, env)
        self._facts: dict[str, Any] = {**self._process.facts["facts"], "env": dict(env or {})}

    @property
    def name(self) -> str:
        return self._process.name

    @property
    def facts(self) -> Mapping[str, object]:
        return dict(self._facts)

    def generate(self, prompts: Prompts, output_len: int) -> Sample:
        """Raises BenchError."""
        answer = self._process.ask({"prompts": [list(prompt) for prompt in prompts], "output_len": output_len})
        self._facts |= answer.get("facts", {})
        return Sample(Run(_tuples(answer["tokens"]), _tuples(answer["arrivals_s"])))

    def memory(self) -> Mapping[str, object]:
        return memory_use([self._process.pid]).to_json()

    def close(self) -> None:
        self._process.close()


def _tuples(rows: list[list[Any]]) -> tuple[tuple[Any, ...], ...]:
    return tuple(tuple(row) for row in rows)
