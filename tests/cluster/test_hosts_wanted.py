"""The level of hosts stays within its limits whatever happens, follows what is there, and gives up what never comes."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.hosts_wanted import HostLimits, HostsRefused, HostsWanted, begin
from cluster.ids import NodeId

LIMITS = HostLimits(min_hosts=2, max_hosts=5, timeout_s=100.0)


def hosts(*names: str) -> set[NodeId]:
    return {NodeId(name) for name in names}


def test_a_host_more_is_pending_until_it_comes() -> None:
    wanted = begin(hosts("a", "b"), LIMITS).add(1, hosts("a", "b"), 0.0, LIMITS)
    assert (wanted.level, wanted.pending(hosts("a", "b"))) == (3, 1)
    wanted, given_up = wanted.settled(hosts("a", "b", "c"), 5.0, LIMITS)
    assert (wanted.level, wanted.pending(hosts("a", "b", "c")), given_up) == (3, 0, 0)


def test_the_limits_hold_from_the_beginning() -> None:
    assert begin([], LIMITS).level == 2
    many = hosts(*"abcdefgh")
    assert begin(many, LIMITS).level == 5
    with pytest.raises(HostsRefused, match="at most 5"):
        begin(many, LIMITS).add(1, many, 0.0, LIMITS)
    assert begin(hosts("a", "b"), LIMITS).add(9, hosts("a", "b"), 0.0, LIMITS).level == 5
    with pytest.raises(HostsRefused, match="2 are the least"):
        begin(hosts("a", "b"), LIMITS).remove(NodeId("a"), hosts("a", "b"), LIMITS)


def test_a_host_that_is_given_back_does_not_count_and_going_twice_is_going_once() -> None:
    there = hosts("a", "b", "c", "d")
    wanted = begin(there, LIMITS).drain(NodeId("d")).remove(NodeId("d"), there, LIMITS)
    assert (wanted.level, wanted.leaving, wanted.draining) == (3, hosts("d"), frozenset())
    assert wanted.remove(NodeId("d"), there, LIMITS) == wanted
    wanted, _ = wanted.settled(there, 1.0, LIMITS)
    assert (wanted.level, wanted.usable(there)) == (3, 3)
    wanted, _ = wanted.settled(hosts("a", "b", "c"), 2.0, LIMITS)
    assert (wanted.level, wanted.leaving) == (3, frozenset())


def test_who_wants_more_gets_the_one_that_was_about_to_go() -> None:
    there = hosts("a", "b", "c")
    gone = begin(there, LIMITS).remove(NodeId("c"), there, LIMITS)
    again = gone.add(1, there, 0.0, LIMITS)
    assert (again.level, again.leaving, again.pending(there)) == (3, frozenset(), 0)
    kept = gone.keep(NodeId("c"), LIMITS)
    assert (kept.level, kept.leaving) == (3, frozenset())


def test_a_lost_host_is_still_wanted_and_given_up_after_a_while() -> None:
    wanted = begin(hosts("a", "b", "c"), LIMITS)
    left = hosts("a", "b")
    wanted, given_up = wanted.settled(left, 1000.0, LIMITS)
    assert (wanted.level, given_up) == (3, 0)  # so whoever provides hosts makes another one
    wanted, given_up = wanted.settled(left, 1099.0, LIMITS)
    assert given_up == 0
    wanted, given_up = wanted.settled(left, 1100.0, LIMITS)
    assert (wanted.level, given_up) == (2, 1)
    wanted, given_up = wanted.settled(hosts("a"), 1300.0, LIMITS)
    assert (wanted.level, given_up) == (2, 0)  # never below the least


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32))
def test_random_histories_keep_every_rule(seed: int) -> None:
    rng = random.Random(seed)
    limits = HostLimits(min_hosts=rng.randint(1, 3), max_hosts=rng.randint(3, 6), timeout_s=50.0)
    there = {NodeId(f"h{i}") for i in range(rng.randint(0, 7))}
    wanted, made, now_s = begin(there, limits), 100, 0.0
    for _ in range(60):
        now_s += rng.choice([1.0, 20.0, 60.0])
        wanted = _something(wanted, rng, there, now_s, limits)
        assert limits.min_hosts <= wanted.level <= limits.max_hosts
        if rng.random() < 0.3 and there:
            there.discard(rng.choice(sorted(there)))
        if rng.random() < 0.6 and wanted.pending(there):
            made += 1
            there.add(NodeId(f"h{made}"))
        wanted, _ = wanted.settled(there, now_s, limits)
        assert limits.min_hosts <= wanted.level <= limits.max_hosts
        assert wanted.leaving <= there
        assert wanted.draining <= there
        assert not wanted.leaving & wanted.draining
    for _ in range(20):  # a provider that does as it is told makes the level true
        made += 1
        if wanted.pending(there):
            there.add(NodeId(f"h{made}"))
        there -= wanted.leaving
        wanted, _ = wanted.settled(there, now_s, limits)
    assert wanted.pending(there) == 0
    assert min(len(there), limits.max_hosts) == wanted.level


def _something(
    wanted: HostsWanted, rng: random.Random, there: set[NodeId], now_s: float, limits: HostLimits
) -> HostsWanted:
    one = rng.choice(sorted(there)) if there else NodeId("nobody")
    try:
        match rng.randrange(4):
            case 0:
                return wanted.add(rng.randint(1, 3), there, now_s, limits)
            case 1:
                return wanted.drain(one) if one in there - wanted.leaving else wanted
            case 2:
                return wanted.keep(one, limits)
            case _:
                return wanted.remove(one, there, limits)
    except HostsRefused:
        return wanted


@pytest.mark.parametrize(("low", "high", "timeout_s"), [(0, 1, 1.0), (3, 2, 1.0), (1, 1, 0.0)])
def test_limits_that_contradict_each_other_are_refused(low: int, high: int, timeout_s: float) -> None:
    with pytest.raises(ValueError, match=f"min_hosts is {low}, max_hosts {high}"):
        HostLimits(min_hosts=low, max_hosts=high, timeout_s=timeout_s)
