"""Whose turn it is: a line per tenant, and the tenant that was served least goes first.

Service is counted in tokens, as they are computed, not guessed before ("virtual token counter", Y. Sheng et al.,
"Fairness in Serving Large Language Models", OSDI 2024): a prompt when it is admitted, output as it comes, both only
while somebody waits. Who comes back to wait is lifted to those who wait already, so nobody saves up turns. Within a
tenant lower `priority` goes first, then who came first; a tenant may starve its own requests so, and nobody else's.
Who runs is not interrupted for whose turn it is. Bounds are `cluster.waiting_queue`'s.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from cluster.sequence import Sequence

OUTPUT_WEIGHT = 2
"""A token of output counts as so many of a prompt, which are computed hundreds at a time (as in the paper)."""

MAX_TENANTS = 4096
"""Whose service is remembered while they have nothing in line."""


@dataclass(slots=True)
class Line:
    """One tenant's waiting sequences, in their order."""

    tenant: str
    sequences: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0


class FairQueue:
    """Sequences in lines by tenant."""

    def __init__(self) -> None:
        self._lines: dict[str, Line] = {}
        self._served: dict[str, int] = {}
        self._last_left = ""
        self._head: Sequence | None = None
        self._num = 0
        self.num_tokens = 0

    def __len__(self) -> int:
        return self._num

    def __iter__(self) -> Iterator[Sequence]:
        for line in self._lines.values():
            yield from line.sequences

    @property
    def num_tenants(self) -> int:
        """Tenants that wait."""
        return len(self._lines)

    def line(self, tenant: str) -> Line:
        """Who of that tenant waits; an empty line where nobody does."""
        return self._lines.get(tenant) or Line(tenant)

    def longest(self, *, by_tokens: bool) -> Line:
        """The line with the most sequences, or the most tokens. There must be one."""
        return max(self._lines.values(), key=lambda one: one.num_tokens if by_tokens else len(one.sequences))

    def add(self, sequence: Sequence) -> None:
        """Joins its tenant's line."""
        line = self._lines.get(sequence.tenant)
        if line is None:
            self._lift(sequence.tenant)
            line = self._lines[sequence.tenant] = Line(sequence.tenant)
        insort(line.sequences, sequence, key=_order)
        line.num_tokens += sequence.num_tokens
        self._num += 1
        self.num_tokens += sequence.num_tokens

    def remove(self, sequence: Sequence) -> None:
        """Leaves its line without having been served."""
        line = self._lines[sequence.tenant]
        line.sequences.remove(sequence)
        line.num_tokens -= sequence.num_tokens
        self._num -= 1
        self.num_tokens -= sequence.num_tokens
        if self._head is sequence:
            self._head = None
        if not line.sequences:
            del self._lines[sequence.tenant]
            self._last_left = sequence.tenant

    def head(self) -> Sequence | None:
        """Who is next. Once named it stays so until it is served or gone: who needs much room cannot be overtaken."""
        if self._head is None and self._lines:
            firsts = [line.sequences[0] for line in self._lines.values()]
            self._head = min(firsts, key=lambda one: (self._served.get(one.tenant, 0), one.arrival))
        return self._head

    def pop(self) -> Sequence:
        """Serves the head; its tokens count."""
        sequence = self.head()
        assert sequence is not None, "nobody waits"
        self._count(sequence.tenant, sequence.num_tokens)
        self.remove(sequence)
        return sequence

    def note_output(self, tenant: str, num_tokens: int) -> None:
        """A running sequence of `tenant` got so many tokens; it counts where somebody waits."""
        if self._lines:
            self._count(tenant, OUTPUT_WEIGHT * num_tokens)

    def ahead_of(self, sequence: Sequence, behind: int = 0) -> tuple[int, int]:
        """About how many sequences and tokens would be served before `sequence`, if it came now behind so many like it.

        All that its tenant has in line, and as much of every other tenant, if it has so much.
        """
        own = self.line(sequence.tenant)
        num, tokens = len(own.sequences) + behind, own.num_tokens + behind * sequence.num_tokens
        most, most_tokens = num + 1, tokens + sequence.num_tokens
        for line in self._lines.values():
            if line is not own:
                num += min(len(line.sequences), most)
                tokens += min(line.num_tokens, most_tokens)
        return num, tokens

    def clear(self) -> None:
        """Forgets who waits, not who was served."""
        self._lines.clear()
        self._head = None
        self._num = self.num_tokens = 0

    def _lift(self, tenant: str) -> None:
        """Who did not wait has no claim to what others got meanwhile."""
        waiting = [self._served.get(other, 0) for other in self._lines]
        floor = min(waiting) if waiting else self._served.get(self._last_left, 0)
        if floor > self._served.get(tenant, 0):
            self._count(tenant, floor - self._served.get(tenant, 0))

    def _count(self, tenant: str, num_tokens: int) -> None:
        self._served[tenant] = self._served.get(tenant, 0) + num_tokens
        if len(self._served) > MAX_TENANTS + len(self._lines):
            self._forget_one(tenant)

    def _forget_one(self, but: str) -> None:
        """Of those that do not wait, who was served least: it would be lifted furthest anyway."""
        idle = (one for one in self._served if one not in self._lines and one not in (but, self._last_left))
        least = min(idle, key=lambda one: self._served[one], default=None)
        if least is not None:
            del self._served[least]


def _order(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival
