"""Hosts as one server, or a server for each expert's process: whom the selector gives rows, and when a host is done."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.assignment import Assigner, host_seconds
from cluster.layout import Grain, IntArray, Layout, parallelisms, speeds
from cluster.selector import Selector, SelectorPolicy, Server
from cluster.service_time import ServiceTime
from cluster.simulated_servers import Servers, taken_in
from tests.cluster.test_assignment import cases
from tests.support.layouts import hosts, layout

COST = ServiceTime(1e-3, 1e-4)
PLAIN = SelectorPolicy(message_s=0.0, lean=0.0)


def by_processes(
    at: Layout, tokens_LE: IntArray, policy: SelectorPolicy
) -> tuple[list[list[float]], list[list[float]]]:
    """Rows and seconds, (L, N), as the live selector gives them to replicas: one at a time, without arrays."""
    rows_LN, seconds_LN = [], []
    for layer in range(at.grain.num_layers):
        experts = [expert for expert in range(at.grain.num_experts) if tokens_LE[layer, expert]]
        holders = [np.flatnonzero(at.held_UN[at.grain.unit(layer, expert)]).tolist() for expert in experts]
        replicas = [
            [Server(COST.a_s / at.hosts[n].speed, COST.b_s / at.hosts[n].speed) for n in who] for who in holders
        ]
        given = Selector(policy).assign([int(tokens_LE[layer, expert]) for expert in experts], replicas)
        each: list[list[tuple[int, float]]] = [[] for _ in at.hosts]
        for who, parts in zip(holders, given, strict=True):
            for place, num in parts:
                each[who[place]].append((num, COST.seconds(num) / at.hosts[who[place]].speed))
        rows, seconds = [], []
        for host, calls in zip(at.hosts, each, strict=True):
            for of_host, values in ((rows, [num for num, _ in calls]), (seconds, [s for _, s in calls])):
                of_host.append(max(sum(values) / host.parallelism, max(values, default=0.0)))
        rows_LN.append(rows)
        seconds_LN.append(seconds)
    return np.array(rows_LN), np.array(seconds_LN)


@settings(max_examples=300, deadline=None)
@given(cases(), st.integers(1, 3), st.booleans())
def test_processes_get_what_the_live_selector_gives_to_replicas(
    case: tuple[Layout, IntArray], parallelism: int, lean: bool
) -> None:
    at, tokens_LE = case
    at = Layout(at.grain, tuple(replace(host, parallelism=parallelism) for host in at.hosts), at.held_UN)
    policy = SelectorPolicy() if lean else PLAIN
    worked = Servers(at, COST, policy, apart=True).work(tokens_LE)
    true_rows_LN, true_seconds_LN = by_processes(at, tokens_LE, policy)
    assert worked.rows_LN == pytest.approx(true_rows_LN)
    assert worked.seconds_LN == pytest.approx(true_seconds_LN)
    assert worked.ended_L.tolist() == worked.seconds_LN.max(axis=1).tolist()


@settings(max_examples=50, deadline=None)
@given(cases())
def test_a_host_that_is_one_process_is_one_server(case: tuple[Layout, IntArray]) -> None:
    at, tokens_LE = case
    worked = Servers(at, COST, PLAIN, apart=False).work(tokens_LE)
    tokens_LN, calls_LN = Assigner(at, cost=COST, policy=PLAIN).assign(tokens_LE)
    assert np.array_equal(worked.rows_LN, tokens_LN)
    assert np.array_equal(worked.seconds_LN, host_seconds(tokens_LN, calls_LN, COST, speeds(at.hosts)))


def test_processes_of_one_device_end_later_than_the_selector_thinks() -> None:
    """Expert 1 is on both hosts. The first has another one to compute, which only a selector of hosts knows."""
    at = layout(Grain.even(1, 2), hosts(2, 2), [(0, 0), (1, 0), (1, 1)])
    tokens_LE = np.array([[30, 30]])
    together_LN = Servers(at, COST, PLAIN, apart=False).work(tokens_LE).seconds_LN
    apart_LN = Servers(at, COST, PLAIN, apart=True).work(tokens_LE).seconds_LN
    assert together_LN.max() == pytest.approx(4e-3), "all of expert 1 elsewhere"
    assert apart_LN[0] == pytest.approx([8e-3, 0]), "all of expert 1 behind the other one"
    two = Layout(at.grain, tuple(replace(host, parallelism=2) for host in at.hosts), at.held_UN)
    assert parallelisms(two.hosts).tolist() == [2, 2]
    beside_LN = Servers(two, COST, PLAIN, apart=True).work(tokens_LE).seconds_LN
    assert beside_LN[0] == pytest.approx([4e-3, 0]), "beside the other one"


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([0.0, 0.25, 1.0, 7.0]),
)
def test_answers_are_taken_in_one_after_another_as_they_come(each: list[tuple[int, bool]], answer_s: float) -> None:
    now_s = 0.0
    for done_s in sorted(done_s for done_s, asked in each if asked):
        now_s = max(now_s, done_s) + answer_s
    done_LS, asked_LS = (np.array([[one[i] for one in each]]) for i in (0, 1))
    assert taken_in(done_LS.astype(np.float64), asked_LS, answer_s) == pytest.approx([now_s])


def test_answers_come_together_from_devices_of_their_own_and_in_turn_from_one() -> None:
    at = layout(Grain.even(1, 3), hosts(2, 3), [(0, 0), (1, 0), (2, 1)])
    tokens_LE = np.array([[10, 10, 10]])  # 2 ms each

    def ended_s(parallelism: int, answer_s: float) -> float:
        on = tuple(replace(host, parallelism=parallelism) for host in at.hosts)
        servers = Servers(Layout(at.grain, on, at.held_UN), COST, PLAIN, apart=True, answer_s=answer_s)
        worked = servers.work(tokens_LE)
        assert worked.num_messages == 3
        return float(worked.ended_L[0])

    assert ended_s(2, 5e-4) == pytest.approx(2e-3 + 3 * 5e-4), "three at once"
    assert ended_s(1, 5e-4) == pytest.approx(4e-3 + 5e-4), "the last one comes when the others are taken in"
    assert ended_s(1, 3e-3) == pytest.approx(2e-3 + 3 * 3e-3)
