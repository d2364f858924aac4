"""The virtual clock: worked examples by hand, nothing lost, and policies that show what they are for."""

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
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationConfig, SimulationResult, simulate
from cluster.simulated_cluster import SimulatedCluster
from cluster.simulated_engine import SimulatedEngine
from tests.support.layouts import hosts, layout
from tests.support.traces import trace

FREE = ServiceTime(0.0, 0.0)


def run(policy: Any = static, num_hosts: int = 2, slots: int = 4, **options: Any) -> SimulationResult:
    made = {
        name: options.pop(name) for name in list(options) if name in ("arrival_s", "prompt", "output", "popularity")
    }
    config = {"cost": ServiceTime(0.01, 0.0), "step_cost": FREE} | options
    return simulate(
        trace(**made),
        policy,
        grain=Grain.even(2, 4, layer_bytes=100),
        hosts=hosts(num_hosts, slots),
        template=Host(node_id=NodeId("new"), slots=slots, memory_bytes=1 << 40),
        config=SimulationConfig(**config),
    )


def test_one_request_takes_as_many_steps_as_it_has_tokens() -> None:
    result = run(step_cost=ServiceTime(0.1, 0.01), cost=FREE)
    # A prompt of 4 and its first token in one step of 4 tokens, then 4 steps of one.
    assert result.num_steps == 5
    assert result.num_tokens == 8
    assert result.ttft_s.tolist() == pytest.approx([0.14])
    assert result.tpot_s.tolist() == pytest.approx([0.11])
    assert result.e2el_s.tolist() == pytest.approx([0.14 + 4 * 0.11])
    assert result.duration_s == pytest.approx(0.58)
    assert result.host_seconds == pytest.approx(2 * 0.58)


def test_messages_and_answers_cost_the_coordinator_what_the_configuration_says() -> None:
    free, sending, both = (run(**costs) for costs in ({}, {"message_s": 0.1}, {"message_s": 0.1, "answer_s": 0.01}))
    assert free.num_messages == both.num_messages >= 2 * free.num_steps, "two layers"
    assert sending.duration_s == pytest.approx(free.duration_s + 0.1 * free.num_messages)
    # At least the last answer of a layer, and all of it where hosts are done at once.
    assert 0.01 * 2 * both.num_steps <= both.answers_s + 1e-9 <= 0.01 * both.num_messages + 2e-9
    assert both.duration_s == pytest.approx(sending.duration_s + both.answers_s)
    assert free.answers_s == sending.answers_s == 0
    for name, value in (("message_s", -1.0), ("answer_s", float("inf")), ("answer_s", float("nan"))):
        with pytest.raises(ValueError, match=f"{name} (is )?{value}"):
            run(**{name: value})


def test_a_step_waits_for_the_slowest_host_of_each_layer() -> None:
    # All four experts on one host: as many calls as experts are touched; one expert: one call in each layer.
    result = run(num_hosts=1, output=1, prompt=1, popularity=[1.0, 0, 0, 0])
    assert result.duration_s == pytest.approx(2 * 0.01)
    spread = run(num_hosts=4, slots=1, output=1, prompt=100)
    together = run(num_hosts=1, slots=4, output=1, prompt=100)
    assert spread.duration_s == pytest.approx(2 * 0.01)
    assert together.duration_s == pytest.approx(2 * 0.04)


def test_long_prompts_are_cut_and_decoding_goes_before_them() -> None:
    engine = SimulatedEngine([0.0, 0.0], [3, 10], [3, 1], max_num_seqs=4, max_num_batched_tokens=4)
    sizes = []
    now_s = 0.0
    while not engine.is_done:
        sizes.append(engine.begin_step(now_s))
        now_s += 1.0
        engine.end_step(now_s)
    assert sizes == [4, 4, 4, 3]
    assert engine.first_token_s.tolist() == [1.0, 4.0]
    assert engine.finished_s.tolist() == [3.0, 4.0]


def test_no_more_run_than_may_and_the_rest_waits_in_order() -> None:
    engine = SimulatedEngine([0.0, 0.0, 1.0], [1, 1, 1], [1, 1, 1], max_num_seqs=1, max_num_batched_tokens=8)
    assert engine.begin_step(0.0) == 1
    assert engine.queue_s(0.5) == 0.5
    engine.end_step(2.0)
    assert engine.begin_step(2.0) == 1
    assert engine.next_arrival_s == 1.0
    assert engine.num_running == 1
    with pytest.raises(ValueError, match="max_num_seqs is 9"):
        SimulatedEngine([], [], [], max_num_seqs=9, max_num_batched_tokens=8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 30), st.integers(1, 50), st.integers(1, 20)), min_size=1, max_size=20))
def test_every_request_is_answered_in_full(requests: list[tuple[float, int, int]]) -> None:
    requests.sort()
    arrival_s, prompt, output = (list(column) for column in zip(*requests, strict=True))
    engine = SimulatedEngine(arrival_s, prompt, output, max_num_seqs=4, max_num_batched_tokens=8)
    now_s, tokens = 0.0, 0
    while not engine.is_done:
        num = engine.begin_step(now_s)
        assert num <= 8
        tokens += num
        now_s = now_s + 1 if num else engine.next_arrival_s
        engine.end_step(now_s)
    assert tokens == sum(prompt) + sum(output) - len(requests)
    assert (engine.first_token_s > arrival_s).all()
    assert (engine.finished_s >= engine.first_token_s).all()


def test_idle_time_passes_and_is_paid_for() -> None:
    result = run(arrival_s=[0.0, 50.0], cost=FREE, step_cost=ServiceTime(0.1, 0.0))
    assert result.duration_s == pytest.approx(50.5)
    assert result.host_seconds == pytest.approx(101.0)
    assert result.timeline.at_s == pytest.approx([10, 20, 30, 40, 50])
    assert result.timeline.critical_share == [0.0] * 5


def test_it_is_deterministic() -> None:
    once, again = (run(Incremental(budget_bytes=1000), arrival_s=np.linspace(0, 40, 60)) for _ in range(2))
    assert once.e2el_s.tolist() == again.e2el_s.tolist()
    assert once.timeline == again.timeline
    assert once.log == again.log


def test_copies_of_a_hot_expert_shorten_the_wait() -> None:
    options: dict[str, Any] = {
        "arrival_s": np.linspace(0, 60, 200),
        "popularity": [0.7, 0.1, 0.1, 0.1],
        "prompt": 64,
        "num_hosts": 6,
        "slots": 2,
        "cost": ServiceTime(1e-3, 2e-3),
    }
    still = run(static, **options)
    moved = run(Incremental(budget_bytes=1000), **options)
    assert moved.num_unfinished == still.num_unfinished == 0
    assert np.mean(moved.e2el_s) < 0.8 * np.mean(still.e2el_s)
    assert moved.timeline.balancedness[-1] > still.timeline.balancedness[-1]


def test_scaling_pays_for_fewer_hosts_than_the_peak_needs() -> None:
    arrival_s = np.concatenate([np.linspace(0, 300, 60), np.linspace(300, 400, 400), np.linspace(400, 900, 100)])
    policy = Autoscaled(inner=Incremental(budget_bytes=10_000), min_hosts=2, max_hosts=12, down_window_s=60.0)
    result = run(policy, arrival_s=arrival_s, prompt=32, num_hosts=3, cost=ServiceTime(1e-3, 8e-3), host_start_s=5.0)
    assert result.num_unfinished == 0
    assert max(result.timeline.hosts) > 3
    assert result.timeline.hosts[-1] < max(result.timeline.hosts)
    assert result.host_seconds < max(result.timeline.hosts) * result.duration_s


def test_a_load_does_not_wait_for_a_drop_elsewhere() -> None:
    start = layout(Grain.even(1, 2), hosts(3, 2), [(0, 0), (1, 1)])
    cluster = SimulatedCluster(start, start.hosts[0], load_bytes_per_s=10.0, host_start_s=30.0)
    n0, n1, n2 = (host.node_id for host in start.hosts)
    moves = [
        Copy(unit=0, node_id=n1, source=n0, num_bytes=100, reason="r"),
        Drop(unit=0, node_id=n0, reason="r"),
        Copy(unit=1, node_id=n2, source=n1, num_bytes=50, reason="r"),
    ]
    cluster.do(moves, 0.0)
    cluster.advance(5.0)
    assert cluster.layout.held_UN.tolist() == [[True, False, False], [False, True, True]]
    cluster.advance(10.0)
    assert cluster.layout.held_UN.tolist() == [[False, True, False], [False, True, True]]


def test_a_load_slows_the_steps_that_are_made_meanwhile() -> None:
    def copies_once(seen: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
        if state is None:
            return tuple(
                Copy(unit=u, node_id=NodeId("n0"), source=None, num_bytes=100, reason="r") for u in range(4)
            ), 0
        return (Copy(unit=0, node_id=NodeId("n1"), source=None, num_bytes=19, reason="r"),) * (state == 0), 1

    told: dict[str, Any] = {"prompt": 1, "output": 100, "step_cost": ServiceTime(0.1, 0.0), "cost": FREE}
    told |= {"window_s": 1.0, "load_bytes_per_s": 10.0}
    assert run(copies_once, **told).duration_s == pytest.approx(10.0)
    # The steps that begin within 1.9 s after the first window: eight of 0.25 s instead of 0.1.
    assert run(copies_once, loading_slows=2.5, **told).duration_s == pytest.approx(11.2)
    with pytest.raises(ValueError, match=r"loading_slows is 0\.5"):
        run(loading_slows=0.5)


def test_where_hosts_share_a_machine_loads_wait_for_each_other() -> None:
    start = layout(Grain.even(1, 3), hosts(3, 2), [(0, 0), (1, 1), (2, 2)])
    n0, n1, n2 = (host.node_id for host in start.hosts)
    moves = [
        Copy(unit=0, node_id=n1, source=n0, num_bytes=100, reason="r"),
        Copy(unit=1, node_id=n2, source=n1, num_bytes=50, reason="r"),
        Copy(unit=2, node_id=n0, source=n2, num_bytes=50, reason="r"),
    ]

    def copies_at(max_loading: int | None, *times_s: float) -> list[int]:
        cluster = SimulatedCluster(
            start, start.hosts[0], load_bytes_per_s=10.0, host_start_s=30.0, max_loading=max_loading
        )
        cluster.do(moves, 1.0)
        assert not cluster.is_loading(0.9)
        found = []
        for at_s in times_s:
            cluster.advance(at_s)
            assert cluster.is_loading(at_s) == cluster.is_moving
            found.append(int(cluster.layout.copies_U.sum()))
        return found

    assert copies_at(None, 5.9, 6.0, 10.9, 11.0) == [3, 5, 5, 6]
    assert copies_at(2, 6.0, 10.9, 11.0) == [4, 4, 6]
    assert copies_at(1, 10.9, 11.0, 15.9, 16.0, 20.9, 21.0) == [3, 4, 4, 5, 5, 6]
    with pytest.raises(ValueError, match="max_loading 0"):
        copies_at(0, 1.0)


def test_loads_take_in_turn_as_long_as_they_were_seen_to() -> None:
    start = layout(Grain.even(1, 3), hosts(2, 3), [(unit, 0) for unit in range(3)])

    def begun(factors: tuple[float, ...]) -> SimulatedCluster:
        cluster = SimulatedCluster(
            start, start.hosts[0], load_bytes_per_s=10.0, host_start_s=0.0, max_loading=1, load_factors=factors
        )
        cluster.do([Copy(unit=u, node_id=NodeId("n1"), source=None, num_bytes=50, reason="r") for u in range(3)], 0.0)
        return cluster

    cluster = begun((0.5, 2.0))
    due_s = []
    while cluster.is_moving:
        due_s.append(cluster.next_due_s)
        cluster.advance(cluster.next_due_s)
    assert due_s == [2.5, 12.5, 15.0]
    for wrong in ((), (1.0, 0.0), (float("inf"),)):
        with pytest.raises(ValueError, match="load_factors are"):
            begun(wrong)


def test_loads_take_time_serve_in_order_and_are_counted() -> None:
    start = layout(Grain.even(1, 2), hosts(2, 2), [(0, 0), (1, 0)])
    cluster = SimulatedCluster(start, start.hosts[0], load_bytes_per_s=10.0, host_start_s=30.0)
    n1, n0 = NodeId("n1"), NodeId("n0")
    cluster.do(
        [
            Copy(unit=0, node_id=n1, source=n0, num_bytes=100, reason="r"),
            Drop(unit=0, node_id=n0, reason="r"),
            Copy(unit=1, node_id=n1, source=n0, num_bytes=100, reason="r"),
            AddHosts(num=1, reason="r"),
        ],
        0.0,
    )
    assert (cluster.num_paid, cluster.is_moving, cluster.next_due_s) == (3, True, 10.0)
    assert not cluster.advance(9.9)
    assert cluster.advance(10.0)
    assert cluster.layout.held_UN.tolist() == [[False, True], [True, False]]
    cluster.advance(20.0)
    assert cluster.layout.held_UN.tolist() == [[False, True], [True, True]]
    assert not cluster.is_moving
    cluster.advance(30.0)
    assert [host.node_id for host in cluster.layout.hosts] == ["n0", "n1", "host-2"]
    cluster.do([DrainHost(node_id=n0, reason="r")], 30.0)
    assert cluster.layout.hosts[0].draining
    cluster.do([KeepHost(node_id=n0, reason="r"), RemoveHost(node_id=NodeId("host-2"), reason="r")], 30.0)
    assert not cluster.layout.hosts[0].draining
    cluster.advance(40.0)
    assert (cluster.moved_bytes, cluster.num_copies, len(cluster.log)) == (200, 2, 7)
    assert cluster.host_seconds == pytest.approx(3 * 30 + 2 * 10)
    with pytest.raises(AssertionError, match="removed with units on it"):
        cluster.do([RemoveHost(node_id=n1, reason="r")], 40.0)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="the grain has 3 layers of 4 experts, the trace 2 of 4"):
        simulate(
            trace(),
            static,
            grain=Grain.even(3, 4),
            hosts=hosts(1, 9),
            template=hosts(1)[0],
            config=SimulationConfig(cost=FREE, step_cost=FREE),
        )
    with pytest.raises(ValueError, match="window_s is 0"):
        SimulationConfig(cost=FREE, step_cost=FREE, window_s=0)
    with pytest.raises(ValueError, match="do not fit into 1 slots"):
        run(num_hosts=1, slots=1)
    with pytest.raises(ValueError, match="load_bytes_per_s is 0"):
        SimulatedCluster(Layout.empty(Grain.even(1, 1), hosts(1)), hosts(1)[0], load_bytes_per_s=0, host_start_s=0)


@pytest.mark.parametrize("num_windows", [1, 3])
def test_a_policy_sees_the_work_of_the_last_windows(num_windows: int) -> None:
    """One token at a time for a second and a half, then nothing: the share of its time that the host worked."""
    seen: list[float] = []

    def policy(observation: Observation, state: Any) -> tuple[tuple[Action, ...], Any]:
        if observation.layout.held_UN.any():
            seen.append(float(observation.work_LE.sum()))
            return (), state
        return static(observation, state)

    run(
        policy, num_hosts=1, window_s=1.0, num_windows=num_windows, arrival_s=[0.0, 5.9], prompt=1, output=[75, 1],
        popularity=[1.0, 0, 0, 0], cost=ServiceTime(0.01, 0.0),
    )  # fmt: skip
    busy = [1.0, 0.5, 0.0, 0.0, 0.0]
    shown = [busy[max(at + 1 - num_windows, 0) : at + 1] for at in range(5)]
    assert seen[:5] == pytest.approx([sum(one) / len(one) for one in shown], abs=0.03)
    with pytest.raises(ValueError, match="num_windows 0"):
        run(num_windows=0)
