"""The bounded queue in front of the running sequences: tenants take turns, each tenant's first come, first served.

It is bounded in requests, in tokens, and in the time that a newcomer is likely to wait: a queue of minutes helps
nobody, and long after a spike everybody would still stand in it. A refusal says when to come back. How fast it is
emptied is `cluster.queue_pace`'s knowledge; who is admitted, and when, is the planner's decision.
"""

from collections import deque
from collections.abc import Iterable, Iterator

from cluster.fair_queue import FairQueue
from cluster.queue_pace import PlannedStep, QueuePace
from cluster.sequence import Sequence

MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
STANDING_SHARE = 0.1
"""Of the longest wait, what is granted where nobody could have started at once for that long."""


class QueueFull(Exception):
    """The waiting queue is at its limit of requests, tokens or time.

    `retry_after_s` is an estimate, at least MIN_RETRY_S and at most MAX_RETRY_S, of when there will be room.
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = min(MAX_RETRY_S, max(MIN_RETRY_S, retry_after_s))


class WaitingQueue:
    """Sequences that hold no KV blocks: preempted ones first, then the tenants' lines (`cluster.fair_queue`).

    `max_requests`, `max_tokens` and `max_wait_s` bound what newcomers may fill; preempted sequences come back to the
    front whatever the bounds say, because they have been promised an answer. So have those that go on from a
    coordinator that is gone: they may fill as much again, and wait as long as they must.

    Where there is no room for a newcomer, whoever has most in line gives way: the last of those requests that were
    promised nothing, as long as its tenant keeps more than the newcomer's gets.
    """

    def __init__(
        self, max_requests: int, max_tokens: int, pace: QueuePace | None = None, max_wait_s: float | None = None
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._max_wait_s = max_wait_s
        self._pace = QueuePace(1, 1) if pace is None else pace
        self._back: deque[Sequence] = deque()
        self._back_tokens = 0
        self._lines = FairQueue()
        self._num_turns = 0

    def __len__(self) -> int:
        return len(self._back) + len(self._lines)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._back
        yield from self._lines

    @property
    def num_tokens(self) -> int:
        """Tokens, prompts and kept outputs, that wait to be computed."""
        return self._back_tokens + self._lines.num_tokens

    @property
    def num_tenants(self) -> int:
        """Tenants with newcomers in line."""
        return self._lines.num_tenants

    @property
    def preempted(self) -> tuple[Sequence, ...]:
        """Who has been admitted before, in order."""
        return tuple(self._back)

    def head(self) -> Sequence | None:
        """Who is next, or None."""
        return self._back[0] if self._back else self._lines.head()

    def push(self, sequence: Sequence) -> tuple[Sequence, ...]:
        """Takes a newcomer, and returns who had to leave for it: nobody, nearly always. Raises QueueFull."""
        displaced = self._room_for(sequence)
        if self._max_wait_s is not None and not sequence.output_ids:
            self._check_wait(sequence, self._max_wait_s)
        for one in displaced:
            self._lines.remove(one)
        if not len(self):
            self._pace.restart()
        self._lines.add(sequence)
        return displaced

    def room(self, newcomer: Sequence, most: int) -> tuple[int, float]:
        """How many like this one could come now, up to `most`; nobody is taken, and nobody has to leave.

        The first of them may be let in by others' leaving, the rest are those that fit beside all who wait. With 0
        comes when to ask again, in seconds, as `QueueFull` has it.
        """
        try:
            self._room_for(newcomer)
            if self._max_wait_s is not None:
                self._check_wait(newcomer, self._max_wait_s)
        except QueueFull as error:
            return 0, error.retry_after_s
        number = 1
        while number < most and self._fits_behind(newcomer, number):
            number += 1
        return number, 0.0

    def _fits_behind(self, newcomer: Sequence, number: int) -> bool:
        """Whether `newcomer` would be taken behind so many of its like."""
        if len(self) + number + 1 > self._max_requests:
            return False
        if self.num_tokens + (number + 1) * newcomer.num_tokens > self._max_tokens:
            return False
        if self._max_wait_s is None:
            return True
        return self._wait_s(newcomer, number) <= self._granted_s(self._max_wait_s)

    def _room_for(self, sequence: Sequence) -> tuple[Sequence, ...]:
        """Who must leave so that `sequence` fits. Raises QueueFull where nobody may be asked to."""
        tokens = sequence.num_tokens
        share = 2 if sequence.output_ids else 1
        max_requests, max_tokens = share * self._max_requests, share * self._max_tokens
        displaced: list[Sequence] = []
        while len(self) - len(displaced) + 1 > max_requests:
            if not self._displace(sequence, displaced, by_tokens=False):
                raise QueueFull(
                    f"{len(self)} requests are waiting; max_waiting_requests is {self._max_requests}",
                    self._pace.seconds_for(len(self) + 1 - max_requests, 0),
                )
        excess = self.num_tokens + tokens - max_tokens
        while len(self) > len(displaced) and excess > sum(one.num_tokens for one in displaced):
            if not self._displace(sequence, displaced, by_tokens=True):
                raise QueueFull(
                    f"{self.num_tokens} tokens are waiting and {tokens} more are asked for; "
                    f"max_waiting_tokens is {self._max_tokens}",
                    self._pace.seconds_for(0, excess),
                )
        return tuple(displaced)

    def _displace(self, newcomer: Sequence, displaced: list[Sequence], *, by_tokens: bool) -> bool:
        """Adds to `displaced` the last of the longest line; False where that would not make shares more equal."""
        if self._lines.num_tenants < 1 + bool(self._lines.line(newcomer.tenant).sequences):
            return False
        longest, own = self._lines.longest(by_tokens=by_tokens), self._lines.line(newcomer.tenant)
        gone = [one for one in displaced if one.tenant == longest.tenant]
        last = next((one for one in reversed(longest.sequences) if not one.output_ids and one not in gone), None)
        if last is None or longest.tenant == own.tenant:
            return False
        if by_tokens:
            left = longest.num_tokens - sum(one.num_tokens for one in gone) - last.num_tokens
            fair = left >= own.num_tokens + newcomer.num_tokens
        else:
            fair = len(longest.sequences) - len(gone) > len(own.sequences) + 1
        if fair:
            displaced.append(last)
        return fair

    def _check_wait(self, sequence: Sequence, longest_s: float) -> None:
        """Who was promised an answer elsewhere (it has output) is not asked here.

        A burst may fill the queue to `longest_s`. A queue that stands for longer than that is no burst: it is kept
        short, which costs no throughput, so that little is left of it when the load ends (as in "controlled delay",
        B. Maurer, "Fail at Scale", ACM Queue 13(8), 2015).
        """
        wait_s, granted_s = self._wait_s(sequence), self._granted_s(longest_s)
        if wait_s > granted_s:
            raise QueueFull(
                f"{len(self)} requests are waiting, and one more would start in about {wait_s:.3g} s; "
                f"{granted_s:g} s are granted (max_queue_wait_s is {longest_s:g})",
                wait_s - granted_s,
            )
        deadline_s = sequence.deadline_s
        if deadline_s is not None and wait_s > 0 and self._pace.now_s + wait_s >= deadline_s:
            raise QueueFull(
                f"{len(self)} requests are waiting, and one more would start in about {wait_s:.3g} s, "
                "after its deadline",
                wait_s,
            )

    def _wait_s(self, sequence: Sequence, behind: int = 0) -> float:
        """Until `sequence` would start, behind so many more of its like."""
        num_ahead, tokens_ahead = self._lines.ahead_of(sequence, behind)
        return self._pace.start_wait_s(num_ahead + len(self._back), tokens_ahead + self._back_tokens)

    def _granted_s(self, longest_s: float) -> float:
        return longest_s if self._pace.strain_s <= longest_s else longest_s * STANDING_SHARE

    def push_front(self, sequence: Sequence) -> None:
        """Takes back a preempted sequence, which was admitted before everyone here."""
        head = self._back[0] if self._back else None
        assert sequence.turn >= 0, sequence
        assert head is None or head.turn < 0 or sequence.turn < head.turn, (sequence.turn, head)
        self._back.appendleft(sequence)
        self._back_tokens += sequence.num_tokens

    def restore(self, sequences: Iterable[Sequence]) -> None:
        """Takes in order, whatever the bounds say, who had been taken when the books were lost."""
        for sequence in sequences:
            self._back.append(sequence)
            self._back_tokens += sequence.num_tokens

    def pop(self, num_cached: int = 0) -> Sequence:
        """Admit the head, so many of whose tokens need not be computed.

        Newcomers count towards the rate at which the queue empties. Here all tokens of everybody count, because what
        is in the KV cache now may be gone when its turn comes.
        """
        if self._back:
            sequence = self._back.popleft()
            self._back_tokens -= sequence.num_tokens
        else:
            sequence = self._lines.pop()
        if sequence.turn < 0:
            sequence.turn = self._num_turns
            self._num_turns += 1
        if sequence.num_preemptions == 0:
            self._pace.note_admitted(sequence.num_tokens, num_cached)
            sequence.admitted_s = self._pace.now_s
        return sequence

    def remove(self, sequence: Sequence) -> None:
        """Give up a place at once."""
        if sequence in self._back:
            self._back.remove(sequence)
            self._back_tokens -= sequence.num_tokens
        else:
            self._lines.remove(sequence)

    def clear(self) -> None:
        """Forget everybody."""
        self._back.clear()
        self._back_tokens = 0
        self._lines.clear()

    def note_output(self, sequence: Sequence, num_tokens: int) -> None:
        """A running sequence got so many tokens: its tenant was served."""
        self._lines.note_output(sequence.tenant, num_tokens)

    def observe(self, now_s: float) -> None:
        """Tell the time."""
        self._pace.observe(now_s)

    def note_plan(self, step: PlannedStep) -> None:
        """A step was planned."""
        self._pace.note_plan(step)

    def note_end(self, sequence: Sequence) -> None:
        """A sequence has ended that ran."""
        self._pace.note_end(sequence.admitted_s)
