"""Hosts follow load one step at a time, cheapest first, and nothing that fails wedges the next."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import Autoscaled
from cluster.ids import NodeId
from cluster.incremental import Incremental
from cluster.layout import Grain, Host, Layout
from cluster.policy import Action, AddHosts, Copy, DrainHost, Drop, KeepHost, Observation, RemoveHost
from cluster.reactive import static
from tests.support.layouts import hosts, layout, watched

GRAIN = Grain.even(2, 8, layer_bytes=10)


class Cluster:
    """A cluster that does what a policy says, unless it is told to fail."""

    def __init__(self, policy: Autoscaled, num_hosts: int, slots: int = 4) -> None:
        self.policy, self.slots = policy, slots
        self.now = Layout.empty(GRAIN, hosts(num_hosts, slots))
        self.state: Any = None
        self.now_s = 0.0
        self.num_made = num_hosts
        self.failed: tuple[Action, ...] = ()
        self.fails: tuple[type, ...] = ()
        self.log: list[Action] = []

    def round(self, work: float, *, queue_s: float = 0.0) -> tuple[Action, ...]:
        work_LE = np.full((2, 8), work / 16)
        seen = Observation(now_s=self.now_s, layout=self.now, work_LE=work_LE, queue_s=queue_s, failed=self.failed)
        actions, self.state = self.policy(seen, self.state)
        about_hosts = [a for a in actions if isinstance(a, AddHosts | DrainHost | KeepHost | RemoveHost)]
        assert len(about_hosts) <= 1
        moves = [a for a in actions if isinstance(a, Copy | Drop)]
        num_done = next((i for i, a in enumerate(moves) if isinstance(a, self.fails)), len(moves))
        self.failed = (*moves[num_done : num_done + 1], *(a for a in about_hosts if isinstance(a, self.fails)))
        done = [*moves[:num_done], *(a for a in about_hosts if a not in self.failed)]
        self.now = watched(self.now, done)
        on = list(self.now.hosts)
        for action in done:
            if isinstance(action, AddHosts):
                on += [self._host(NodeId(f"n{self.num_made + i}")) for i in range(action.num)]
                self.num_made += action.num
            elif isinstance(action, DrainHost | KeepHost):
                draining = isinstance(action, DrainHost)
                on = [self._host(h.node_id, draining) if h.node_id == action.node_id else h for h in on]
            elif isinstance(action, RemoveHost):
                column = [h.node_id for h in on].index(action.node_id)
                assert not self.now.held_UN[:, column].any(), "removed with units on it"
                on.pop(column)
        self.now = self.now.on(on)
        assert self.policy.min_hosts <= len(on)
        assert sum(not h.draining for h in on) <= self.policy.max_hosts
        self.log += about_hosts
        self.now_s += 10.0
        return actions

    def _host(self, node_id: NodeId, draining: bool = False) -> Host:
        return Host(node_id=node_id, slots=self.slots, memory_bytes=1 << 40, draining=draining)


def scaled(min_hosts: int = 2, max_hosts: int = 16, **options: Any) -> Autoscaled:
    return Autoscaled(inner=Incremental(budget_bytes=1000), min_hosts=min_hosts, max_hosts=max_hosts, **options)


def test_hosts_come_with_the_load_and_go_with_it_without_flapping() -> None:
    cluster = Cluster(scaled(), 4)
    for _ in range(40):
        cluster.round(6.0)
    high = len(cluster.now.hosts)
    assert high >= 8
    assert not any(isinstance(a, DrainHost) for a in cluster.log)
    settled = len(cluster.log)
    for _ in range(40):
        cluster.round(6.0)
    assert len(cluster.log) == settled
    for _ in range(400):
        cluster.round(1.0)
    assert len(cluster.now.hosts) == 4  # 32 / 4 slots hold two copies of all 8 experts; fewer hosts would not
    assert not any(h.draining for h in cluster.now.hosts)
    assert (cluster.now.copies_U >= 2).all()


def test_a_move_that_suffices_spares_the_host() -> None:
    start = layout(GRAIN, hosts(4, 8), [(e, n % 2) for e in range(8) for n in (0, 1)])
    seen = Observation(now_s=0.0, layout=start, work_LE=np.full((2, 8), 1.2 / 16))
    with_moves, _ = Autoscaled(inner=Incremental(budget_bytes=10_000, max_moves=16), min_hosts=2, max_hosts=8)(
        seen, None
    )
    assert any(isinstance(a, Copy) for a in with_moves)
    assert not any(isinstance(a, AddHosts) for a in with_moves)
    without, _ = Autoscaled(inner=static, min_hosts=2, max_hosts=8, target_share=0.5)(seen, None)
    assert any(isinstance(a, AddHosts) for a in without)


@pytest.mark.parametrize(("work", "goes"), [(0.9, True), (1.4, False)])
def test_a_host_with_nothing_to_do_goes_although_the_others_have_enough(work: float, goes: bool) -> None:
    """Two hosts do all, evenly, at 45 % each; scaled to one host of four less that would be 60 %, and it is not."""
    idle, busy = range(4, 8), range(4)
    held = [(e, n) for n in (0, 1) for e in busy] + [(e, n) for n in (2, 3) for e in idle]
    now = layout(GRAIN, hosts(4, 6), held)
    work_LE = np.zeros((2, 8))
    work_LE[:, :4] = work / 8
    policy = Autoscaled(inner=static, min_hosts=2, max_hosts=8, target_share=0.6, lead_s=0.0, margin=0.0)
    drained, state = [], None
    for step in range(60):
        seen = Observation(now_s=10.0 * step, layout=now, work_LE=work_LE)
        actions, state = policy(seen, state)
        drained += [a.node_id for a in actions if isinstance(a, DrainHost)]
        assert not any(isinstance(a, AddHosts) for a in actions) or work > 1
    assert set(drained) <= {"n2", "n3"}
    assert bool(drained) == goes


def test_hosts_that_bring_no_nearer_to_a_target_out_of_reach_go() -> None:
    """One expert's batches are too small to be cut and busy 85 %, above the target whatever hosts there are."""
    num, step_s = 8, 0.1
    now = layout(GRAIN, hosts(num, 4), [(e, (e + c) % num) for e in range(8) for c in range(2)])
    call_LE, growing_LE = np.full((2, 8), 0.01), np.full((2, 8), 0.01)
    call_LE[0, 3], growing_LE[0, 3] = 0.9, 0.85
    policy = scaled(max_hosts=12, lead_s=0.0, margin=0.0)
    state: Any = None
    for step in range(200):
        seen = Observation(
            now_s=10.0 * step, layout=now, work_LE=call_LE + growing_LE, growing_LE=growing_LE,
            steps_per_s=1 / step_s, step_s=2 * step_s,
        )  # fmt: skip
        actions, state = policy(seen, state)
        assert not any(isinstance(a, AddHosts) for a in actions)
        now = watched(now, actions)
        gone = {a.node_id for a in actions if isinstance(a, RemoveHost)}
        drained = {a.node_id for a in actions if isinstance(a, DrainHost)}
        on = [replace(h, draining=h.draining or h.node_id in drained) for h in now.hosts if h.node_id not in gone]
        now = now.on(on)
        assert (now.copies_U >= 2).all()
    assert 4 <= len(now.hosts) < num


@pytest.mark.parametrize(("max_shrink", "at_once"), [(0.0, 1), (0.1, 4), (0.25, 10)])
def test_of_many_hosts_several_go_at_once_and_every_expert_stays_on_two(max_shrink: float, at_once: int) -> None:
    cluster = Cluster(scaled(max_hosts=40, max_shrink=max_shrink, down_window_s=60.0), 40)
    most = 0
    for _ in range(400):
        cluster.round(0.5)
        open_hosts = [h for h in cluster.now.hosts if not h.draining]
        most = max(most, len(cluster.now.hosts) - len(open_hosts))
        assert cluster.now.copies_U.min() >= 2
        assert sum(h.slots for h in open_hosts) >= 2 * GRAIN.num_units
    assert most <= at_once
    assert (most > 1) == (at_once > 1)
    assert len(cluster.now.hosts) == 4
    assert not any(isinstance(a, AddHosts | KeepHost) for a in cluster.log)


def test_a_queue_asks_for_more_even_where_hosts_seem_to_keep_up() -> None:
    cluster = Cluster(scaled(), 4)
    for _ in range(5):
        cluster.round(2.4)
    assert not cluster.log
    cluster.round(2.4, queue_s=5.0)
    assert isinstance(cluster.log[0], AddHosts)


def test_hosts_that_never_come_are_asked_for_again_and_balancing_goes_on() -> None:
    cluster = Cluster(scaled(host_timeout_s=50.0), 4)
    cluster.fails = (AddHosts,)
    for _ in range(30):
        cluster.round(6.0)
    asked = [a for a in cluster.log if isinstance(a, AddHosts)]
    assert 3 <= len(asked) < 15  # again and again, but with pauses
    assert (cluster.now.copies_U >= 2).all()
    cluster.fails = ()
    for _ in range(80):
        cluster.round(6.0)
    assert len(cluster.now.hosts) >= 8


def test_a_host_asked_for_and_silent_is_given_up() -> None:
    policy = scaled(host_timeout_s=50.0)
    at = Layout.empty(GRAIN, hosts(4, 4))
    asked, state = [], None
    for step in range(30):
        seen = Observation(now_s=step * 10.0, layout=at, work_LE=np.full((2, 8), 0.4))
        actions, state = policy(seen, state)
        at = watched(at, actions)
        asked += [step for a in actions if isinstance(a, AddHosts)]
    assert len(asked) >= 3
    assert asked[1] - asked[0] >= 5


def test_a_drain_that_does_not_end_is_given_up() -> None:
    cluster = Cluster(scaled(host_timeout_s=100.0), 8)
    cluster.fails = (Copy,)
    cluster.now = layout(GRAIN, hosts(8, 4), [(e, (e + c) % 8) for e in range(8) for c in range(2)])
    for _ in range(60):
        cluster.round(0.5)
    kinds = [type(a) for a in cluster.log]
    assert DrainHost in kinds
    assert KeepHost in kinds
    assert (cluster.now.copies_U >= 1).all()


def test_a_draining_host_is_kept_when_the_load_is_back() -> None:
    cluster = Cluster(scaled(), 8)
    cluster.now = layout(GRAIN, hosts(8, 4), [(e, (e + c) % 8) for e in range(8) for c in range(2)])
    while not any(isinstance(a, DrainHost) for a in cluster.log):
        cluster.round(0.5)
    cluster.round(6.0)
    assert isinstance(cluster.log[-1], KeepHost)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_random_loads_and_failures_never_break_a_rule(seed: int) -> None:
    rng = np.random.default_rng(seed)
    cluster = Cluster(scaled(host_timeout_s=60.0, down_window_s=40.0), int(rng.integers(4, 9)))
    for _ in range(40):
        cluster.fails = tuple(k for k in (Copy, AddHosts, DrainHost, RemoveHost) if rng.random() < 0.2)
        cluster.round(float(rng.choice([0.1, 1.0, 4.0, 12.0])))
    cluster.fails = ()
    for _ in range(30):
        cluster.round(12.0)
    assert sum(not h.draining for h in cluster.now.hosts) == 16  # whatever failed before, the next ones worked
    assert (cluster.now.copies_U >= 2).all()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_hosts": 9, "max_hosts": 8}, "min_hosts is 9"),
        ({"target_share": 1.0}, r"target_share is 1\.0"),
        ({"max_shrink": 1.0}, r"max_shrink is 1\.0"),
    ],
)
def test_contradictions_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        scaled(**options)
