"""The arrays choose as the live selector does, to the last row."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.assignment import Assigner, host_seconds
from cluster.layout import Grain, Host, IntArray, Layout
from cluster.selector import Selector, SelectorPolicy, Server
from cluster.service_time import ServiceTime
from tests.support.layouts import hosts, layout

COST = ServiceTime(1e-3, 1e-4)
PLAIN = SelectorPolicy(message_s=0.0, lean=0.0)


def live(
    at: Layout, tokens_LE: IntArray, cost: ServiceTime, policy: SelectorPolicy, seat: int
) -> tuple[IntArray, IntArray]:
    """What the live selector gives: layer by layer, expert by expert, without arrays."""
    servers = [Server(cost.a_s / host.speed, cost.b_s / host.speed) for host in at.hosts]
    selector = Selector(policy, seat)
    tokens_LN = np.zeros((at.grain.num_layers, len(at.hosts)), np.int64)
    calls_LN = np.zeros_like(tokens_LN)
    for layer in range(at.grain.num_layers):
        experts = [expert for expert in range(at.grain.num_experts) if tokens_LE[layer, expert]]
        holders = [np.flatnonzero(at.held_UN[at.grain.unit(layer, expert)]).tolist() for expert in experts]
        rows = [int(tokens_LE[layer, expert]) for expert in experts]
        given = selector.assign(rows, [[servers[host] for host in who] for who in holders])
        for who, parts in zip(holders, given, strict=True):
            for place, num in parts:
                tokens_LN[layer, who[place]] += num
                calls_LN[layer, who[place]] += 1
    return tokens_LN, calls_LN


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, IntArray]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    grain = Grain.even(3, draw(st.integers(1, 8)), num_ranges=draw(st.integers(1, 3)))
    speeds = rng.choice([0.5, 1.0, 1.0, 2.3], draw(st.integers(1, 8)))
    machines = [
        Host(node_id=host.node_id, slots=99, memory_bytes=1 << 40, speed=float(speed))
        for host, speed in zip(hosts(len(speeds), 99), speeds, strict=True)
    ]
    held = rng.random((grain.num_units, len(speeds))) < 0.5
    held[np.arange(grain.num_units), rng.integers(0, len(speeds), grain.num_units)] = True
    most = draw(st.sampled_from([3, 60, 1000]))
    return Layout(grain, tuple(machines), held), rng.integers(0, most, (3, grain.num_experts))


@settings(max_examples=400, deadline=None)
@given(
    cases(),
    st.sampled_from([COST, ServiceTime(1e-3, 0.0), ServiceTime(0.0, 1e-5), ServiceTime(0.0, 0.0)]),
    st.builds(
        SelectorPolicy,
        message_s=st.sampled_from([0.0, 1e-4, 5.0]),
        split=st.booleans(),
        split_past=st.sampled_from([0.0, 1.0, 3.0]),
        split_gain=st.sampled_from([0.0, 0.05]),
        lean=st.sampled_from([0.0, 0.1]),
    ),
    st.integers(0, 9),
)
def test_it_is_the_live_selector(
    case: tuple[Layout, IntArray], cost: ServiceTime, policy: SelectorPolicy, seat: int
) -> None:
    at, tokens_LE = case
    got_LN, got_calls_LN = Assigner(at, cost=cost, policy=policy, seat=seat).assign(tokens_LE)
    tokens_LN, calls_LN = live(at, tokens_LE, cost, policy, seat)
    assert np.array_equal(got_LN, tokens_LN)
    assert np.array_equal(got_calls_LN, calls_LN)
    assert np.array_equal(got_LN.sum(axis=1), tokens_LE.sum(axis=1))


def test_a_large_batch_is_split_so_that_all_end_together() -> None:
    at = layout(Grain.even(1, 2), hosts(3, 2), [(0, 0), (1, 0), (1, 1), (1, 2)])
    tokens_LN, calls_LN = Assigner(at, cost=COST, policy=PLAIN).assign(np.array([[5, 100]]))
    assert tokens_LN.tolist() == [[28, 39, 38]]
    assert calls_LN.tolist() == [[2, 1, 1]]
    assert host_seconds(tokens_LN, calls_LN, COST, np.ones(3))[0] == pytest.approx([4.8e-3, 4.9e-3, 4.8e-3])


def test_a_faster_host_gets_more() -> None:
    at = layout(Grain.even(1, 1), hosts(2, 1), [(0, 0), (0, 1)])
    fast = Layout(
        at.grain, (at.hosts[0], Host(node_id=at.hosts[1].node_id, slots=1, memory_bytes=1, speed=3.0)), at.held_UN
    )
    assert Assigner(fast, cost=COST, policy=PLAIN).assign(np.array([[4]]))[0].tolist() == [[0, 4]]
    assert Assigner(fast, cost=COST, policy=PLAIN).assign(np.array([[120]]))[0].tolist() == [[25, 95]]


def test_layer_ranges_have_holders_of_their_own() -> None:
    at = layout(Grain.even(4, 1, num_ranges=2), hosts(2, 1), [(0, 0), (1, 1)])
    tokens_LN, _ = Assigner(at, cost=COST).assign(np.full((4, 1), 3))
    assert tokens_LN.tolist() == [[3, 0], [3, 0], [0, 3], [0, 3]]


def test_a_unit_that_nobody_holds_is_named() -> None:
    with pytest.raises(ValueError, match="nobody holds expert 1"):
        Assigner(layout(Grain.even(1, 2), hosts(1), [(0, 0)]), cost=COST)
