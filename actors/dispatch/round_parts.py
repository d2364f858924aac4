"""What a round of one layer's rows is made of: parts, the messages that carry them, and what became of them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from actors.dispatch.merging import MergedRows
from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.transport import ExpertRows, PendingReply, TransportError, WireCounters
from cluster.ids import ReplicaId
from cluster.replica_record import HealthPolicy
from protos import expert_pb2 as pb

DOUBTED = frozenset({"NONFINITE", "MALFORMED"})
"""Kinds of failure that may be the replica's own: who is right, another one's answer tells."""


@dataclass(slots=True)
class RemoteStats:
    """Since start. `calls` are all messages to experts, `retries` those of them that were sent again, `waits` the times
    that nobody could be asked.

    `hedges` were sent beside one that was still under way for the same rows, to a second replica or as a probe, and
    `hedges_won` came first. `mismatches` are pairs of answers to the same rows that differ. `compute_us` and
    `queue_us` are the replicas' own, summed over messages; `send_s` is the time spent sending.
    """

    calls: int = 0
    retries: int = 0
    retry_reasons: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    hedges: int = 0
    hedges_won: int = 0
    mismatches: int = 0
    compute_us: int = 0
    queue_us: int = 0
    send_s: float = 0.0
    wire: WireCounters = field(default_factory=WireCounters)


@dataclass(frozen=True, slots=True)
class Patience:
    """`deadline_s` bounds a round; `health` decides when somebody else is asked, if there is one.

    `wall_us` is the clock of deadlines on the wire, microseconds since 1970.
    """

    deadline_s: float = 60.0
    health: HealthPolicy = field(default_factory=HealthPolicy)
    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000


@dataclass(slots=True, eq=False)
class Part:
    """Rows for one expert, and how it goes with them.

    `attempts` are the messages that carried them, `answered_by` is the one whose rows are in place (no sums), `tried`
    are the replicas that failed since the last change or pause. Rows that are too many for another lane go again in
    `pieces`, and either all of those or the whole is the answer.
    """

    asked: ExpertRows
    answered: bool = False
    answered_by: "Message | None" = None
    attempts: tuple["Message", ...] = ()
    tried: frozenset[ReplicaId] = frozenset()
    pieces: tuple["Part", ...] = ()
    rejections: int = 0
    pursuit: asyncio.Task[None] | None = None
    pauses: Iterator[float] | None = None

    @property
    def under_way(self) -> list["Message"]:
        """Messages that may still bring its answer."""
        return [message for message in self.attempts if not message.reply.done()]


@dataclass(slots=True, eq=False)
class Message:
    """Parts that went to one replica together; `due_s` is when its answer is overdue.

    `left` says that somebody else was asked: whoever waits, the replica is trusted again when it answers. `hedge` is
    the message that was sent then.
    """

    parts: Sequence[Part]
    link: ReplicaLink
    sent_s: float
    due_s: float
    reply: PendingReply
    merged: MergedRows | None = None
    hedge: bool = False
    left: bool = False
    postponed: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str
    detail: str


def failure_of(message: Message) -> Failure:
    """Why its answer, which has come, is none, or none that can be used."""
    answer = message.reply.outcome()
    if isinstance(answer, TransportError):
        return Failure("CONNECTION", str(answer))
    if answer.malformed:
        return Failure("MALFORMED", answer.detail)
    if answer.output is None:
        return Failure(pb.Status.Name(answer.status).removeprefix("STATUS_"), answer.detail)
    if message.link.record.quarantined:
        return Failure("QUARANTINED", message.link.record.detail)
    return Failure("LATE", "somebody else has answered for a part of it")


def still_open(parts: Iterable[Part]) -> Iterator[Part]:
    """Those without an answer; of one that goes in pieces, the pieces."""
    for part in parts:
        if part.pieces:
            yield from still_open(part.pieces)
        elif not part.answered:
            yield part
