"""Nobody goes before others serve what he has and everybody knows it: by examples, and after any trouble."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.desired import DesiredReplica
from cluster.desired_set import DesiredSet, Footprint, MoveRefused
from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.handover import Acknowledged, acknowledged
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.processes import ProcessPolicy
from cluster.quarantine import HealthReport
from cluster.reconcile import (
    LEAVE_TIMEOUT_S,
    Action,
    ObservedReplica,
    Phase,
    PublishMap,
    ReconcileState,
    StartReplica,
    StopReplica,
    reconcile,
)

LAYERS, EXPERTS = 2, 4
POLICY = ProcessPolicy(backoff_base_s=1.0, backoff_cap_s=8.0, stable_s=20.0, start_timeout_s=12.0, stop_timeout_s=10.0)


def wanted(name: str, *experts: int, layers: range = range(LAYERS)) -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(name),
        expert_ids=tuple(map(ExpertId, experts)),
        first_layer=LayerId(layers.start),
        num_layers=len(layers),
    )


def seen(replica: DesiredReplica, phase: Phase = Phase.READY, incarnation: int = 1) -> ObservedReplica:
    info = ReplicaInfo(
        replica_id=replica.replica_id,
        expert_ids=replica.expert_ids,
        first_layer=replica.first_layer,
        num_layers=replica.num_layers,
        address=f"host:{replica.replica_id}",
        node_id=NodeId("n0"),
        numerics_domain="fp16",
    )
    return ObservedReplica(
        replica_id=replica.replica_id,
        incarnation=incarnation,
        phase=phase,
        info=info if phase is Phase.READY else None,
    )


def mapped(state: ReconcileState) -> list[str]:
    return [replica.replica_id for replica in state.expert_map.replicas]


EACH = tuple(wanted(f"expert-{e}-r0", e) for e in range(EXPERTS))
HALVES = (wanted("experts-0-1-r0", 0, 1), wanted("experts-2-3-r0", 2, 3))


def settled(*replicas: DesiredReplica) -> ReconcileState:
    _, state = reconcile(replicas, [], 0.0, ReconcileState.initial(LAYERS, EXPERTS))
    _, state = reconcile(replicas, [seen(one) for one in replicas], 1.0, state)
    return state


def knows(state: ReconcileState, *names: str, epoch: int | None = None) -> Acknowledged:
    at = state.expert_map.epoch if epoch is None else epoch
    return Acknowledged(at, frozenset(map(ReplicaId, names or mapped(state))))


def test_the_old_serve_until_the_new_are_in_the_map_and_known() -> None:
    state = settled(*EACH)
    views = [seen(one) for one in EACH]
    actions, state = reconcile(HALVES, views, 2.0, state, acknowledged=knows(state))
    assert actions == tuple(StartReplica(one, 1) for one in HALVES)
    views += [seen(HALVES[0]), seen(HALVES[1], Phase.STARTING)]
    actions, state = reconcile(HALVES, views, 3.0, state, acknowledged=knows(state))
    assert actions == (PublishMap(state.expert_map),)
    assert mapped(state) == [*(one.replica_id for one in EACH), "experts-0-1-r0"]
    behind = knows(state, *mapped(state)[:4], epoch=state.expert_map.epoch - 1)
    assert reconcile(HALVES, views, 4.0, state, acknowledged=behind)[0] == ()
    actions, state = reconcile(HALVES, views, 5.0, state, acknowledged=knows(state))
    assert mapped(state) == ["expert-2-r0", "expert-3-r0", "experts-0-1-r0"]
    assert actions == (PublishMap(state.expert_map),), "they answer whoever has the old map"
    assert state.left.keys() == {"expert-0-r0", "expert-1-r0"}
    actions, state = reconcile(HALVES, views, 6.0, state, acknowledged=knows(state))
    assert actions == tuple(StopReplica(one.replica_id, 1, True, "not wanted any more") for one in EACH[:2])


def test_a_coordinator_that_never_answers_holds_a_replica_up_for_a_while_only() -> None:
    both = (*EACH, wanted("expert-0-r1", 0))
    state = settled(*both)
    views = [seen(one) for one in both]
    stuck = knows(state)
    _, state = reconcile(EACH, views, 2.0, state, acknowledged=stuck)
    assert "expert-0-r1" not in mapped(state)
    actions, state = reconcile(EACH, views, 2.0 + LEAVE_TIMEOUT_S - 0.1, state, acknowledged=stuck)
    assert actions == ()
    actions, _ = reconcile(EACH, views, 2.0 + LEAVE_TIMEOUT_S, state, acknowledged=stuck)
    assert [type(one) for one in actions] == [StopReplica]


def test_the_last_one_never_goes_and_is_not_started_again_either() -> None:
    state = settled(*EACH)
    views = [seen(one) for one in EACH]
    actions, state = reconcile(EACH[1:], views, 2.0, state)
    assert actions == ()
    assert "expert-0-r0" in mapped(state)
    dead = [seen(EACH[0], Phase.DEAD), *views[1:]]
    actions, state = reconcile(EACH[1:], dead, 3.0, state)
    assert not any(isinstance(action, StartReplica) for action in actions)
    assert state.expert_map.missing() == tuple((layer, 0) for layer in range(LAYERS))


def test_who_is_wanted_again_stays() -> None:
    both = (*EACH, wanted("expert-0-r1", 0))
    state = settled(*both)
    views = [seen(one) for one in both]
    _, state = reconcile(EACH, views, 2.0, state, acknowledged=knows(state))
    _, state = reconcile(both, views, 3.0, state, acknowledged=knows(state, epoch=1))
    assert "expert-0-r1" in mapped(state)
    assert state.left == {}


def test_with_more_copies_wanted_more_must_be_there() -> None:
    three = (*EACH, wanted("expert-0-r1", 0), wanted("expert-0-r2", 0))
    state = settled(*three)
    fewer = [one for one in three if one.replica_id != "expert-0-r0"]
    views = [seen(one) for one in three if one.replica_id != "expert-0-r1"]
    _, after = reconcile(fewer, views, 2.0, state, min_copies=2)
    assert "expert-0-r0" in mapped(after), "of the two others one is just down"
    _, after = reconcile(fewer, [*views, seen(three[4])], 2.0, state, min_copies=2)
    assert "expert-0-r0" not in mapped(after)


def report(name: str, epoch: int, state: str = "healthy", who: str = "a") -> HealthReport:
    return HealthReport(coordinator_id=who, map_epoch=epoch, replica_id=ReplicaId(name), state=state)


@pytest.mark.parametrize(
    ("reports", "known"),
    [
        ([report("x", 5), report("x", 5, who="b")], True),
        ([report("x", 5)], False),
        ([report("x", 5), report("x", 4, who="b")], False),
        ([report("x", 5), report("x", 5, "away", who="b")], False),
        ([report("x", 5), report("x", 5, "quarantined", who="b")], False),
        ([report("x", 9, "ejected"), report("x", 5, "probing", who="b"), report("x", 5, who="c")], True),
        ([report("y", 5), report("y", 5, who="b")], False),
    ],
)
def test_known_is_who_every_coordinator_can_ask(reports: list[HealthReport], known: bool) -> None:
    found = acknowledged({"a": 7, "b": 6}, reports, {ReplicaId("x"): 5})
    assert found.can_ask(ReplicaId("x")) is known
    assert (found.has(6), found.has(7)) == (True, False)


def test_without_coordinators_nobody_is_waited_for() -> None:
    found = acknowledged({}, [], {})
    assert found.can_ask(ReplicaId("anybody"))
    assert found.has(1 << 40)


@dataclass
class House:
    """Processes that do as told in their own time, and coordinators that hear of maps late: who is asked answers."""

    phases: dict[ReplicaId, tuple[int, Phase, int]] = field(default_factory=dict)
    replicas: dict[ReplicaId, DesiredReplica] = field(default_factory=dict)
    broken: set[ReplicaId] = field(default_factory=set)
    maps: list[ExpertMap] = field(default_factory=list)
    lag: int = 1
    crashed: int = 0

    def do(self, action: Action) -> None:
        if isinstance(action, StartReplica):
            replica_id = action.replica.replica_id
            before = self.phases.get(replica_id)
            assert before is None or before[1] is Phase.DEAD, f"{replica_id} runs twice: {before}"
            self.replicas[replica_id] = action.replica
            self.phases[replica_id] = action.incarnation, Phase.STARTING, 0
        elif isinstance(action, StopReplica):
            incarnation, phase, _ = self.phases.get(action.replica_id, (0, Phase.DEAD, 0))
            if incarnation == action.incarnation and phase is not Phase.DEAD:
                self.phases[action.replica_id] = incarnation, Phase.STOPPING, 0

    def tick(self, newest: ExpertMap) -> None:
        for replica_id, (incarnation, phase, age) in list(self.phases.items()):
            self.phases[replica_id] = incarnation, phase, age + 1
            if phase is Phase.STARTING and age >= 2:
                ended = Phase.DEAD if replica_id in self.broken else Phase.READY
                self.phases[replica_id] = incarnation, ended, 0
            elif phase is Phase.STOPPING and age >= 2:
                self.phases[replica_id] = incarnation, Phase.DEAD, 0
        self.maps.append(newest)

    @property
    def in_force(self) -> ExpertMap | None:
        """Of the coordinator that is last to hear: none that lacks an expert is taken."""
        whole = [one for one in self.maps[: len(self.maps) - self.lag] if not one.missing()]
        return whole[-1] if whole else None

    def observe(self) -> list[ObservedReplica]:
        return [seen(self.replicas[r], p, i) for r, (i, p, _) in self.phases.items()]

    def reports(self) -> tuple[dict[str, int], list[HealthReport]]:
        """Two coordinators, of which one hears of a map at once."""
        epochs, reports = {}, []
        for who, lag in (("quick", 0), ("slow", self.lag)):
            whole = [one for one in self.maps[: len(self.maps) - lag] if not one.missing()]
            if not whole:
                continue
            epochs[who] = whole[-1].epoch
            for one in whole[-1].replicas:
                up = self.phases[one.replica_id][1] in (Phase.READY, Phase.STOPPING)
                reports.append(report(one.replica_id, whole[-1].epoch, "healthy" if up else "away", who))
        return epochs, reports

    def unanswered(self) -> list[tuple[int, int]]:
        """Places for which the slow coordinator has nobody to ask that takes rows."""
        current = self.in_force
        if current is None:
            return []
        return [
            (layer, expert)
            for layer in range(LAYERS)
            for expert in range(EXPERTS)
            if not any(
                self.phases[one.replica_id][1] is Phase.READY
                for one in current.replicas_for(LayerId(layer), ExpertId(expert))
            )
        ]


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["copy", "drop", "drain", "fold", "break", "heal", "crash a copy", "nothing", "nothing"]),
        st.integers(0, 1 << 30),
        st.integers(0, 1 << 30),
    ),
    max_size=60,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(CHANGES, st.integers(1, 4), st.integers(1, 2))
def test_whatever_changes_everything_is_always_served(
    changes: list[tuple[str, int, int]], lag: int, min_copies: int
) -> None:
    """No process but an extra copy crashes here: so there is never an excuse for an expert without anybody."""
    base = [wanted(f"expert-{e}-r{c}", e) for e in range(EXPERTS) for c in range(min_copies)]
    desired = DesiredSet(
        num_layers=LAYERS, num_experts=EXPERTS, min_copies=min_copies, footprint=Footprint(), replicas=tuple(base)
    )
    house = House(lag=lag)
    state = ReconcileState.initial(LAYERS, EXPERTS)
    for now_s in range(12 + len(changes) + 90):
        at = now_s - 12
        kind, one, other = changes[at] if 0 <= at < len(changes) else ("heal", 0, 0)
        desired = change(desired, house, state, kind, one, other)
        epochs, reports = house.reports()
        actions, state = reconcile(
            desired.replicas,
            house.observe(),
            float(now_s),
            state,
            policy=POLICY,
            acknowledged=acknowledged(epochs, reports, state.joined),
            min_copies=min_copies,
        )
        for action in actions:
            house.do(action)
        house.tick(state.expert_map)
        if at >= 0 and not house.crashed:
            assert house.unanswered() == [], (now_s, kind, mapped(state))
        house.crashed = max(0, house.crashed - 1)
    assert mapped(state) == sorted(desired.ids), "what is desired comes about"
    living = {name for name, (_, phase, _) in house.phases.items() if phase is not Phase.DEAD}
    assert living == desired.ids, "and nothing else"


def change(desired: DesiredSet, house: House, state: ReconcileState, kind: str, one: int, other: int) -> DesiredSet:
    victim = desired.replicas[one % len(desired.replicas)]
    layers = (range(LAYERS), range(1), range(1, LAYERS))[other % 3]
    taken = house.phases.keys()
    try:
        if kind == "copy":
            return desired.copy(one % EXPERTS, layers, NodeId("n0"), taken)[0]
        if kind == "drop":
            expert = victim.expert_ids[other % len(victim.expert_ids)]
            return desired.drop(victim.replica_id, expert, layers, None, taken)[0]
        if kind == "drain":
            return desired.drain(victim.replica_id)
        if kind == "fold":
            return desired.fold(1 << other % 3, taken)
    except MoveRefused:
        return desired
    if kind == "break":
        house.broken.add(victim.replica_id)
    elif kind == "heal":
        house.broken.clear()
    elif kind == "crash a copy" and len(state.expert_map.replicas) > 1:
        others = replace(
            state.expert_map, replicas=tuple(r for r in state.expert_map.replicas if r.replica_id != victim.replica_id)
        )
        phase = house.phases.get(victim.replica_id)
        if phase is not None and phase[1] is Phase.READY and not others.missing():
            house.phases[victim.replica_id] = phase[0], Phase.DEAD, 0
            house.crashed = house.lag + 8  # others may have been about to go: they come back, but not at once
    return desired
