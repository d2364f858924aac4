"""RemoteExperts: the remote twin of `model.experts.LocalExperts`. One message per expert with rows, answers gathered.

No contribution is ever dropped or replaced: a `run` gives every row its expert's answer or raises. Who can be
reached is `actors.dispatch.replica_pool`'s, asking again `actors.dispatch.expert_round`'s, counting load per expert the
engine's.
"""

import torch

from actors.dispatch.expert_round import ExpertRound, Part, Patience, RemoteStats
from actors.dispatch.replica_pool import ExpertUnavailable, MapRejected, ReplicaPool
from actors.dispatch.transport import OpenTransport
from cluster.expert_map import ExpertMap
from model.dispatch import DispatchPlan
from protos.codec import max_rows_for

__all__ = ["ExpertUnavailable", "MapRejected", "Patience", "RemoteExperts", "RemoteStats"]


class RemoteExperts:
    """Call everything from one event loop, the constructor too. `max_message_rows` cuts long parts into messages."""

    def __init__(
        self,
        open_transport: OpenTransport,
        patience: Patience | None = None,
        max_message_rows: int | None = None,
    ) -> None:
        self.stats = RemoteStats()
        self._patience = patience or Patience()
        self._max_message_rows = max_message_rows
        self._pool = ReplicaPool(open_transport, self.stats.wire, self._patience.deadline_s)

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map in force."""
        return self._pool.expert_map

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

    async def run(self, layer: int, plan: DispatchPlan) -> torch.Tensor:
        """out_ND: the rows of `plan`, each through its expert in `layer`, bit for bit as LocalExperts gives them.

        Raises ExpertUnavailable when an expert has not answered before the deadline; then nothing is given.
        """
        parts = self._parts(plan)
        if not parts:
            return torch.empty_like(plan.x_ND)
        hidden_ND = plan.x_ND.detach().to("cpu")
        step = ExpertRound(self._pool, self.stats, self._patience, layer, hidden_ND, parts)
        return (await step.result()).to(plan.x_ND.device)

    async def close(self) -> None:
        """Closes every connection; a `run` that waits fails."""
        await self._pool.close()

    def _parts(self, plan: DispatchPlan) -> list[Part]:
        fit = max_rows_for(plan.x_ND.shape[1], plan.x_ND.dtype)
        most = min(fit, self._max_message_rows or fit)
        parts: list[Part] = []
        start = 0
        for expert, count in enumerate(plan.counts):
            stop = start + count
            parts += [Part(expert, slice(at, min(at + most, stop))) for at in range(start, stop, most)]
            start = stop
        return parts
