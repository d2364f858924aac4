"""What a round of one layer's rows is made of: parts, the messages that carry them, and what became of them."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.dispatch.merging import MergedRows
from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.transport import ExpertRows, PendingReply, TransportError, WireCounters
from cluster.ids import ReplicaId
from protos import expert_pb2 as pb


@dataclass(slots=True)
class RemoteStats:
    """Since start. `retries` counts messages sent again, `waits` the times that nobody could be asked.

    `compute_us` and `queue_us` are the replicas' own, summed over messages; `send_s` is the time spent sending.
    """

    retries: int = 0
    retry_reasons: Counter[str] = field(default_factory=Counter)
    waits: int = 0
    compute_us: int = 0
    queue_us: int = 0
    send_s: float = 0.0
    wire: WireCounters = field(default_factory=WireCounters)


@dataclass(frozen=True, slots=True)
class Patience:
    """`deadline_s` bounds a round; after `attempt_s` without an answer somebody else is asked, if there is one.

    `wall_us` is the clock of deadlines on the wire, microseconds since 1970.
    """

    deadline_s: float = 60.0
    attempt_s: float = 20.0
    wall_us: Callable[[], int] = lambda: time.time_ns() // 1000


@dataclass(slots=True, eq=False)
class Part:
    """Rows for one expert, and how it goes with them."""

    asked: ExpertRows
    answered: bool = False
    rejections: int = 0
    pursuit: asyncio.Task[None] | None = None
    tried: set[ReplicaId] = field(default_factory=set)


@dataclass(slots=True, eq=False)
class Message:
    """Parts that went to one replica together."""

    parts: Sequence[Part]
    link: ReplicaLink
    sent_s: float
    reply: PendingReply
    merged: MergedRows | None = None
    left: bool = False  # it took too long; but whenever it answers, its link is trusted again


@dataclass(frozen=True, slots=True)
class Failure:
    kind: str
    detail: str


def failure_of(message: Message) -> Failure:
    """Why its answer, which has come, is none, or none that can be used."""
    answer = message.reply.outcome()
    if isinstance(answer, TransportError):
        return Failure("CONNECTION", str(answer))
    if answer.output is not None:
        return Failure("LATE", "somebody else has answered for a part of it")
    return Failure(pb.Status.Name(answer.status).removeprefix("STATUS_"), answer.detail)
