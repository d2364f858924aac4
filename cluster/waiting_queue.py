"""The bounded queue in front of the running sequences: first come, first served, counted in requests and in tokens.

It knows how fast it has lately been emptied, so that a refusal can say when to come back. Who is admitted,
and when, is the planner's decision.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Iterator

from cluster.ids import SequenceId
from cluster.sequence import Sequence

RATE_WINDOW_S = 30.0
"""How far back admissions count towards the rate."""
MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
_MAX_EVENTS = 1024


class QueueFull(Exception):
    """The waiting queue is at its limit of requests or tokens.

    `retry_after_s` is an estimate, at least MIN_RETRY_S and at most MAX_RETRY_S, of when there will be room.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class WaitingQueue:
    """Sequences that hold no KV blocks, in order of arrival.

    `max_requests` and `max_tokens` bound what newcomers may fill; preempted sequences come back to the front
    whatever the bounds say, because they have been promised an answer.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._sequences: OrderedDict[SequenceId, Sequence] = OrderedDict()
        self._num_tokens = 0
        self._admitted: deque[tuple[float, int]] = deque(maxlen=_MAX_EVENTS)
        self._busy_since_s: float | None = None
        self._now_s = 0.0

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._sequences.values())

    @property
    def num_tokens(self) -> int:
        """Tokens, prompts and kept outputs, that wait to be computed."""
        return self._num_tokens

    def head(self) -> Sequence | None:
        """Who is next, or None."""
        return next(iter(self._sequences.values()), None)

    def push(self, sequence: Sequence) -> None:
        """Take a newcomer at the end. Raises QueueFull."""
        tokens = sequence.num_tokens
        if len(self) + 1 > self._max_requests:
            raise QueueFull(
                f"{len(self)} requests are waiting; max_waiting_requests is {self._max_requests}",
                self._retry_after_s(len(self) + 1 - self._max_requests, 0),
            )
        if self._num_tokens + tokens > self._max_tokens:
            raise QueueFull(
                f"{self._num_tokens} tokens are waiting and {tokens} more are asked for; "
                f"max_waiting_tokens is {self._max_tokens}",
                self._retry_after_s(0, self._num_tokens + tokens - self._max_tokens),
            )
        if not self._sequences:
            self._busy_since_s = None
            self._admitted.clear()
        self._sequences[sequence.seq_id] = sequence
        self._num_tokens += tokens

    def push_front(self, sequence: Sequence) -> None:
        """Take back a preempted sequence, whose arrival is earlier than that of everyone here."""
        head = self.head()
        assert head is None or sequence.arrival < head.arrival, (sequence.arrival, head)
        self._sequences[sequence.seq_id] = sequence
        self._sequences.move_to_end(sequence.seq_id, last=False)
        self._num_tokens += sequence.num_tokens

    def pop(self) -> Sequence:
        """Admit the head; newcomers count towards the rate at which the queue empties."""
        _, sequence = self._sequences.popitem(last=False)
        self._num_tokens -= sequence.num_tokens
        if sequence.num_preemptions == 0:
            self._admitted.append((self._now_s, sequence.num_tokens))
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Give up a place at once."""
        del self._sequences[sequence.seq_id]
        self._num_tokens -= sequence.num_tokens

    def observe(self, now_s: float) -> None:
        """Tell the time. Admissions older than RATE_WINDOW_S, or than the queue's last being empty, do not count."""
        if self._busy_since_s is None:
            self._busy_since_s = now_s
        self._now_s = now_s
        while self._admitted and self._admitted[0][0] < now_s - RATE_WINDOW_S:
            self._admitted.popleft()

    def _retry_after_s(self, excess_requests: int, excess_tokens: int) -> float:
        """Seconds until that much has left, at the recent rate; MIN_RETRY_S before anything was observed."""
        since_s = self._busy_since_s
        if since_s is None or self._now_s <= since_s:
            return MIN_RETRY_S
        start_s = max(since_s, self._now_s - RATE_WINDOW_S)
        if len(self._admitted) == _MAX_EVENTS:
            start_s = max(start_s, self._admitted[0][0])
        elapsed_s = self._now_s - start_s
        waits = [MIN_RETRY_S]
        for excess, left in (
            (excess_requests, len(self._admitted)),
            (excess_tokens, sum(tokens for _, tokens in self._admitted)),
        ):
            if excess > 0:
                waits.append(excess * elapsed_s / left if left else math.inf)
        return min(MAX_RETRY_S, max(waits))
