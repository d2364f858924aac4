"""Limits and targets of everything that grows: checked by name, and what policies are made of them."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.autoscale import Autoscaled
from cluster.config import ClusterConfig, ConfigError, from_environment
from cluster.coordinator_count import CountPolicy
from cluster.hosts_wanted import HostLimits
from cluster.incremental import Incremental
from cluster.layout import Grain, Layout
from cluster.policies import policy_named
from cluster.policy import Observation
from cluster.retries import WithPauses
from cluster.scaling_config import parse_options
from tests.support.layouts import hosts, watched

GRAIN = Grain.even(2, 6, layer_bytes=10)


def make(**fields: Any) -> ClusterConfig:
    return ClusterConfig(**{"model": "/m", **fields})


def test_by_default_nothing_is_scaled() -> None:
    config = make(coordinators=3, ingresses=2)
    assert config.host_limits is None
    assert config.count_policy is None
    assert config.ingress_scaling(2) is None
    assert isinstance(config.policy("incremental", budget_bytes=100), WithPauses)


def test_limits_and_times_reach_who_decides() -> None:
    config = make(
        min_expert_hosts=2,
        max_expert_hosts=9,
        host_timeout_s=77.0,
        target_busy_share=0.5,
        min_coordinators=1,
        max_coordinators=4,
        target_coordinator_used=0.6,
        min_ingresses=1,
        max_ingresses=3,
        target_ingress_requests=20,
        scale_up_s=5.0,
        scale_down_s=50.0,
    )
    assert config.host_limits == HostLimits(min_hosts=2, max_hosts=9, timeout_s=77.0)
    policy = config.policy("incremental", budget_bytes=100)
    assert isinstance(policy, Autoscaled)
    assert (policy.min_hosts, policy.max_hosts, policy.target_share, policy.host_timeout_s) == (2, 9, 0.5, 77.0)
    assert (policy.up_cooldown_s, policy.down_window_s) == (5.0, 50.0)
    assert config.count_policy == CountPolicy(
        min_coordinators=1, max_coordinators=4, target_used=0.6, up_s=5.0, cooldown_s=5.0, down_s=50.0
    )
    scaling = config.ingress_scaling(1)
    assert scaling is not None
    assert (scaling.min_ingresses, scaling.max_ingresses, scaling.first, scaling.target_requests) == (1, 3, 1, 20)
    assert (scaling.up_s, scaling.down_s) == (5.0, 50.0)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"min_expert_hosts": 2}, "min_expert_hosts is given without max_expert_hosts"),
        ({"max_coordinators": 2}, "max_coordinators is given without min_coordinators"),
        ({"min_expert_hosts": 3, "max_expert_hosts": 2}, r"min_expert_hosts is 3, but must be at most .* \(2\)"),
        ({"min_expert_hosts": 0, "max_expert_hosts": 2}, "min_expert_hosts is 0, but must be a whole number from 1"),
        ({"max_expert_hosts": 2.5, "min_expert_hosts": 1}, r"max_expert_hosts is 2\.5"),
        ({"min_coordinators": 2, "max_coordinators": 3}, r"coordinators is 1, but must be from min_coordinators \(2\)"),
        ({"min_ingresses": 1, "max_ingresses": 2, "ingresses": 3}, "ingresses is 3"),
        ({"min_copies": 3, "max_copies": 2}, r"max_copies is 2, but must be at least min_copies \(3\)"),
        ({"target_busy_share": 1.0}, r"target_busy_share is 1\.0, but must be a number from 0\.05 to 0\.95"),
        ({"target_tokens_per_s": float("nan")}, "target_tokens_per_s is nan"),
        ({"scale_down_s": 0}, "scale_down_s is 0"),
        ({"target_ingress_requests": True}, "target_ingress_requests is True"),
        ({"policy_options": "noise"}, "policy_options has 'noise', but must be name=number"),
        ({"policy_options": "noise=0.1, noise=0.2"}, "each name once"),
        ({"policy_options": "noise=inf"}, "policy_options has 'noise=inf'"),
    ],
)
def test_contradictions_are_named(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**fields)


def test_the_environment_has_these_fields_too() -> None:
    environ = {"OCTAVO_MIN_COPIES": "2", "OCTAVO_MAX_COPIES": "4", "OCTAVO_POLICY_OPTIONS": "noise=0.2"}
    assert from_environment(make(), environ) == make(min_copies=2, max_copies=4, policy_options="noise=0.2")


def test_options_reach_the_policy_that_has_them_however_deep() -> None:
    options = parse_options("noise=0.2, max_moves = 7,horizon_s=5, base_s=3")
    policy: Any = policy_named("predictive", budget_bytes=50, options=options)
    assert (policy.base_s, policy.inner.horizon_s, policy.inner.inner.noise, policy.inner.inner.max_moves) == (
        *(3.0, 5.0, 0.2),
        7,
    )
    assert policy.inner.inner == Incremental(budget_bytes=50, noise=0.2, max_moves=7)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("incremental", "nois=1", "policy incremental has no option 'nois'; it has base_s, .*noise"),
        ("static", "noise=1", "policy static has no option 'noise'; it has base_s, cap_s"),
        ("reactive", "budget_bytes=1", "no option 'budget_bytes'"),
        ("incremental", "max_moves=1.5", r"max_moves is 1\.5, but must be a whole number"),
        ("reactive", "low_share=0.9", r"low_share is 0\.9, but it must be below"),
    ],
)
def test_options_that_nobody_has_or_takes_are_refused(name: str, options: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(policy_options=options).policy(name, budget_bytes=100)


def test_a_target_in_tokens_stands_for_the_time() -> None:
    work_LE, tokens_LE = np.full((2, 3), 0.1), np.full((2, 3), 50.0)
    assert (make().shown_work(work_LE, tokens_LE) == work_LE).all()
    shown_LE = make(target_tokens_per_s=300.0, target_busy_share=0.6).shown_work(work_LE, tokens_LE)
    # Three experts of two layers on one host: 300 tokens a second, which is to be what keeps it as busy as intended.
    assert shown_LE.sum() == pytest.approx(0.6)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["incremental", "predictive", "reactive", "eplb"]),
    low=st.integers(1, 3),
    extra=st.integers(0, 2),
    seed=st.integers(0, 2**32),
)
def test_copies_stay_between_their_limits(name: str, low: int, extra: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    policy = policy_named(name, budget_bytes=10_000, min_copies=low, max_copies=low + extra)
    now, state = Layout.empty(GRAIN, hosts(6, 4)), None
    for step in range(12):
        work_LE = rng.random((2, 6)) * rng.choice([0.01, 0.2, 1.0])
        seen = Observation(now_s=100.0 * step, layout=now, work_LE=work_LE)
        actions, state = policy(seen, state)
        now = watched(now, actions)
        assert (now.copies_U >= 1).all()
        if step >= 6:
            assert (now.copies_U >= low).all()
            assert (now.copies_U <= low + extra).all()


@pytest.mark.parametrize("name", ["incremental", "reactive"])
def test_copies_beyond_the_limit_go(name: str) -> None:
    policy = policy_named(name, budget_bytes=10_000, max_copies=1)
    held = np.ones((6, 3), np.bool_)
    seen = Observation(now_s=0.0, layout=Layout(GRAIN, hosts(3, 6), held), work_LE=np.full((2, 6), 0.01))
    actions, _ = policy(seen, None)
    assert (watched(seen.layout, actions).copies_U == 1).all()
