"""Who gave wrong answers is replaced; the last of its expert only when another is ready, and nobody twice in a row."""

from dataclasses import replace
from itertools import pairwise

from cluster.desired import DesiredReplica
from cluster.expert_map import ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.processes import Phase, ProcessPolicy
from cluster.quarantine import HealthReport, condemned, lost_by_peers, stand_in_id, stand_ins, to_expel
from cluster.reconcile import (
    Action,
    ObservedReplica,
    PublishMap,
    ReconcileState,
    StartReplica,
    StopReplica,
    reconcile,
)

POLICY = ProcessPolicy(backoff_base_s=4.0, stable_s=1000.0)


def wanted(expert: int, copy: int = 0) -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(f"expert-{expert}-r{copy}"),
        expert_ids=(ExpertId(expert),),
        first_layer=LayerId(0),
        num_layers=1,
    )


def report(replica: DesiredReplica, epoch: int, state: str = "quarantined", who: str = "coordinator-0") -> HealthReport:
    return HealthReport(
        coordinator_id=who, map_epoch=epoch, replica_id=replica.replica_id, state=state, detail="NaN in layer 3"
    )


class House:
    """Replicas that are ready the moment that they are started, and gone the moment that they are stopped."""

    def __init__(self, *replicas: DesiredReplica, num_experts: int = 1) -> None:
        self.replicas = replicas
        self.now_s = 0.0
        self.running: dict[ReplicaId, tuple[DesiredReplica, int]] = {}
        self.state = ReconcileState.initial(1, num_experts)
        self.reports: list[HealthReport] = []
        self.hopeless: set[ReplicaId] = set()
        self.slow: set[ReplicaId] = set()
        self.step()
        self.step()

    def step(self) -> list[Action]:
        """What the expert keeper does in a round."""
        self.now_s += 1.0
        guilty = condemned(self.reports, self.state.joined)
        standing = stand_ins(self.replicas, guilty, self.state.expert_map)
        actions, self.state = reconcile(
            (*self.replicas, *standing),
            [self._seen(*one) for one in self.running.values()],
            self.now_s,
            self.state,
            unplaced=self.hopeless,
            condemned=to_expel(self.replicas, guilty, self.state.expert_map, self.hopeless),
            policy=POLICY,
        )
        for action in actions:
            match action:
                case StartReplica(replica, incarnation):
                    assert replica.replica_id not in self.running, "two processes of one id"
                    self.running[replica.replica_id] = (replica, incarnation)
                case StopReplica(replica_id):
                    del self.running[replica_id]
        return [action for action in actions if not isinstance(action, PublishMap)]

    @property
    def mapped(self) -> list[str]:
        return [one.replica_id for one in self.state.expert_map.replicas]

    def _seen(self, replica: DesiredReplica, incarnation: int) -> ObservedReplica:
        info = ReplicaInfo(
            replica_id=replica.replica_id,
            expert_ids=replica.expert_ids,
            first_layer=replica.first_layer,
            num_layers=replica.num_layers,
            address=f"{replica.replica_id}:{incarnation}",
            node_id=NodeId("n0"),
            numerics_domain="fp16",
        )
        slow = replica.replica_id in self.slow
        phase = Phase.STARTING if slow else Phase.READY
        return ObservedReplica(
            replica_id=replica.replica_id, incarnation=incarnation, phase=phase, info=None if slow else info
        )


def test_one_of_two_copies_leaves_the_map_at_once_and_is_replaced() -> None:
    house = House(wanted(0), wanted(0, 1))
    epoch = house.state.expert_map.epoch
    house.reports = [report(wanted(0), epoch)]
    (stop,) = house.step()
    why = "quarantined by coordinator-0: NaN in layer 3"
    assert stop == StopReplica(ReplicaId("expert-0-r0"), 1, False, why)
    assert house.mapped == ["expert-0-r1"]
    (start,) = house.step()
    assert isinstance(start, StartReplica)
    assert start.incarnation == 2
    assert house.state.records["expert-0-r0"].detail == why, "why there is another must be said"
    house.step()
    assert house.mapped == ["expert-0-r0", "expert-0-r1"]


def test_a_report_about_the_predecessor_condemns_nobody() -> None:
    house = House(wanted(0), wanted(0, 1))
    old = report(wanted(0), house.state.expert_map.epoch)
    house.reports = [old]
    for _ in range(3):
        house.step()
    assert house.mapped == ["expert-0-r0", "expert-0-r1"]
    for _ in range(5):
        assert house.step() == [], "the coordinator has not taken the newest map yet"
    house.reports = [replace(old, map_epoch=house.state.expert_map.epoch, state="healthy")]
    assert house.step() == []


def test_who_is_caught_again_and_again_is_started_after_growing_pauses() -> None:
    house = House(wanted(0), wanted(0, 1))
    starts = []
    for _ in range(60):
        house.reports = [report(wanted(0), house.state.expert_map.epoch)]
        starts += [house.now_s for action in house.step() if isinstance(action, StartReplica)]
    pauses = [after - before for before, after in pairwise(starts)]
    assert pauses[:3] == [6.0, 10.0, 18.0], "4, 8 and 16 s after the stop, which is 2 s after the start"


def test_the_last_of_its_expert_goes_when_a_stand_in_is_ready_and_the_stand_in_when_another_is() -> None:
    house = House(wanted(0))
    standing = stand_in_id(wanted(0).replica_id)
    house.slow = {standing}
    house.reports = [report(wanted(0), house.state.expert_map.epoch)]
    (start,) = house.step()
    assert isinstance(start, StartReplica)
    assert start.replica.replica_id == standing
    for _ in range(3):
        assert house.step() == [], "nobody else has this expert yet"
    assert house.mapped == ["expert-0-r0"]
    house.slow = set()
    assert house.step() == [], "it is in the map; the next look finds the other one dispensable"
    (stop,) = house.step()
    assert isinstance(stop, StopReplica)
    assert (stop.replica_id, stop.drain) == ("expert-0-r0", False)
    assert house.mapped == [standing]
    house.slow = {wanted(0).replica_id}
    (start,) = house.step()
    assert isinstance(start, StartReplica)
    assert start.replica.replica_id == "expert-0-r0"
    for _ in range(3):
        assert house.step() == []
    assert house.mapped == [standing], "it stays until its successor is there"
    house.slow = set()
    house.step()
    (stop,) = house.step()
    assert isinstance(stop, StopReplica)
    assert (stop.replica_id, stop.drain) == (standing, True)
    assert house.mapped == ["expert-0-r0"]
    assert house.step() == []


def test_a_stand_in_that_cannot_be_is_not_waited_for() -> None:
    house = House(wanted(0))
    house.hopeless = {stand_in_id(wanted(0).replica_id)}
    house.reports = [report(wanted(0), house.state.expert_map.epoch)]
    (stop,) = house.step()
    assert isinstance(stop, StopReplica)
    (start,) = house.step()
    assert isinstance(start, StartReplica)
    assert start.replica.replica_id == "expert-0-r0"


def test_of_two_copies_that_are_both_guilty_each_has_a_stand_in() -> None:
    both = (wanted(0), wanted(0, 1))
    house = House(*both)
    house.reports = [report(one, house.state.expert_map.epoch) for one in both]
    started = [action.replica.replica_id for action in house.step() if isinstance(action, StartReplica)]
    assert started == [stand_in_id(one.replica_id) for one in both]
    for _ in range(20):
        house.step()
        assert house.mapped, "somebody always has the expert"
    assert house.mapped == ["expert-0-r0", "expert-0-r1"]


def test_other_states_condemn_nobody_and_the_lost_are_known() -> None:
    one, two = wanted(0), wanted(0, 1)
    reports = [report(one, 9, state) for state in ("healthy", "ejected", "probing", "away")]
    assert condemned(reports, {one.replica_id: 1}) == {}
    assert lost_by_peers([*reports, report(two, 9, "healthy")]) == {one.replica_id}


def test_an_unknown_replica_is_not_condemned() -> None:
    assert condemned([report(wanted(0), 9)], {}) == {}
    assert condemned([replace(report(wanted(0), 9), detail="")], {ReplicaId("expert-0-r0"): 9}) == {
        "expert-0-r0": "quarantined by coordinator-0: no reason given"
    }
