"""Tries an ejected replica with one real row that somebody else answers too: nobody waits for it.

When it is time for a probe, and what follows from one, is `cluster.replica_health`'s decision.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.replica_pool import ReplicaPool
from actors.dispatch.round_parts import RemoteStats
from actors.dispatch.transport import ExpertRequest, ExpertRows, PendingReply, TransportError
from cluster.replica_record import State

MAX_ROUND_ROWS = 64
"""Probes go with small rounds, whose times are those of a row, as long as such rounds come."""

_LONG_S = 5.0


def send_probes(
    pool: ReplicaPool,
    stats: RemoteStats,
    layer: int,
    parts: Sequence[ExpertRows],
    size: int,
    clock: Callable[[], float],
    request: Callable[[tuple[ExpertRows, ...]], ExpertRequest],
    agrees: Callable[[ReplicaLink, int, torch.Tensor], bool],
) -> None:
    """One row to each replica that waits for a probe and holds an expert of this round.

    `agrees(link, n, y_D)` says whether what was answered for routed row n contradicts nothing.
    """
    now_s = clock()
    for link in pool.probes(now_s):
        row = next((one.rows.start for one in parts if link in pool.named(layer, one.expert_id)), None)
        expert = next((one.expert_id for one in parts if link in pool.named(layer, one.expert_id)), 0)
        large = sum(one.num_rows for one in parts) > MAX_ROUND_ROWS and now_s < link.record.until_s + _LONG_S
        siblings = pool.siblings(link.replica.replica_id)
        if row is None or large or siblings is None or not pool.book.budget.take():
            continue
        good_s = pool.book.good_probe_s(size, siblings)
        pool.book.probe_sent(link.record, now_s + max(good_s, pool.book.times.timeout_s(size)))
        stats.calls += 1
        stats.hedges += 1
        reply = link.send(request((ExpertRows(expert, slice(row, row + 1)),)))
        reply.when_done(partial(_ended, pool, link, row, now_s, good_s, clock, agrees))


def _ended(
    pool: ReplicaPool,
    link: ReplicaLink,
    row: int,
    sent_s: float,
    good_s: float,
    clock: Callable[[], float],
    agrees: Callable[[ReplicaLink, int, torch.Tensor], bool],
    reply: PendingReply,
) -> None:
    now_s = clock()
    answer = reply.outcome()
    if isinstance(answer, TransportError):
        return pool.book.probe_ended(link.record, None, now_s)
    good = answer.output is not None and now_s - sent_s <= good_s and agrees(link, row, answer.output)
    pool.book.probe_ended(link.record, good, now_s)
    if link.record.state is State.HEALTHY:
        link.times.begin_anew(pool.times.typical())  # how slow it was says nothing any more
    return None
