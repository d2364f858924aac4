"""The replicas that a coordinator can reach: the map in force, a link to each replica in it, and who may be asked.

Changing the map is a pointer assignment; links that leave answer what is in flight first. Sending rows and
asking again is `actors.dispatch.expert_round`'s, the order among the able `cluster.selector`'s.
"""

import asyncio
import contextlib

from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.transport import OpenTransport, WireCounters
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, ReplicaId
from cluster.selector import candidates

_NAMED_MISSING = 4  # places named in the message about an incomplete map


class ExpertUnavailable(Exception):
    """Nobody answered for an expert before the deadline, or its replicas refuse the rows."""

    def __init__(self, expert: int, layer: int, reason: str) -> None:
        super().__init__(f"expert {expert} in layer {layer} is unavailable: {reason}")
        self.expert = expert
        self.layer = layer
        self.reason = reason


class MapRejected(ValueError):
    """A map that is older, of another model, or lacks an expert. The map in force stays."""


class ReplicaPool:
    """`retire_s` is how long a link that left the map may take to answer what is in flight."""

    def __init__(self, open_transport: OpenTransport, counters: WireCounters, retire_s: float) -> None:
        self.closed = False
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, whenever the map changes or a replica comes or goes."""
        self._open_transport = open_transport
        self._counters = counters
        self._retire_s = retire_s
        self._map: ExpertMap | None = None
        self._links: dict[ReplicaId, ReplicaLink] = {}
        self._named: dict[tuple[int, int], tuple[ReplicaLink, ...]] = {}
        self._retiring: set[asyncio.Task[None]] = set()
        self._inflight: dict[ReplicaId, int] = {}
        self._usable: frozenset[ReplicaId] = frozenset()

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map in force."""
        return self._map

    @property
    def epoch(self) -> int:
        """The epoch in force; 0 before the first map."""
        return 0 if self._map is None else self._map.epoch

    def able(self, layer: int, expert: int) -> list[ReplicaLink]:
        """Links to which rows of this expert can be sent now, best first, those under suspicion last."""
        if self._map is None:
            return []
        ranked = candidates(self._map, LayerId(layer), ExpertId(expert), self._inflight, self._usable)
        links = [self._links[replica.replica_id] for replica in ranked]
        return sorted((link for link in links if link.usable), key=lambda link: link.suspect)

    def best(self, layer: int, expert: int) -> ReplicaLink | None:
        """The first of `able`, found quickly: this is asked for every expert of every layer."""
        named = self._named.get((layer, expert), ())
        if len(named) == 1:
            return named[0] if named[0].usable else None
        able = self.able(layer, expert)
        return able[0] if able else None

    def apply_map(self, new: ExpertMap) -> None:
        """Switches to `new` at once; applying the map in force again does nothing. Raises MapRejected."""
        if new == self._map:
            return
        self._check(new)
        links = {replica.replica_id: self._link(replica) for replica in new.replicas}
        for replica_id, link in self._links.items():
            if links.get(replica_id) is not link:
                self._retire(link)
        self._links = links
        self._map = new
        self._named = {
            (layer, expert): tuple(links[one.replica_id] for one in new.replicas_for(LayerId(layer), ExpertId(expert)))
            for layer in range(new.num_layers)
            for expert in range(new.num_experts)
        }
        self._note_change()

    async def wait_ready(self, timeout_s: float, *, all_replicas: bool) -> None:
        """Returns when every expert of every layer can be asked, or every replica. Raises ExpertUnavailable."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while (lacking := self._lacking(all_replicas)) is not None:
            remaining_s = deadline_s - loop.time()
            if remaining_s <= 0 or self.closed:
                layer, expert = lacking
                raise ExpertUnavailable(expert, layer, self.why_not(layer, expert))
            await self.wait_for_change(self.changed, remaining_s)

    async def wait_for_change(self, changed: asyncio.Event, timeout_s: float) -> None:
        """Returns when `changed`, this pool's event as the caller saw it, is set, or after `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(changed.wait(), timeout_s)

    def why_not(self, layer: int, expert: int) -> str:
        """Why nobody can be asked for this expert, in words."""
        if self.closed:
            return "the connections are closed"
        if self._map is None:
            return "no map has been applied"
        replicas = self._map.replicas_for(LayerId(layer), ExpertId(expert))
        states = (f"{replica.replica_id}: {self._links[replica.replica_id].failure}" for replica in replicas)
        return "; ".join(states)

    async def close(self) -> None:
        """Closes every connection; what is in flight fails."""
        self.closed = True
        links, self._links, self._named, self._map = list(self._links.values()), {}, {}, None
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*(link.close() for link in links), *self._retiring, return_exceptions=True)
        self._note_change()

    def lanes(self) -> dict[ReplicaId, str]:
        """By which lane each replica of the map is connected; empty for one that is not."""
        return {replica_id: link.lane for replica_id, link in self._links.items()}

    def _check(self, new: ExpertMap) -> None:
        if self.closed:
            raise MapRejected("the connections are closed")
        missing = new.missing()
        if missing:
            places = ", ".join(f"expert {expert} in layer {layer}" for layer, expert in missing[:_NAMED_MISSING])
            raise MapRejected(f"epoch {new.epoch} lacks {len(missing)} places: {places}")
        if self._map is None:
            return
        if new.epoch <= self._map.epoch:
            raise MapRejected(f"epoch {new.epoch} is not newer than {self._map.epoch}")
        if (new.num_layers, new.num_experts) != (self._map.num_layers, self._map.num_experts):
            shapes = f"{new.num_layers}x{new.num_experts}, not {self._map.num_layers}x{self._map.num_experts}"
            raise MapRejected(f"epoch {new.epoch} is of another model: {shapes}")

    def _link(self, replica: ReplicaInfo) -> ReplicaLink:
        """The link there is, if it leads to the same process in the same numerics domain, or a new one."""
        link = self._links.get(replica.replica_id)
        if link is not None and _place(link.replica) == _place(replica):
            return link
        return ReplicaLink(replica, self._open_transport, self._counters, self._inflight, self._note_change)

    def _retire(self, link: ReplicaLink) -> None:
        task = asyncio.create_task(link.retire(self._retire_s))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    def _lacking(self, all_replicas: bool) -> tuple[int, int] | None:
        """The first (layer, expert) that nobody, or not everybody who should, can be asked for."""
        if self._map is None:
            return 0, 0
        for layer in range(self._map.num_layers):
            for expert in range(self._map.num_experts):
                named = self._map.replicas_for(LayerId(layer), ExpertId(expert))
                if len(self.able(layer, expert)) < (len(named) if all_replicas else 1):
                    return layer, expert
        return None

    def _note_change(self) -> None:
        self._usable = frozenset(replica_id for replica_id, link in self._links.items() if link.usable)
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


def _place(replica: ReplicaInfo) -> tuple[str, str]:
    return replica.address, replica.numerics_domain
