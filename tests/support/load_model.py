"""A scheduler under load with a virtual clock: arrivals by chance, steps that cost what a machine takes for them."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from cluster.ids import SequenceId
from cluster.scheduler import QueueFull, Scheduler, SchedulerConfig
from cluster.sequence import Sequence


@dataclass(kw_only=True)
class LoadModel:
    """A step takes `step_s` + `token_s` per token, and as much again per root of its sequences where `crowd_s` says.

    Prompts have `prompt` tokens on average, answers `output`; both vary from a half to one and a half.
    """

    scheduler: Scheduler
    step_s: float
    token_s: float
    prompt: int
    output: int
    seed: int = 0
    now_s: float = 0.0
    arrived_s: dict[SequenceId, float] = field(default_factory=dict)
    first_s: dict[SequenceId, float] = field(default_factory=dict)
    done_s: dict[SequenceId, float] = field(default_factory=dict)
    refused_s: list[float] = field(default_factory=list)
    retries_s: list[float] = field(default_factory=list)
    waiting: list[tuple[float, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._next_id = 0

    def run(self, until_s: float, rate: Callable[[float], float]) -> None:
        """Plays on to `until_s`; `rate` is the arrivals per second at a time."""
        next_s = self.now_s + self._gap(rate(self.now_s))
        while self.now_s < until_s:
            while next_s <= self.now_s:
                self._arrive(next_s)
                next_s += self._gap(rate(next_s))
            if not self._step():
                self.now_s = min(next_s, until_s)
            self.waiting.append((self.now_s, self.scheduler.num_waiting))

    def _gap(self, rate: float) -> float:
        return self._random.expovariate(rate) if rate > 0 else math.inf

    def _arrive(self, at_s: float) -> None:
        seq_id = SequenceId(self._next_id)
        self._next_id += 1
        sequence = Sequence(seq_id=seq_id, prompt_ids=[0] * self._vary(self.prompt), max_tokens=self._vary(self.output))
        try:
            self.scheduler.add(sequence)
            self.arrived_s[seq_id] = at_s
        except QueueFull as full:
            self.refused_s.append(at_s)
            self.retries_s.append(full.retry_after_s)

    def _vary(self, mean: int) -> int:
        return max(1, round(mean * self._random.uniform(0.5, 1.5)))

    def _step(self) -> bool:
        batch = self.scheduler.schedule(self.now_s)
        if not batch.items:
            self.scheduler.abandon(batch)
            return False
        self.now_s += self.step_s + self.token_s * batch.num_tokens
        tokens = {item.sequence.seq_id: [7] for item in batch.items if item.needs_token}
        for update in self.scheduler.postprocess(batch, tokens):
            seq_id = update.sequence.seq_id
            self.first_s.setdefault(seq_id, self.now_s)
            if update.finish_reason is not None:
                self.done_s[seq_id] = self.now_s
        return True

    def goodput(self, start_s: float, stop_s: float) -> float:
        """Answers per second that were finished in that time."""
        return sum(start_s <= at < stop_s for at in self.done_s.values()) / (stop_s - start_s)

    def first_token_s(self, start_s: float, stop_s: float) -> list[float]:
        """How long those who came in that time waited for their first token, sorted."""
        chosen = [seq_id for seq_id, at in self.arrived_s.items() if start_s <= at < stop_s]
        return sorted(self.first_s[seq_id] - self.arrived_s[seq_id] for seq_id in chosen if seq_id in self.first_s)


def load_model(*, max_num_seqs: int = 64, max_queue_wait_s: float | None = 10.0, **costs: float) -> LoadModel:
    """A fresh one with plenty of KV blocks."""
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=512,
        block_size=32,
        max_waiting_requests=256,
        max_waiting_tokens=262_144,
        max_model_len=8192,
        max_queue_wait_s=max_queue_wait_s,
    )
    given = {"step_s": 0.05, "token_s": 0.004, "prompt": 100, "output": 60, **costs}
    return LoadModel(scheduler=Scheduler(config, 20_000), **given)  # type: ignore[arg-type]
