"""What an engine counts of itself. Tokens and preemptions are the scheduler's counters, load is `cluster.load`'s."""

from collections import deque
from dataclasses import dataclass, field

RECENT_STEPS = 256


@dataclass(slots=True)
class EngineCounters:
    """Totals since start; times in seconds.

    `expert_wait_s` is the part of `step_s` spent awaiting experts, `sampling_s` that between logits and outputs.
    `failed_steps` raised, and were given up; `waiting_steps` were given up for want of an expert, to be tried again;
    `dropped_steps` because all their sequences had ended meanwhile. `displaced` left a full queue for another tenant's.
    """

    steps: int = 0
    step_s: float = 0.0
    expert_wait_s: float = 0.0
    sampling_s: float = 0.0
    failed_steps: int = 0
    waiting_steps: int = 0
    dropped_steps: int = 0
    failed_sequences: int = 0
    displaced: int = 0
    recent_step_s: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_STEPS))

    def count_step(self, seconds: float, expert_wait_s: float) -> None:
        """Counts a step that was computed, failed or dropped; `expert_wait_s` is the total so far."""
        self.steps += 1
        self.step_s += seconds
        self.expert_wait_s = expert_wait_s
        self.recent_step_s.append(seconds)
