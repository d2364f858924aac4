"""Contestants without an engine: they answer at once, at a speed that is given."""

from collections.abc import Callable, Mapping

from experiments.engine_bench.contestants import Prompts, Sample
from experiments.engine_bench.shares import PHASES, StepShares
from experiments.engine_bench.timing import Run


class FakeContestant:
    """Prefill takes `prefill_s`, each further token `step_s`; tokens are `token(prompt, step)`."""

    def __init__(
        self,
        name: str,
        *,
        is_ours: bool = False,
        prefill_s: float = 1.0,
        step_s: float = 0.5,
        token: Callable[[list[int], int], int] = lambda prompt, step: prompt[-1] + step,
        log: list[tuple[str, int, int]] | None = None,
    ) -> None:
        self.name = name
        self.is_ours = is_ours
        self.prefills_first = not is_ours
        self.facts: Mapping[str, object] = {"library": name}
        self.seen: list[Prompts] = []
        self._prefill_s = prefill_s
        self._step_s = step_s
        self._token = token
        self._log = log if log is not None else []

    def generate(self, prompts: Prompts, output_len: int) -> Sample:
        self.seen.append(prompts)
        self._log.append((self.name, len(prompts), output_len))
        times = tuple(self._prefill_s + step * self._step_s for step in range(output_len))
        tokens = tuple(tuple(self._token(list(prompt), step) for step in range(output_len)) for prompt in prompts)
        shares = some_shares() if self.is_ours else None
        return Sample(Run(tokens, (times,) * len(prompts)), shares, ((3, 1),) if self.is_ours else ())

    def memory(self) -> Mapping[str, object]:
        return {"num_processes": 1, "pss_bytes": 1000, "weight_bytes": 0}

    def close(self) -> None:
        pass


def some_shares(attention: float = 0.5) -> StepShares:
    """Only attention and waiting."""
    shares = dict.fromkeys(PHASES, 0.0) | {"attention": attention, "waiting": 1 - attention}
    return StepShares(
        steps=4,
        step_ms=10.0,
        shares=shares,
        expert_compute_ms=1.0,
        expert_queue_ms=2.0,
        bytes_per_token=2048.0,
        messages_per_token=16.0,
        expert_cpu_ms=8.0,
        coordinator_cpu_ms=2.0,
    )
