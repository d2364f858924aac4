"""What a person may do to replicas by hand: replicate an expert, drain a replica, fold and unfold, balance now.

Each is a change of the desired set, checked before anything happens; what follows is `cluster.reconcile`'s, as for
balancing. Answers are plain dicts, since they go to another process. Errors are `cluster.desired_set.MoveRefused`.
"""

from dataclasses import replace
from itertools import pairwise
from typing import Any

from actors.ray_runtime import RuntimeFailure
from actors.supervision.asking import PolicyFailed
from actors.supervision.balancing import Balancing, Plan, told
from actors.supervision.keepers import Say
from actors.supervision.mover import Mover
from cluster.desired_set import MoveRefused
from cluster.ids import NodeId, ReplicaId
from cluster.layout import Grain, Layout
from cluster.live_layout import check_room, layout_of
from cluster.policy import moved_bytes


class Verbs:
    """The verbs of one cluster."""

    def __init__(self, mover: Mover, balancing: Balancing, say: Say) -> None:
        self._mover = mover
        self._balancing = balancing
        self._say = say

    def replicate(self, expert: int, first: int | None, last: int | None, node: str | None) -> dict[str, Any]:
        """One more replica of the expert, in layers `first` to `last` or in all, on `node` or where there is room.

        `node` may be the beginning of an id. Returns its id and its node.
        """
        experts = self._mover.experts
        desired = experts.desired
        layers = range(0 if first is None else first, desired.num_layers if last is None else last + 1)
        desired.check_place(expert, layers)
        layout, unit = self._layout_with(expert, layers)
        node_id = self._node(node) if node is not None else self._roomiest(layout, unit)
        check_room(layout, unit, node_id)
        full = self._why_full(node_id, layout, unit)
        if full is not None:
            raise MoveRefused(full)
        changed, replica_id = desired.copy(expert, layers, node_id, self._mover.taken)
        experts.change(changed)
        self._say(f"{replica_id} is made by hand on {node_id[:8]}")
        return {"replica_id": replica_id, "node_id": node_id}

    def drain(self, replica_id: str) -> dict[str, Any]:
        """That replica answers what it has, and ends."""
        experts = self._mover.experts
        try:
            experts.change(experts.desired.drain(ReplicaId(replica_id)))
        except MoveRefused as error:
            raise MoveRefused(f"{replica_id} is not drained: {error}") from None
        self._say(f"{replica_id} is drained by hand")
        return {"replica_id": replica_id}

    def fold(self, num_groups: int) -> dict[str, Any]:
        """All experts in so many processes (times the configured replicas). Returns who comes and who goes."""
        experts = self._mover.experts
        before = experts.desired
        after = before.fold(num_groups, self._mover.taken)
        experts.change(after)
        self._say(f"{before.num_experts} experts are folded into {num_groups} processes by hand")
        return {"made": sorted(after.ids - before.ids), "gone": sorted(before.ids - after.ids)}

    async def balance(self, *, dry_run: bool) -> dict[str, Any]:
        """Asks the policy now; without `dry_run` its moves are made, which takes as long as they take.

        Raises RuntimeFailure where there is nothing to go by yet, or the policy failed.
        """
        done: tuple[Plan, tuple[dict[str, Any], ...]] | None
        try:
            if dry_run:
                plan = await self._balancing.plan()
                done = None if plan is None else (plan, ())
            else:
                done = await self._balancing.once()
        except PolicyFailed as error:
            raise RuntimeFailure(str(error)) from None
        if done is None:
            raise RuntimeFailure("no load has been seen yet: ask again when requests have been served for a while")
        plan, failed = done
        return {**_about(plan), "failed": list(failed)}

    def _layout_with(self, expert: int, layers: range) -> tuple[Layout, int]:
        """The layout in whose grain these layers are one unit of their own; slots are counted in another grain."""
        mover = self._mover
        desired = mover.experts.desired
        bounds = sorted({0, layers.start, layers.stop, desired.num_layers})
        grain = Grain(num_experts=desired.num_experts, bounds=tuple(bounds), layer_bytes=desired.footprint.layer_bytes)
        return layout_of(desired, grain, replace(mover.ground, expert_slots=None)), grain.unit(layers.start, expert)

    def _why_full(self, node_id: NodeId, layout: Layout, unit: int) -> str | None:
        """Why the slots of a node do not suffice for a unit of that layout, or None."""
        slots, counted = self._mover.ground.expert_slots, self._mover.layout
        column = [host.node_id for host in counted.hosts].index(node_id)
        held = int(counted.held_UN[:, column].sum())
        layers, bounds = layout.grain.layers(unit), counted.grain.bounds
        more = sum(layers.start <= low and high <= layers.stop for low, high in pairwise(bounds))
        if slots is None or held + more <= slots:
            return None
        return f"node {node_id} is full: it holds {held} of {slots}"

    def _roomiest(self, layout: Layout, unit: int) -> NodeId:
        """The node with most room of those that may take the unit. Raises MoveRefused."""
        able = [
            column
            for column, host in enumerate(layout.hosts)
            if not host.draining
            and not layout.held_UN[unit, column]
            and layout.slots_free_N[column] >= 1
            and layout.bytes_free_N[column] >= layout.grain.bytes_U[unit]
            and self._why_full(host.node_id, layout, unit) is None
        ]
        if not able:
            raise MoveRefused(f"no node has room for another copy of {layout.grain.say(unit)}")
        held_N = layout.held_UN.sum(axis=0)
        return layout.hosts[min(able, key=lambda n: (int(held_N[n]), -int(layout.slots_free_N[n]), n))].node_id

    def _node(self, beginning: str) -> NodeId:
        found = [node.node_id for node in self._mover.experts.nodes if node.node_id.startswith(beginning)]
        if len(found) != 1:
            there = ", ".join(node.node_id[:8] for node in self._mover.experts.nodes)
            kind = "there is no node" if not found else f"{len(found)} nodes begin with"
            raise MoveRefused(f"{kind} {beginning!r}; there are {there}")
        (node_id,) = found
        return NodeId(node_id)


def _about(plan: Plan) -> dict[str, Any]:
    """A plan as plain values."""
    (share_before, share_after), (even_before, even_after) = plan.shares, plan.balancedness
    return {
        "moves": [told(action, plan.layout) for action in plan.actions],
        "moved_bytes": moved_bytes(plan.actions),
        "busiest_share_before": round(share_before, 4),
        "busiest_share_after": round(share_after, 4),
        "balancedness_before": round(even_before, 4),
        "balancedness_after": round(even_after, 4),
    }
