"""What a benchmark needs of whoever takes part in it, ours or a peer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from experiments.engine_bench.shares import StepShares
from experiments.engine_bench.timing import Run

Prompts = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run. `load` is, for ours alone, each layer's rows per expert while all decoded, and `steps` in which.

    `shares` are of that same time; of the whole run where the output was one token.
    """

    run: Run
    shares: StepShares | None = None
    load: tuple[tuple[int, ...], ...] = ()


class Contestant(Protocol):
    """An engine that is up and idle."""

    @property
    def name(self) -> str: ...

    @property
    def is_ours(self) -> bool: ...

    @property
    def prefills_first(self) -> bool:
        """True where no sequence decodes before all have their first token: one run then shows both phases."""
        ...

    @property
    def facts(self) -> Mapping[str, object]:
        """What a reader must know to judge its figures: versions, precisions, threads."""
        ...

    def generate(self, prompts: Prompts, output_len: int) -> Sample:
        """Greedy, all prompts at once, exactly `output_len` tokens each. Raises BenchError."""
        ...

    def memory(self) -> Mapping[str, object]:
        """What its processes hold now, under the names of `experiments.engine_bench.memory`."""
        ...

    def close(self) -> None:
        """Ends it and everything it started; once."""
        ...
