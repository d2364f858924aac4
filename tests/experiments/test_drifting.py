"""On drifting load our policy leaves hosts at least as even as EPLB does, for a fifth of the bytes or fewer."""

import pytest

from cluster.layout import Layout
from cluster.policies import policy_named
from cluster.policy import Action, Observation
from experiments.simulation.drifting import Drift, Followed, follow
from experiments.simulation.synthetic_routing import RoutingModel

GB = 10**9


def drift(
    *, layers: int, hosts: int, columns: float, ranges: int = 1, law: str = "zipf", skew: float = 1.2, experts: int = 8
) -> Drift:
    routing = RoutingModel(num_layers=layers, num_experts=experts, law=law, skew=skew, drift_s=300)
    return Drift(routing=routing, hosts=hosts, columns=columns, ranges=ranges, duration_s=600)


AS_EVEN = {
    "whole columns": drift(layers=32, hosts=8, columns=3),
    "many experts": drift(layers=8, hosts=16, columns=6, experts=64, skew=0.8),
    "unlike popularities in ranges": drift(layers=32, hosts=16, columns=2, ranges=8, law="dirichlet", skew=0.5),
    "single layers on full hosts": drift(layers=8, hosts=64, columns=2, ranges=8, skew=0.8),
}
NEARLY = {
    "more hosts": drift(layers=32, hosts=16, columns=2, law="dirichlet", skew=0.5),
    "many hosts": drift(layers=32, hosts=64, columns=1, skew=0.8),
}
"""A move is not worth it to us that EPLB makes: a little less even, for a twentieth of the bytes and fewer."""


@pytest.mark.parametrize("name", AS_EVEN)
@pytest.mark.parametrize("seed", [0, 1])
def test_incremental_is_as_even_as_eplb_for_a_fifth_of_the_bytes(name: str, seed: int) -> None:
    eplb, ours = both(AS_EVEN[name], seed)
    assert 5 * ours.moved_bytes <= eplb.moved_bytes
    assert ours.balancedness >= eplb.balancedness
    assert ours.critical_share <= eplb.critical_share


@pytest.mark.parametrize("name", NEARLY)
def test_where_it_is_less_even_it_is_by_little_and_moves_hardly_anything(name: str) -> None:
    eplb, ours = both(NEARLY[name], 1)
    assert 20 * ours.moved_bytes <= eplb.moved_bytes
    assert ours.balancedness >= 0.97 * eplb.balancedness


def both(shape: Drift, seed: int) -> tuple[Followed, Followed]:
    """EPLB's and ours."""
    eplb, ours = (follow(policy_named(name, budget_bytes=24 * GB), shape, seed) for name in ("eplb", "incremental"))
    return eplb, ours


def test_all_policies_see_the_same_work_and_what_they_do_takes_effect() -> None:
    seen: list[Observation] = []
    shape = drift(layers=2, hosts=4, columns=4)

    def watching(observation: Observation, state: Layout | None) -> tuple[tuple[Action, ...], Layout]:
        seen.append(observation)
        actions, _ = policy_named("eplb", budget_bytes=GB)(observation, None)
        return actions, observation.layout

    follow(watching, shape, 3)
    first = list(seen)
    follow(watching, shape, 3)
    assert len(first) == 60
    for one, other in zip(first, seen[60:], strict=True):
        assert one.work_LE.tolist() == other.work_LE.tolist()
        assert one.work_LE.sum() == pytest.approx(0.5 * 4)
    assert not first[0].layout.held_UN.any()
    assert first[1].layout.held_UN.any(axis=1).all(), "what was decided holds in the next window"
    assert first[10].work_LE.tolist() != first[40].work_LE.tolist()
