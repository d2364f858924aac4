"""RemoteExperts: the remote twin of `model.experts.LocalExperts`. One message per replica with rows, answers gathered.

No contribution is ever dropped or replaced: a round gives every row its expert's answer or raises. Who can be
reached is `actors.dispatch.replica_pool`'s, asking again `actors.dispatch.expert_round`'s, counting load per expert the
engine's.
"""

import asyncio
from functools import partial

import torch

from actors.dispatch.cross_check import CrossCheck
from actors.dispatch.expert_round import ExpertRound
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.replica_pool import (
    ExpertUnavailable,
    MapRejected,
    ReplicaPool,
    ReplicaStanding,
    RowsRejected,
)
from actors.dispatch.round_parts import Patience, RemoteStats
from actors.dispatch.transport import OpenTransport
from cluster.expert_map import ExpertMap
from cluster.ids import ReplicaId
from cluster.replica_times import ReplicaReport
from cluster.selector import SelectorPolicy
from model.dispatch import Answers, DispatchPlan
from protos.codec import max_rows_for

__all__ = [
    "ExpertUnavailable",
    "MapRejected",
    "Patience",
    "RemoteExperts",
    "RemoteStats",
    "ReplicaStanding",
    "RowsRejected",
]

MESSAGE_BYTES = 1 << 20
"""Rows that travel are cut into messages of so many bytes: one is computed while the next is under way."""


class RemoteExperts:
    """Call everything from one event loop, the constructor too. `max_message_rows` is the most rows of a message.

    `lanes` is the memory shared with replicas on this machine; without it rows only travel. `selector` is how replicas
    are chosen, `seat` this coordinator's number among those that choose.
    """

    def __init__(
        self,
        open_transport: OpenTransport,
        patience: Patience | None = None,
        max_message_rows: int | None = None,
        lanes: LaneMemory | None = None,
        selector: SelectorPolicy | None = None,
        seat: int = 0,
    ) -> None:
        self.stats = RemoteStats()
        self._patience = patience or Patience()
        self._max_message_rows = max_message_rows
        self._lanes = lanes
        self._doorbells = None if lanes is None else lanes.doorbells
        self._pool = ReplicaPool(
            open_transport, self.stats.wire, self._patience.deadline_s, self._patience.health, selector, seat
        )
        self._cross_check = CrossCheck(self.stats)

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map in force."""
        return self._pool.expert_map

    @property
    def alarms(self) -> int:
        """Rises when answers of before may have been wrong, or would be others now.

        Two differed, or a replica was quarantined, or was lost: perhaps because it had caught itself. Or an expert is
        computed in another numerics domain.
        """
        return self.stats.mismatches + self.stats.wire.lost + self._pool.alarms

    def lanes(self) -> dict[ReplicaId, str]:
        """How each replica of the map is connected: `shm`, `grpc`, or empty while it is not."""
        return self._pool.lanes()

    def standings(self) -> list[ReplicaStanding]:
        """How each replica of the map stands: healthy, ejected, probing, quarantined or away."""
        return self._pool.standings()

    def times(self) -> list[ReplicaReport]:
        """What is known of the speed of each replica of the map, by id."""
        return self._pool.times.reports(asyncio.get_running_loop().time())

    @property
    def divisible_rows(self) -> float:
        """The fewest rows of a batch that two replicas of an expert would share, as far as their speed is known."""
        return self._pool.divisible_rows

    def apply_map(self, new: ExpertMap) -> None:
        """Switches maps at once: opens connections to new replicas, closes old ones when they have answered.

        Applying the map in force again does nothing. Raises MapRejected, and the old map stays, for one that
        is older, of another model, or lacks an expert.
        """
        self._pool.apply_map(new)

    async def wait_ready(self, timeout_s: float, *, all_replicas: bool = False) -> None:
        """Returns when every expert of every layer can be asked; with `all_replicas`, when every replica can.

        Raises ExpertUnavailable after `timeout_s`, naming the first that cannot and why.
        """
        await self._pool.wait_ready(timeout_s, all_replicas=all_replicas)

    def lacking(self) -> str | None:
        """The first expert that nobody can be asked for now, and why; None where all can."""
        return self._pool.lacking()

    def start(self, layer: int, plan: DispatchPlan, deadline_s: float | None = None) -> ExpertRound:
        """Sends the rows of `plan` to their experts in `layer`; await the round's `result`, or abandon it.

        `deadline_s` is on the event loop's clock: from then on nobody wants the answers, and replicas that have not
        begun leave it at that.

        The result is what LocalExperts gives, or, combined, has its bits; ExpertUnavailable is raised when an expert
        has not answered before the deadline; then nothing is given.
        """
        x_ND, free = self._gather(plan)
        try:
            return ExpertRound(
                self._pool,
                self._doorbells,
                self.stats,
                self._patience,
                self._cross_check,
                layer,
                plan,
                x_ND,
                self._max_rows(x_ND),
                free,
                deadline_s,
            )
        except BaseException:
            free()
            raise

    async def run(self, layer: int, plan: DispatchPlan) -> Answers:
        """`start`, and its result."""
        return await self.start(layer, plan).result()

    async def close(self) -> None:
        """Closes every connection; a `run` that waits fails."""
        await self._pool.close()
        if self._lanes is not None:
            self._lanes.close()

    def _gather(self, plan: DispatchPlan) -> tuple[torch.Tensor, partial[None]]:
        """The routed rows, in shared memory where there is room, and what gives the room back."""
        width = plan.x_TD.shape[1]
        pool = None if self._lanes is None else self._lanes.rows
        if pool is not None and pool.region.width == width and plan.x_TD.dtype == torch.float32:
            rows_ND = pool.take(plan.num_rows)
            if rows_ND is not None:
                plan.gather(rows_ND)
                return rows_ND, partial(pool.free, rows_ND)
        return plan.x_ND.detach().to("cpu"), partial(_nothing)

    def _max_rows(self, x_ND: torch.Tensor) -> int:
        row_bytes = x_ND.shape[1] * x_ND.dtype.itemsize
        most = self._max_message_rows or max(1, MESSAGE_BYTES // row_bytes)
        return min(most, max_rows_for(x_ND.shape[1], x_ND.dtype))


def _nothing() -> None:
    pass
