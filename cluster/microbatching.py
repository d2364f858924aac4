"""Into how many microbatches a step is cut, so that one computes attention while another is at the experts.

With hosts of their own for experts and coordinator, the pipeline is full from m >= 2 (1 + T_c / T_f) microbatches on
(T_c the time of one exchange, T_f that of one half of a layer; MegaScale-Infer, arXiv 2504.02263, section 4.1). Where
they share cores, and because a smaller batch reads the same weights, no formula holds: so each size of step is tried
both ways, the faster way is kept, and the other is tried again now and then. Results do not depend on the choice.

Cutting a batch is `model.microbatch`'s work, driving the pieces `actors.coordinator.forward_driver`'s. No clock here:
times are told.
"""

from collections import deque
from dataclasses import dataclass, field
from statistics import median


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchPolicy:
    """`choices` are the numbers tried, of steps of at least `min_tokens` tokens (smaller ones stay whole).

    Each choice is measured `samples` times for a size of step before any is preferred; then the others are tried once
    in `probe_every` steps.
    """

    choices: tuple[int, ...] = (1, 2)
    min_tokens: int = 32
    samples: int = 3
    probe_every: int = 256

    def __post_init__(self) -> None:
        if not self.choices or min(self.choices) < 1 or min(self.samples, self.probe_every, self.min_tokens) < 1:
            raise ValueError(f"a microbatch policy needs positive numbers, got {self}")


@dataclass(slots=True)
class _Size:
    """What is known of steps of one size: the latest seconds per token of each choice."""

    recent: dict[int, deque[float]]
    steps: int = 0


@dataclass(slots=True)
class MicrobatchChooser:
    """Learns from what it is told; sizes are powers of two of tokens."""

    policy: MicrobatchPolicy = field(default_factory=MicrobatchPolicy)
    _sizes: dict[int, _Size] = field(default_factory=dict)

    def choose(self, num_tokens: int) -> int:
        """How many microbatches for a step of so many tokens."""
        policy = self.policy
        if num_tokens < policy.min_tokens or len(policy.choices) == 1:
            return 1 if num_tokens < policy.min_tokens else policy.choices[0]
        size = self._size(num_tokens)
        least = min(policy.choices, key=lambda choice: len(size.recent[choice]))
        if len(size.recent[least]) < policy.samples:
            return least
        best = self._best(size)
        others = [choice for choice in policy.choices if choice != best]
        if size.steps % policy.probe_every == 0:
            return others[size.steps // policy.probe_every % len(others)]
        return best

    def observe(self, num_tokens: int, microbatches: int, seconds: float) -> None:
        """A step of so many tokens took so long in so many microbatches."""
        if num_tokens < self.policy.min_tokens or microbatches not in self.policy.choices:
            return
        size = self._size(num_tokens)
        size.steps += 1
        size.recent[microbatches].append(seconds / num_tokens)

    def preferred(self) -> dict[int, int]:
        """The choice in force by size (tokens below the key), where there is one."""
        full = {key: size for key, size in self._sizes.items() if all(size.recent.values())}
        return {1 << key: self._best(size) for key, size in sorted(full.items())}

    def _best(self, size: _Size) -> int:
        return min(self.policy.choices, key=lambda choice: median(size.recent[choice]))

    def _size(self, num_tokens: int) -> _Size:
        key = num_tokens.bit_length()
        if key not in self._sizes:
            recent = {choice: deque[float](maxlen=self.policy.samples) for choice in self.policy.choices}
            self._sizes[key] = _Size(recent)
        return self._sizes[key]
