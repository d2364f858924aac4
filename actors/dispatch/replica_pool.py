"""The replicas that a coordinator can reach: the map in force, a link to each replica in it, and who may be asked.

Changing the map is a pointer assignment; links that leave answer what is in flight first. Sending rows and
asking again is `actors.dispatch.expert_round`'s, who gets which rows `actors.dispatch.choosing`'s, who is passed over
`cluster.replica_health`'s.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from actors.dispatch.choosing import Chosen, choose
from actors.dispatch.replica_link import ReplicaLink
from actors.dispatch.transport import ExpertRows, OpenTransport, WireCounters
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, ReplicaId
from cluster.replica_health import HealthBook
from cluster.replica_record import HealthPolicy, ReplicaRecord
from cluster.replica_times import TimesBook
from cluster.selector import Selector, SelectorPolicy, candidates

LOG = logging.getLogger(__name__)

_NAMED_MISSING = 4  # places named in the message about an incomplete map


class ExpertUnavailable(Exception):
    """Nobody answered for an expert before the deadline, or its replicas refuse the rows."""

    def __init__(self, expert: int, layer: int, reason: str) -> None:
        super().__init__(f"expert {expert} in layer {layer} is unavailable: {reason}")
        self.expert = expert
        self.layer = layer
        self.reason = reason


class RowsRejected(ExpertUnavailable):
    """Its replicas refuse the rows themselves, again and again: waiting would not help."""


class MapRejected(ValueError):
    """A map that is older, of another model, or lacks an expert. The map in force stays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStanding:
    """How a replica of the map stands with this coordinator: `state` is `away` or one of `cluster.replica_health`."""

    replica_id: ReplicaId
    state: str
    detail: str
    ejections_total: int


class ReplicaPool:
    """`retire_s` is how long a link that left the map may take to answer what is in flight; `seat` is the
    coordinator's number (`cluster.selector`).
    """

    def __init__(
        self,
        open_transport: OpenTransport,
        counters: WireCounters,
        retire_s: float,
        health: HealthPolicy | None = None,
        selector: SelectorPolicy | None = None,
        seat: int = 0,
    ) -> None:
        self.book = HealthBook(self.siblings, health)
        self.times = TimesBook()
        self.closed = False
        self.alarms = 0
        """Times that a replica was quarantined, or that an expert's numerics domain became another."""
        self.changed = asyncio.Event()
        """Set, and replaced by a new one, whenever the map changes or a replica comes or goes."""
        self._open_transport = open_transport
        self._counters = counters
        self._retire_s = retire_s
        self._selector = Selector(selector, seat)
        self._clock = asyncio.get_running_loop().time
        self._map: ExpertMap | None = None
        self._links: dict[ReplicaId, ReplicaLink] = {}
        self._named: dict[tuple[int, int], tuple[ReplicaLink, ...]] = {}
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def expert_map(self) -> ExpertMap | None:
        """The map in force."""
        return self._map

    @property
    def epoch(self) -> int:
        """The epoch in force; 0 before the first map."""
        return 0 if self._map is None else self._map.epoch

    def able(self, layer: int, expert: int) -> list[ReplicaLink]:
        """Links to which rows of this expert can be sent now, best first, those passed over last."""
        if self._map is None:
            return []
        usable = {link.replica.replica_id: link for link in self.named(layer, expert) if link.usable}
        ranks = {replica_id: link.record.rank for replica_id, link in usable.items()}
        inflight = {replica_id: link.times.tokens for replica_id, link in usable.items()}
        ranked = candidates(self._map, LayerId(layer), ExpertId(expert), inflight, usable, ranks)
        return [usable[replica.replica_id] for replica in ranked]

    @property
    def divisible_rows(self) -> float:
        """The fewest rows of a batch that two replicas of an expert would share."""
        return self._selector.policy.divisible_rows(self.times.usual())

    def choose(self, layer: int, parts: Sequence[ExpertRows]) -> Chosen:
        """Who gets which rows of a layer: `parts` are whole experts, in ascending order."""
        return choose(self._named, layer, parts, self._selector, self._clock())

    def named(self, layer: int, expert: int) -> tuple[ReplicaLink, ...]:
        """Links to all that hold this expert, whether they can be asked or not, by id."""
        return self._named.get((layer, expert), ())

    def siblings(self, replica_id: ReplicaId) -> list[ReplicaRecord] | None:
        """See cluster.replica_health.Siblings."""
        link = self._links.get(replica_id)
        if link is None:
            return None
        found: dict[ReplicaId, ReplicaRecord] = {}
        for layer in link.replica.layers:
            for expert in link.replica.expert_ids:
                others = [one for one in self.named(layer, expert) if one is not link and one.usable]
                standing = {one.replica.replica_id: one.record for one in others if one.record.rank <= 0}
                if not standing:
                    return None
                found |= standing
        return list(found.values())

    def probes(self, now_s: float) -> list[ReplicaLink]:
        """Ejected replicas that are to be tried now: connected, with nothing to answer."""
        due = self.book.review(now_s)
        links = [self._links[one.replica_id] for one in due if one.replica_id in self._links]
        return [link for link in links if link.usable and not link.unanswered]

    def quarantine(self, link: ReplicaLink, why: str) -> None:
        """Nothing more is sent to this process, and nothing that it answers is believed."""
        LOG.error("%s is quarantined: %s", link.replica.replica_id, why)
        self.alarms += 1
        self.book.quarantine(link.record, why)
        self._note_change()

    def standings(self) -> list[ReplicaStanding]:
        """Of the replicas of the map, by id."""
        return [self._standing(link) for _, link in sorted(self._links.items())]

    def _standing(self, link: ReplicaLink) -> ReplicaStanding:
        record = link.record
        away = not link.connected and not record.quarantined
        return ReplicaStanding(
            replica_id=record.replica_id,
            state="away" if away else record.state.value,
            detail=link.failure if away else record.detail,
            ejections_total=record.ejections_total,
        )

    def apply_map(self, new: ExpertMap) -> None:
        """Switches to `new` at once; applying the map in force again does nothing. Raises MapRejected."""
        if new == self._map:
            return
        self._check(new)
        links = {replica.replica_id: self._link(replica) for replica in new.replicas}
        for replica_id, link in self._links.items():
            if links.get(replica_id) is not link:
                self._retire(link)
        self.alarms += self._map is not None and _domains(self._map) != _domains(new)
        self._links = links
        self._map = new
        self._named = {
            (layer, expert): tuple(links[one.replica_id] for one in new.replicas_for(LayerId(layer), ExpertId(expert)))
            for layer in range(new.num_layers)
            for expert in range(new.num_experts)
        }
        self.book.keep(links)
        self.times.keep(links)
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
            async with asyncio.timeout(timeout_s):
                await changed.wait()

    def why_not(self, layer: int, expert: int) -> str:
        """Why nobody can be asked for this expert, in words."""
        if self.closed:
            return "the connections are closed"
        if self._map is None:
            return "no map has been applied"
        replicas = self._map.replicas_for(LayerId(layer), ExpertId(expert))
        states = (f"{replica.replica_id}: {self._links[replica.replica_id].failure}" for replica in replicas)
        return "; ".join(states)

    def lacking(self) -> str | None:
        """The first expert that nobody can be asked for now, and why; None where all can."""
        place = self._lacking(all_replicas=False)
        return None if place is None else f"expert {place[1]} in layer {place[0]}: {self.why_not(*place)}"

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
            link.replica = replica  # it may hold more layers by now
            return link
        return ReplicaLink(replica, self._open_transport, self._counters, self._note_change, self.book, self.times)

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
        if self.book.watching:
            self.book.reinstate()
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


def _domains(expert_map: ExpertMap) -> dict[ExpertId, str]:
    return {expert: replica.numerics_domain for replica in expert_map.replicas for expert in replica.expert_ids}


def _place(replica: ReplicaInfo) -> tuple[str, str]:
    return replica.address, replica.numerics_domain
