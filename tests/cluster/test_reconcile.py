"""What is desired comes about, whatever the processes do in the meantime, and the map says who serves."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.desired import DesiredReplica
from cluster.expert_map import ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.processes import ProcessPolicy
from cluster.reconcile import (
    GROWS_AFTER_S,
    Action,
    ObservedReplica,
    Phase,
    PublishMap,
    ReconcileState,
    StartReplica,
    StopReplica,
    reconcile,
)

NUM_LAYERS = 2
LATE_S = 2.0 + GROWS_AFTER_S
POLICY = ProcessPolicy(backoff_base_s=1.0, backoff_cap_s=8.0, stable_s=20.0, start_timeout_s=12.0, stop_timeout_s=10.0)


def wanted(expert: int, copy: int = 0) -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(f"expert-{expert}-r{copy}"),
        expert_ids=(ExpertId(expert),),
        first_layer=LayerId(0),
        num_layers=NUM_LAYERS,
    )


def info(replica: DesiredReplica, address: str = "", domain: str = "fp16") -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=replica.replica_id,
        expert_ids=replica.expert_ids,
        first_layer=replica.first_layer,
        num_layers=replica.num_layers,
        address=address or f"host:{replica.replica_id}",
        node_id=NodeId("n0"),
        numerics_domain=domain,
    )


def seen(
    replica: DesiredReplica, phase: Phase, incarnation: int = 1, domain: str = "fp16", address: str = ""
) -> ObservedReplica:
    return ObservedReplica(
        replica_id=replica.replica_id,
        incarnation=incarnation,
        phase=phase,
        info=info(replica, address, domain) if phase is Phase.READY else None,
    )


def mapped(state: ReconcileState) -> list[str]:
    return [replica.replica_id for replica in state.expert_map.replicas]


def test_from_nothing_to_a_complete_map() -> None:
    both = [wanted(0), wanted(1)]
    actions, state = reconcile(both, [], 0.0, ReconcileState.initial(NUM_LAYERS, 2))
    assert actions == (StartReplica(both[0], 1), StartReplica(both[1], 1))
    actions, state = reconcile(both, [seen(r, Phase.STARTING) for r in both], 1.0, state)
    assert actions == ()
    views = [seen(both[0], Phase.READY), seen(both[1], Phase.STARTING)]
    actions, state = reconcile(both, views, 2.0, state)
    assert actions == (PublishMap(state.expert_map),)
    assert (state.expert_map.epoch, mapped(state)) == (1, ["expert-0-r0"])
    actions, state = reconcile(both, [seen(r, Phase.READY) for r in both], 3.0, state)
    assert (state.expert_map.epoch, state.expert_map.missing()) == (2, ())
    actions, _ = reconcile(both, [seen(r, Phase.READY) for r in both], 4.0, state)
    assert actions == (), "nothing new, nothing to do"


def settled(*replicas: DesiredReplica, num_experts: int = 2) -> ReconcileState:
    _, state = reconcile(replicas, [], 0.0, ReconcileState.initial(NUM_LAYERS, num_experts))
    _, state = reconcile(replicas, [seen(r, Phase.READY) for r in replicas], 1.0, state)
    return state


def test_the_dead_leave_the_map_and_are_replaced_at_once() -> None:
    both = [wanted(0), wanted(1)]
    state = settled(*both)
    actions, after = reconcile(both, [seen(both[0], Phase.READY), seen(both[1], Phase.DEAD)], 2.0, state)
    assert actions == (PublishMap(after.expert_map), StartReplica(both[1], 2))
    assert mapped(after) == ["expert-0-r0"]
    assert after.expert_map.epoch == state.expert_map.epoch + 1


def test_a_surplus_replica_leaves_the_map_before_it_is_drained() -> None:
    both = [wanted(0), wanted(0, 1)]
    state = settled(*both)
    actions, after = reconcile(both[:1], [seen(r, Phase.READY) for r in both], 2.0, state)
    assert actions == (
        PublishMap(after.expert_map),
        StopReplica(both[1].replica_id, 1, True, "not wanted any more"),
    )
    assert mapped(after) == ["expert-0-r0"]


def test_a_replica_of_another_numerics_domain_stays_out_while_one_of_the_first_serves() -> None:
    both = [wanted(0), wanted(0, 1)]
    state = settled(both[1])
    views = [seen(both[0], Phase.READY, domain="fp32"), seen(both[1], Phase.READY)]
    _, state = reconcile(both, views, 2.0, state)
    assert mapped(state) == ["expert-0-r1"], "whose tokens are being generated stays, lower id or not"
    assert state.refused == {"expert-0-r0": "computes in another numerics domain, 'fp32'"}
    _, state = reconcile(both, [views[0], seen(both[1], Phase.DEAD)], 3.0, state)
    assert mapped(state) == ["expert-0-r0"], "better than nobody"


def test_a_replica_that_holds_something_else_is_refused() -> None:
    only = wanted(0)
    stranger = replace(seen(only, Phase.READY), info=replace(info(only), num_layers=1))
    actions, state = reconcile([only], [stranger], 0.0, ReconcileState.initial(NUM_LAYERS, 1))
    assert actions == ()
    assert "not what was asked for" in state.refused[only.replica_id]


def test_an_address_belongs_to_who_became_ready_there_last() -> None:
    both = [wanted(0), wanted(1)]
    state = settled(both[0])
    views = [seen(both[0], Phase.READY), seen(both[1], Phase.READY, address=f"host:{both[0].replica_id}")]
    _, state = reconcile(both, views, 2.0, state)
    assert mapped(state) == ["expert-1-r0"], "the first must be dead, we only do not know it yet"
    assert "another replica's" in state.refused[both[0].replica_id]


def test_what_fits_nowhere_waits_and_holds_nobody_up() -> None:
    both = [wanted(0), wanted(1)]
    state = ReconcileState.initial(NUM_LAYERS, 2)
    actions, state = reconcile(both, [], 0.0, state, unplaced={both[0].replica_id})
    assert actions == (StartReplica(both[1], 1),)
    actions, _ = reconcile(both, [], 1.0, state)
    assert actions == (StartReplica(both[0], 1),)


def test_a_new_supervisor_goes_on_from_the_old_epoch() -> None:
    only = wanted(0)
    _, state = reconcile([only], [seen(only, Phase.READY, 5)], 0.0, ReconcileState.initial(NUM_LAYERS, 1, 41))
    assert state.expert_map.epoch == 42
    assert state.records[only.replica_id].incarnation == 5


def loads(replica: DesiredReplica, num_layers: int, domain: str = "fp16") -> ObservedReplica:
    """A replica that still loads and serves so many leading layers."""
    part = replace(info(replica, domain=domain), num_layers=num_layers)
    return replace(seen(replica, Phase.STARTING), info=part)


def deep(replica: DesiredReplica, num_layers: int = 16) -> DesiredReplica:
    return replace(replica, num_layers=num_layers)


def whole(*replicas: DesiredReplica) -> ReconcileState:
    _, state = reconcile(replicas, [], 0.0, ReconcileState.initial(16, 1))
    _, state = reconcile(replicas, [seen(r, Phase.READY) for r in replicas], 1.0, state)
    return state


def test_a_copy_that_loads_joins_in_steps_beside_one_that_is_whole() -> None:
    first, copy = deep(wanted(0)), deep(wanted(0, 1))
    _, state = reconcile([first, copy], [seen(first, Phase.READY)], 2.0, whole(first))
    found = []
    for num_layers in range(17):
        views = [seen(first, Phase.READY), loads(copy, num_layers) if num_layers else seen(copy, Phase.STARTING)]
        actions, state = reconcile([first, copy], views, LATE_S + num_layers, state)
        assert all(isinstance(action, PublishMap) for action in actions)
        found.append(sum(one.num_layers for one in state.expert_map.replicas if one.replica_id == copy.replica_id))
    assert found == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12, 12], "it is whole when it is ready"
    actions, state = reconcile([first, copy], [seen(r, Phase.READY) for r in (first, copy)], LATE_S + 30.0, state)
    assert actions == (PublishMap(state.expert_map),)
    assert [one.num_layers for one in state.expert_map.replicas] == [16, 16]


def test_a_part_is_no_reason_to_let_go_of_who_is_whole() -> None:
    first, copy = deep(wanted(0)), deep(wanted(0, 1))
    _, state = reconcile([first, copy], [seen(first, Phase.READY)], 2.0, whole(first))
    _, state = reconcile([copy], [seen(first, Phase.READY), loads(copy, 8)], LATE_S + 3.0, state)
    assert mapped(state) == ["expert-0-r0", "expert-0-r1"]
    _, state = reconcile([copy], [seen(first, Phase.READY), loads(copy, 12)], LATE_S + 4.0, state)
    assert mapped(state) == ["expert-0-r0", "expert-0-r1"], "its last layers have nobody else"
    _, state = reconcile([copy], [seen(first, Phase.READY), seen(copy, Phase.READY)], LATE_S + 5.0, state)
    actions, state = reconcile([copy], [seen(first, Phase.READY), seen(copy, Phase.READY)], LATE_S + 6.0, state)
    assert StopReplica(first.replica_id, 1, True, "not wanted any more") in actions
    assert mapped(state) == ["expert-0-r1"]


def test_a_part_stays_out_alone_in_another_domain_and_when_it_is_not_what_was_asked_for() -> None:
    first, copy = deep(wanted(0)), deep(wanted(0, 1))
    _, alone = reconcile([copy], [], 0.0, ReconcileState.initial(16, 1))
    _, alone = reconcile([copy], [loads(copy, 8)], LATE_S, alone)
    assert mapped(alone) == []
    _, state = reconcile([first, copy], [seen(first, Phase.READY)], 2.0, whole(first))
    for odd in (loads(copy, 8, domain="fp16+fp32"), loads(replace(copy, first_layer=LayerId(1), num_layers=8), 8)):
        _, after = reconcile([first, copy], [seen(first, Phase.READY), odd], LATE_S + 3.0, state)
        assert mapped(after) == ["expert-0-r0"]
        assert after.refused == {}, "it may agree when it is whole"


def test_a_part_that_dies_leaves_the_map() -> None:
    first, copy = deep(wanted(0)), deep(wanted(0, 1))
    _, state = reconcile([first, copy], [seen(first, Phase.READY)], 2.0, whole(first))
    _, state = reconcile([first, copy], [seen(first, Phase.READY), loads(copy, 8)], LATE_S + 3.0, state)
    assert mapped(state) == ["expert-0-r0", "expert-0-r1"]
    actions, state = reconcile([first, copy], [seen(first, Phase.READY), seen(copy, Phase.DEAD)], LATE_S + 4.0, state)
    assert mapped(state) == ["expert-0-r0"]
    assert StartReplica(copy, 2) in actions


def test_a_copy_that_is_whole_soon_is_not_asked_before() -> None:
    first, copy = deep(wanted(0)), deep(wanted(0, 1))
    _, state = reconcile([first, copy], [seen(first, Phase.READY)], 2.0, whole(first))
    views = [seen(first, Phase.READY), loads(copy, 8)]
    _, soon = reconcile([first, copy], views, 2.0 + GROWS_AFTER_S - 0.1, state)
    assert mapped(soon) == ["expert-0-r0"]
    _, late = reconcile([first, copy], views, 2.0 + GROWS_AFTER_S, soon)
    assert mapped(late) == ["expert-0-r0", "expert-0-r1"]


@pytest.mark.parametrize("phase", [Phase.STOPPING, Phase.DEAD])
def test_only_a_replica_that_serves_has_an_address(phase: Phase) -> None:
    only = wanted(0)
    with pytest.raises(AssertionError):
        ObservedReplica(replica_id=only.replica_id, incarnation=1, phase=phase, info=info(only))
    with pytest.raises(AssertionError):
        ObservedReplica(replica_id=only.replica_id, incarnation=1, phase=Phase.READY)


class Runtime:
    """Processes that do as told, in their own time, and are seen late. Refuses to run one id twice."""

    def __init__(self, lag: int) -> None:
        self.phases: dict[ReplicaId, tuple[int, Phase, int]] = {}  # incarnation, phase, ticks in it
        self.replicas: dict[ReplicaId, DesiredReplica] = {}
        self.hung: set[ReplicaId] = set()
        self.history: list[list[ObservedReplica]] = [[]] * (lag + 1)

    def do(self, action: Action) -> None:
        if isinstance(action, StartReplica):
            replica_id = action.replica.replica_id
            before = self.phases.get(replica_id)
            assert before is None or before[1] is Phase.DEAD, f"{replica_id} runs twice: {before}"
            assert before is None or before[0] < action.incarnation
            self.replicas[replica_id] = action.replica
            self.phases[replica_id] = action.incarnation, Phase.STARTING, 0
        elif isinstance(action, StopReplica):
            incarnation, phase, _ = self.phases.get(action.replica_id, (0, Phase.DEAD, 0))
            if incarnation == action.incarnation and phase is not Phase.DEAD:
                self.phases[action.replica_id] = incarnation, Phase.STOPPING, 0

    def crash(self, replica_id: ReplicaId) -> None:
        if replica_id in self.phases:
            self.phases[replica_id] = self.phases[replica_id][0], Phase.DEAD, 0

    def tick(self) -> None:
        for replica_id, (incarnation, phase, age) in list(self.phases.items()):
            self.phases[replica_id] = incarnation, phase, age + 1
            if phase is Phase.STARTING and age >= 2 and replica_id not in self.hung:
                self.phases[replica_id] = incarnation, Phase.READY, 0
            elif phase is Phase.STOPPING and age >= 2:
                self.phases[replica_id] = incarnation, Phase.DEAD, 0
        self.history.append([seen(self.replicas[r], p, i) for r, (i, p, _) in self.phases.items()])

    def observe(self, lag: int) -> list[ObservedReplica]:
        return self.history[-1 - lag]


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["crash", "hang", "heal", "want", "drop", "nothing", "nothing"]),
        st.integers(0, 2),
        st.integers(0, 1),
    ),
    max_size=60,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(EVENTS, st.integers(0, 3))
def test_after_any_trouble_the_desired_comes_about_and_then_there_is_peace(
    events: list[tuple[str, int, int]], lag: int
) -> None:
    everyone = {(e, c): wanted(e, c) for e in range(3) for c in range(2)}
    desired = {place: replica for place, replica in everyone.items() if place[1] == 0}
    runtime = Runtime(lag)
    state = ReconcileState.initial(NUM_LAYERS, 3)
    epochs = [0]
    calm_s = 80
    for now_s in range(len(events) + calm_s):
        event, expert, copy = events[now_s] if now_s < len(events) else ("heal", 0, 0)
        place = expert, copy
        if event == "crash":
            runtime.crash(everyone[place].replica_id)
        elif event == "hang":
            runtime.hung.add(everyone[place].replica_id)
        elif event == "heal":
            runtime.hung.clear()
        elif event == "want":
            desired[place] = everyone[place]
        elif event == "drop" and copy:
            desired.pop(place, None)
        actions, state = reconcile(desired.values(), runtime.observe(lag), float(now_s), state, policy=POLICY)
        assert sum(isinstance(action, PublishMap) for action in actions) <= 1
        for action in actions:
            runtime.do(action)
        epochs.append(state.expert_map.epoch)
        runtime.tick()
    assert epochs == sorted(epochs)
    assert mapped(state) == sorted(replica.replica_id for replica in desired.values())
    assert state.expert_map.missing() == ()
    assert len(epochs) - epochs.index(epochs[-1]) > 20, "peace has lasted a while"
    living = {r for r, (_, phase, _) in runtime.phases.items() if phase is not Phase.DEAD}
    assert living == {replica.replica_id for replica in desired.values()}
