"""The requests of a simulation: continuous batching with chunked prefill, as counts, on a clock that is told.

It is the scheduler's behaviour in outline (first come first served, decoding before prefill), not the scheduler: no KV
memory, no priorities. How long a step takes is `simulate`'s business.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class ClosedLoop:
    """Requests first .. last - 1 are of `concurrency` clients, each sending the next when its last is answered.

    They arrive when they are sent; what is not sent until `end_s` is not sent at all.
    """

    first: int
    last: int
    concurrency: int
    end_s: float


class SimulatedEngine:
    """All requests of a trace. `max_num_seqs` run at once; a step has at most `max_num_batched_tokens` tokens."""

    def __init__(
        self,
        arrival_s: Sequence[float] | FloatArray,
        prompt_tokens: Sequence[int] | IntArray,
        output_tokens: Sequence[int] | IntArray,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        closed: Sequence[ClosedLoop] = (),
    ) -> None:
        if not 1 <= max_num_seqs <= max_num_batched_tokens:
            raise ValueError(
                f"max_num_seqs is {max_num_seqs} and max_num_batched_tokens {max_num_batched_tokens}: "
                "at least 1, and a token for each sequence"
            )
        self.arrival_s: FloatArray = np.array(arrival_s, np.float64)
        self._closed = tuple(closed)
        self.unsent: npt.NDArray[np.bool_] = np.zeros(len(self.arrival_s), np.bool_)
        self._prompt: IntArray = np.array(prompt_tokens, np.int64)
        self._output: IntArray = np.array(output_tokens, np.int64)
        self._max_seqs, self._max_tokens = max_num_seqs, max_num_batched_tokens
        num = len(self.arrival_s)
        self.first_token_s: FloatArray = np.full(num, np.nan)
        self.finished_s: FloatArray = np.full(num, np.nan)
        self._running: IntArray = np.zeros(0, np.int64)
        self._num_begun = 0
        self._chunk: IntArray = np.zeros(0, np.int64)

    @property
    def is_done(self) -> bool:
        """Nothing runs and nothing is to come."""
        return not len(self._running) and self._num_begun == len(self.arrival_s)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def next_arrival_s(self) -> float:
        """When the first request comes that has not begun; infinite where there is none."""
        return float(self.arrival_s[self._num_begun]) if self._num_begun < len(self.arrival_s) else np.inf

    def queue_s(self, now_s: float) -> float:
        """How long the oldest request that has not begun has waited."""
        return 0.0 if self._loop() is not None else max(now_s - self.next_arrival_s, 0.0)

    def begin_step(self, now_s: float) -> int:
        """Takes in what has come, and returns the tokens of the next step; 0 when there is nothing to do yet."""
        room = min(self._max_seqs - len(self._running), self._sent(now_s))
        come = int(np.searchsorted(self.arrival_s, now_s, side="right"))
        num = min(room, come - self._num_begun)
        if num > 0:
            begun = np.arange(self._num_begun, self._num_begun + num)
            if self._loop() is not None:
                self.arrival_s[begun] = now_s
            self._running = np.concatenate([self._running, begun])
            self._num_begun += num
        prompt = self._prompt[self._running]
        decodes = prompt == 0
        left = self._max_tokens - int(decodes.sum())
        before = np.cumsum(prompt) - prompt
        self._chunk = np.where(decodes, 1, np.clip(left - before, 0, prompt))
        return int(self._chunk.sum())

    def _loop(self) -> ClosedLoop | None:
        """The closed loop that the next request is of."""
        return next((loop for loop in self._closed if loop.first <= self._num_begun < loop.last), None)

    def _sent(self, now_s: float) -> int:
        """How many of the next requests may begin; those that will never be sent are passed over."""
        while (loop := self._loop()) is not None and now_s >= loop.end_s:
            self.unsent[self._num_begun : loop.last] = True
            self._num_begun = loop.last
        if loop is None:
            # A closed loop that follows is not begun with the same breath.
            return min((other.first for other in self._closed if other.first > self._num_begun), default=2**62) - (
                self._num_begun
            )
        running = int(((self._running >= loop.first) & (self._running < loop.last)).sum())
        return min(loop.concurrency - running, loop.last - self._num_begun)

    def end_step(self, now_s: float) -> None:
        """The step's tokens are done: prompts have advanced, and whoever had all of its prompt has one token more."""
        running, chunk = self._running, self._chunk
        decodes = self._prompt[running] == 0
        self._prompt[running] -= np.where(decodes, 0, chunk)
        speaks = (self._prompt[running] == 0) & (chunk > 0)
        first = running[speaks & ~decodes]
        self.first_token_s[first] = now_s
        self._output[running[speaks]] -= 1
        ended = self._output[running] == 0
        if ended.any():
            self.finished_s[running[ended]] = now_s
            self._running = running[~ended]
