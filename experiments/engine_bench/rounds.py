"""The interleaved run: every repeat measures every cell with every contestant, so that ratios see the same weather.

Starting contestants is `experiments.engine_bench.session`'s work, tables are `report`'s.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from experiments.engine_bench.cells import Cell
from experiments.engine_bench.contestants import Contestant, Prompts, Sample
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.timing import decode_to_end_tok_s, decode_tok_s, decode_window_tokens, prefill_tok_s

WARM_UP_TOKENS = 4
MakePrompts = Callable[[int, int, int], Prompts]
"""(count, length, seed) -> prompts."""
KernelStep = Callable[[Cell, Sequence[Sequence[int]], int], tuple[float, float]]
"""(cell, load per layer and expert, seed) -> seconds, and CPU seconds, of the kernel alone for a step's expert work."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One contestant in one cell in one repeat. `kernel_step_s` is 0 where the kernel alone was not measured."""

    contestant: str
    cell: Cell
    repeat: int
    prefill: Sample
    decode: Sample
    memory: Mapping[str, object]
    kernel_step_s: float = 0.0
    kernel_cpu_s: float = 0.0

    @property
    def prefill_tok_s(self) -> float:
        return prefill_tok_s(self.cell.batch * self.cell.prompt_len, self.prefill.run)

    @property
    def decode_tok_s(self) -> float:
        return decode_tok_s(self.decode.run)

    @property
    def kernel_share(self) -> float:
        """What part of the speed of the kernel alone the whole decode step reaches; 0 where that is unknown."""
        return self.kernel_step_s * self.decode_tok_s / self.cell.batch

    @property
    def kernel_cpu_share(self) -> float:
        """The same in CPU time, which a busy machine does not spoil: the kernel's part of what all processes use."""
        step = self.decode.shares
        ours_s = 0.0 if step is None else (step.expert_cpu_ms + step.coordinator_cpu_ms) / 1e3
        return self.kernel_cpu_s / ours_s if ours_s else 0.0

    def to_json(self) -> dict[str, object]:
        """The line of stdout."""
        line: dict[str, object] = {
            "type": "measurement",
            "contestant": self.contestant,
            **asdict(self.cell),
            "repeat": self.repeat,
            "prefill_tok_s": self.prefill_tok_s,
            "prefill_s": self.prefill.run.all_started_s,
            "decode_tok_s": self.decode_tok_s,
            "decode_to_end_tok_s": decode_to_end_tok_s(self.decode.run),
            "decode_window_s": self.decode.run.first_done_s - self.decode.run.all_started_s,
            "decode_window_tokens": decode_window_tokens(self.decode.run),
            "memory": dict(self.memory),
        }
        for name, sample in (("prefill", self.prefill), ("decode", self.decode)):
            if sample.shares is not None:
                line[f"{name}_step"] = sample.shares.to_json()
        if self.kernel_step_s:
            line |= {"kernel_step_ms": 1e3 * self.kernel_step_s, "kernel_share": self.kernel_share}
            line |= {"kernel_cpu_ms": 1e3 * self.kernel_cpu_s, "kernel_cpu_share": self.kernel_cpu_share}
        return line


@dataclass(slots=True)
class Rounds:
    """`seed` chooses all prompts; no two runs of a contestant see the same prompt in the same repeat."""

    contestants: Sequence[Contestant]
    cells: Sequence[Cell]
    make_prompts: MakePrompts
    repeats: int
    seed: int = 0
    kernel_step: KernelStep | None = None
    _turn: int = field(default=0, init=False)

    def warm_up(self) -> None:
        """Every contestant once in every cell, uncounted: what is made once is made now. Raises BenchError."""
        for cell in self.cells:
            prompts = self.make_prompts(cell.batch, cell.prompt_len, self.seed)
            for contestant in self.contestants:
                contestant.generate(prompts, min(WARM_UP_TOKENS, cell.output_len))

    def run(self, on_measurement: Callable[[Measurement], None]) -> list[Measurement]:
        """All measurements; each is told as it is made. Raises BenchError."""
        done: list[Measurement] = []
        for repeat in range(self.repeats):
            for cell in self.cells:
                for contestant in self._in_turn():
                    done.append(self._measure(contestant, cell, repeat))
                    on_measurement(done[-1])
        return done

    def _in_turn(self) -> list[Contestant]:
        """Each cell begins with the next one, so that nobody always follows the same one."""
        first, self._turn = self._turn % len(self.contestants), self._turn + 1
        return [*self.contestants[first:], *self.contestants[:first]]

    def _generate(self, contestant: Contestant, cell: Cell, seed: int, output_len: int) -> Sample:
        sample = contestant.generate(self.make_prompts(cell.batch, cell.prompt_len, seed), output_len)
        lengths = [len(ids) for ids in sample.run.tokens]
        if lengths != [output_len] * cell.batch:
            raise BenchError(
                f"{contestant.name} gave {lengths} tokens where {cell.batch} sequences were to have {output_len}"
            )
        return sample

    def _measure(self, contestant: Contestant, cell: Cell, repeat: int) -> Measurement:
        seed = self.seed + 1 + 2 * repeat
        decode = prefill = self._generate(contestant, cell, seed + 1, cell.output_len)
        if not contestant.prefills_first:
            prefill = self._generate(contestant, cell, seed, 1)
        kernel = (0.0, 0.0)
        if self.kernel_step is not None and contestant.is_ours and decode.load:
            kernel = self.kernel_step(cell, decode.load, seed)
        return Measurement(
            contestant=contestant.name,
            cell=cell,
            repeat=repeat,
            prefill=prefill,
            decode=decode,
            memory=contestant.memory(),
            kernel_step_s=kernel[0],
            kernel_cpu_s=kernel[1],
        )
