"""A layer's rows end as early as may be: whole experts below the ridge, parts past it, nobody who must not be asked."""

import math
import random
import statistics
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.expert_map import ExpertMap, ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.selector import Selector, SelectorPolicy, Server, candidates, fewest_in_flight, layer_end_s
from cluster.service_time import ServiceTime
from tests.support.plain_selector import PlainSelector

LAYER, EXPERT = LayerId(0), ExpertId(0)
A, B, C = ReplicaId("a"), ReplicaId("b"), ReplicaId("c")
PLAIN = SelectorPolicy(message_s=0.0, lean=0.0)
"""By the model alone."""

Case = tuple[list[int], list[list[Server]]]


def case_of(rng: random.Random, *, most_rows: int = 40) -> Case:
    """Rows of some experts, and their holders: unequal in speed, some with something in flight."""
    servers = []
    for _ in range(rng.randint(1, 8)):
        speed = rng.choice([1.0, 1.0, 2.0, 4.0]) * rng.uniform(0.8, 1.25)
        a_s, b_s, tokens = 1e-3 / speed, rng.choice([1e-5, 3e-5, 1e-4]) / speed, rng.choice([0, 0, 0, 20])
        servers.append(Server(a_s, b_s, a_s + b_s * tokens if tokens else 0.0, tokens))
    holders = []
    for _ in range(rng.randint(1, 8)):
        chosen = rng.sample(range(len(servers)), min(len(servers), rng.choice([1, 1, 2, 3])))
        holders.append([servers[at] for at in sorted(chosen)])
    return [rng.randint(1, most_rows) for _ in holders], holders


cases = st.randoms(use_true_random=False).map(case_of)
large_cases = st.randoms(use_true_random=False).map(lambda rng: case_of(rng, most_rows=2000))
policies = st.builds(
    SelectorPolicy,
    message_s=st.sampled_from([0.0, 1e-4, 1.0]),
    split_past=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    split_gain=st.sampled_from([0.0, 0.05]),
    lean=st.sampled_from([0.0, 0.05, 0.5]),
)


# ---- one expert -------------------------------------------------------------------------------------------

A_S, B_S = 1e-3, 1e-5


def line(ready_s: float = 0.0, *, a_s: float = A_S, b_s: float = B_S) -> Server:
    return Server(a_s, b_s, ready_s)


def place(num: int, *who: Server, policy: SelectorPolicy = PLAIN, seat: int = 0) -> dict[int, int]:
    """Rows of each holder that gets any."""
    (parts,) = Selector(policy, seat).assign([num], [who])
    return dict(parts)


def test_it_goes_to_who_ends_first() -> None:
    assert place(8, line(), line()) == {0: 8}
    assert place(8, line(1e-6), line()) == {1: 8}
    assert place(8, line(), line(a_s=5e-4)) == {1: 8}
    assert place(8, line(), line(4e-4, a_s=5e-4)) == {1: 8}, "it is busy, and still the first"
    assert place(8, line(), line(6e-4, a_s=5e-4)) == {0: 8}


def test_below_the_ridge_it_is_whole_and_past_it_the_parts_end_together() -> None:
    assert place(100, line(), line()) == {0: 100}, "100 rows cost what the call costs"
    assert place(199, line(), line()) == {0: 199}, "parts of less than 100 would be bound by weights again"
    assert place(200, line(), line()) == {0: 100, 1: 100}
    assert place(201, line(), line()) == {0: 101, 1: 100}
    assert place(900, line(), line(b_s=2 * B_S)) == {0: 600, 1: 300}
    assert place(900, line(1e-3), line()) == {0: 400, 1: 500}
    assert place(300, line(), line(), line()) == {0: 100, 1: 100, 2: 100}


def test_from_so_many_rows_on_two_that_are_idle_share_them() -> None:
    one = ServiceTime(A_S, B_S)
    assert PLAIN.divisible_rows(one) == 200
    assert replace(PLAIN, split_past=0.3).divisible_rows(one) == 60
    assert PLAIN.divisible_rows(ServiceTime(0.0, B_S)) == 2, "a row cannot be shared"
    assert PLAIN.divisible_rows(ServiceTime(A_S, 0.0)) == math.inf
    assert replace(PLAIN, split=False).divisible_rows(one) == math.inf


def test_the_ridge_and_the_gain_that_a_split_must_bring_are_configurable() -> None:
    def two(num: int, **fields: Any) -> dict[int, int]:
        return place(num, line(), line(), policy=SelectorPolicy(message_s=0, lean=0, **fields))

    assert two(60, split_past=0.3) == {0: 30, 1: 30}
    assert two(900, split=False) == {0: 900}
    assert two(200, split_gain=0.35) == {0: 200}, "2 ms instead of 3"
    assert two(300, split_gain=0.35) == {0: 150, 1: 150}, "2.5 ms instead of 4"


def test_nothing_is_split_where_others_end_later_anyway() -> None:
    first, second, slow = line(), line(), line(a_s=5e-3, b_s=0.0)
    selector = Selector(PLAIN)
    assert selector.assign([300, 1], [[first, second], [slow]]) == [((0, 300),), ((0, 1),)]
    assert selector.assign([500, 1], [[first, second], [slow]])[0] == ((0, 250), (1, 250)), "6 ms against 5"


def test_who_has_no_slope_is_never_split_for_and_who_costs_nothing_is_not_divided_by() -> None:
    assert place(5000, line(b_s=0.0), line(b_s=0.0)) == {0: 5000}
    assert sum(place(5000, Server(0.0, 0.0), Server(0.0, 0.0)).values()) == 5000
    assert sum(place(5000, Server(0.0, 1e-6), Server(0.0, 0.0)).values()) == 5000


# ---- several experts --------------------------------------------------------------------------------------


def test_what_this_batch_gives_already_counts() -> None:
    first, second = line(), line()
    selector = Selector(PLAIN)
    assert selector.assign([8, 8], [[first], [first, second]]) == [((0, 8),), ((1, 8),)]
    assert selector.assign([8, 8], [[first, second], [first]]) == [((1, 8),), ((0, 8),)], "whatever the order"


def test_the_batch_stays_where_it_goes_anyway_if_it_ends_about_as_soon() -> None:
    first, second = line(a_s=3e-5, b_s=1e-6), line(a_s=3e-5, b_s=1e-6)
    dear = Selector(SelectorPolicy(message_s=1e-4, lean=0)).assign([4, 4], [[second], [first, second]])
    assert dear[1] == ((1, 4),), "one message instead of two"
    cheap = Selector(SelectorPolicy(message_s=1e-5, lean=0)).assign([4, 4], [[second], [first, second]])
    assert cheap[1] == ((0, 4),)


def test_where_greed_errs_the_simple_rule_is_taken() -> None:
    """Largest first gives 3 + 2 + 2 and 3 + 2; one after another, 2 + 2 + 2 and 3 + 3."""
    first, second = line(a_s=0.0, b_s=1.0), line(a_s=0.0, b_s=1.0)
    rows, holders = [2, 3, 2, 3, 2], [[first, second]] * 5
    given = Selector(SelectorPolicy(message_s=0, lean=0, split=False)).assign(rows, holders)
    assert given == fewest_in_flight(rows, holders)
    assert layer_end_s(given, holders) == 6
    for content in (SelectorPolicy(message_s=1.5, lean=0, split=False), SelectorPolicy(lean=0.2, split=False)):
        given = Selector(content).assign(rows, holders)
        assert layer_end_s(given, holders) == 7, "who allows more than one second for other ends"


@settings(max_examples=300, deadline=None)
@given(large_cases, policies, st.integers(0, 9))
def test_every_row_goes_to_a_holder_once(case: Case, policy: SelectorPolicy, seat: int) -> None:
    rows, holders = case
    for num, who, parts in zip(rows, holders, Selector(policy, seat).assign(rows, holders), strict=True):
        assert sum(part for _, part in parts) == num
        assert all(part >= 1 for _, part in parts)
        chosen = [at for at, _ in parts]
        assert chosen == sorted(set(chosen)), "each once, in the order of the holders"
        assert max(chosen) < len(who)


@settings(max_examples=300, deadline=None)
@given(large_cases, policies, st.integers(0, 9))
def test_parts_are_past_the_ridge_and_what_is_not_stays_whole(case: Case, policy: SelectorPolicy, seat: int) -> None:
    rows, holders = case
    for who, parts in zip(holders, Selector(policy, seat).assign(rows, holders), strict=True):
        for at, part in parts if len(parts) > 1 else ():
            # The fraction of a row is somebody else's.
            assert (part + 1) * who[at].b_s >= policy.split_past * who[at].a_s


@settings(max_examples=500, deadline=None)
@given(st.one_of(cases, large_cases), policies, st.integers(0, 9))
def test_by_the_model_no_layer_ends_later_than_with_the_fewest_in_flight(
    case: Case, policy: SelectorPolicy, seat: int
) -> None:
    rows, holders = case
    simple_s = layer_end_s(fewest_in_flight(rows, holders), holders)
    plain_s = layer_end_s(Selector(PLAIN, seat).assign(rows, holders), holders)
    assert plain_s <= simple_s * (1 + 1e-9)
    if sum(len(who) > 1 for who in holders) > 1:
        got_s = layer_end_s(Selector(policy, seat).assign(rows, holders), holders)
        assert got_s * (1 - policy.lean) - policy.message_s <= simple_s * (1 + 1e-9)


def test_on_unequal_servers_it_ends_a_fifth_sooner_than_with_the_fewest_in_flight() -> None:
    rng = random.Random(5)
    gains = []
    for _ in range(1000):
        rows, holders = case_of(rng)
        simple_s = layer_end_s(fewest_in_flight(rows, holders), holders)
        gains.append(simple_s / layer_end_s(Selector().assign(rows, holders), holders))
    assert statistics.fmean(gains) > 1.2


@settings(max_examples=100, deadline=None)
@given(large_cases, cases, policies, st.integers(0, 9))
def test_the_same_question_has_the_same_answer(case: Case, between: Case, policy: SelectorPolicy, seat: int) -> None:
    selector = Selector(policy, seat)
    first = selector.assign(*case)
    selector.assign(*between)
    assert selector.assign(*case) == first == Selector(policy, seat).assign(*case)


@settings(max_examples=400, deadline=None)
@given(st.one_of(cases, large_cases), policies, st.booleans(), st.integers(0, 9))
def test_shortcuts_change_no_choice(case: Case, policy: SelectorPolicy, split: bool, seat: int) -> None:
    policy = replace(policy, split=split)
    assert Selector(policy, seat).assign(*case) == PlainSelector(policy, seat).assign(*case)


@settings(max_examples=500, deadline=None)
@given(st.randoms(use_true_random=False), policies, st.integers(0, 3))
def test_shortcuts_change_no_choice_among_equal_servers(rng: random.Random, policy: SelectorPolicy, seat: int) -> None:
    """As in a cluster at rest: a few processes with the same line, two copies each, so that all is a close call."""
    servers = [line(b_s=rng.choice([B_S, B_S, 0.0, 1e-13])) for _ in range(4)]
    holders = [[servers[at] for at in sorted(rng.sample(range(4), 2))] for _ in range(rng.randint(2, 8))]
    rows = [rng.choice([1, 1, 2, 100, 101, 640]) for _ in holders]
    assert Selector(policy, seat).assign(rows, holders) == PlainSelector(policy, seat).assign(rows, holders)


# ---- several coordinators (what they see of each other: test_replica_times) --------------------------------


def test_of_equal_servers_each_coordinator_leans_to_another() -> None:
    lean = SelectorPolicy()
    chosen = [place(8, line(), line(), line(), policy=lean, seat=seat) for seat in range(6)]
    assert chosen == [{at: 8} for at in (0, 1, 2, 0, 1, 2)]
    assert place(8, line(), line(a_s=0.8 * A_S), policy=lean) == {1: 8}, "it only leans"
    insistence = [lean.leaning(seat) for seat in range(8)]
    assert len(set(insistence)) == 8
    assert lean.lean / 2 <= min(insistence) <= max(insistence) <= lean.lean


# ---- whom to ask again ------------------------------------------------------------------------------------


def replica(replica_id: ReplicaId, expert: int = 0) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=replica_id,
        expert_ids=(ExpertId(expert),),
        first_layer=LayerId(0),
        num_layers=1,
        address=f"host:{replica_id}",
        node_id=NodeId("n0"),
        numerics_domain="fp16",
    )


MAP = ExpertMap(3, 1, 2, (replica(C), replica(A), replica(B), replica(ReplicaId("other"), 1)))


@pytest.mark.parametrize(
    ("inflight", "order"),
    [
        ({}, [A, B, C]),
        ({A: 1}, [B, C, A]),
        ({A: 5, B: 7, C: 5}, [A, C, B]),
        ({B: 0, ReplicaId("other"): 9}, [A, B, C]),
    ],
)
def test_least_in_flight_first_then_lowest_id(inflight: dict[ReplicaId, int], order: list[ReplicaId]) -> None:
    healthy = {A, B, C, ReplicaId("other")}
    assert [r.replica_id for r in candidates(MAP, LAYER, EXPERT, inflight, healthy)] == order


def test_the_unhealthy_are_left_out() -> None:
    assert [r.replica_id for r in candidates(MAP, LAYER, EXPERT, {C: 100}, {C})] == [C]
    assert candidates(MAP, LAYER, EXPERT, {}, set()) == []
    assert candidates(MAP, LayerId(1), EXPERT, {}, {A, B, C}) == []


def test_who_is_passed_over_comes_behind_and_who_is_ejected_last() -> None:
    healthy = {A, B, C}
    ranked = candidates(MAP, LAYER, EXPERT, {C: 9}, healthy, {A: 2, B: 1})
    assert [r.replica_id for r in ranked] == [C, B, A]
    assert [r.replica_id for r in candidates(MAP, LAYER, EXPERT, {}, {A}, {A: 2})] == [A], "better than nobody"


@pytest.mark.parametrize("field", ["message_s", "split_past", "split_gain", "lean"])
def test_a_policy_that_makes_no_sense_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} is -1, but it must be 0 to"):
        SelectorPolicy(**{field: -1})
