"""Shares of a step from two snapshots, memory against its bar: arithmetic with numbers that a person can check."""

import os

import pytest

from experiments.engine_bench.memory import MemoryUse, memory_use, proportional_bytes
from experiments.engine_bench.shares import CpuTimes, Moment, cpu_seconds, mean_shares, step_shares
from protos.coordinator_pb2 import SnapshotReply
from tests.support.contestants import some_shares

BEFORE = SnapshotReply(steps_total=10, step_s_total=5.0, attention_s_total=1.0, expert_compute_us_total=7)


def after(**changes: float) -> SnapshotReply:
    facts = {
        "steps_total": 14,
        "step_s_total": 7.0,
        "attention_s_total": 1.25,
        "prepare_s_total": 0.25,
        "router_s_total": 0.1,
        "dispatch_s_total": 0.1,
        "combine_s_total": 0.1,
        "head_s_total": 0.1,
        "sampling_s_total": 0.1,
        "expert_wait_s_total": 0.8,
        "expert_compute_us_total": 1_000_007,
        "expert_queue_us_total": 40_000,
        "wire_messages_total": 64,
        "wire_bytes_sent_total": 6_000,
        "wire_bytes_received_total": 2_000,
    }
    reply = SnapshotReply()
    for name, value in (facts | changes).items():
        setattr(reply, name, value)
    return reply


def test_every_second_of_a_step_has_one_share() -> None:
    shares = step_shares(Moment(BEFORE), Moment(after()), tokens=16, parallel=2)
    assert shares is not None
    assert shares.shares == pytest.approx(
        {
            "attention": 0.25,  # with the preparation
            "router": 0.05,
            "dispatch": 0.05,
            "expert_compute": 0.25,  # one second of work, two at a time
            "combine": 0.05,
            "head": 0.05,
            "sampling": 0.05,
            "waiting": 0.15,
            "other": 0.1,
        }
    )
    assert (shares.steps, shares.step_ms, shares.expert_compute_ms, shares.expert_queue_ms) == (4, 500.0, 250.0, 10.0)
    assert (shares.bytes_per_token, shares.messages_per_token) == (500.0, 4.0)


def test_experts_that_work_side_by_side_never_exceed_the_wait() -> None:
    shares = step_shares(Moment(BEFORE), Moment(after(expert_compute_us_total=9_000_000)), tokens=16, parallel=2)
    assert shares is not None
    assert (shares.shares["expert_compute"], shares.shares["waiting"]) == (pytest.approx(0.4), 0.0)
    assert sum(shares.shares.values()) == pytest.approx(1.0)


def test_phases_of_an_unfinished_step_do_not_make_a_negative_rest() -> None:
    shares = step_shares(Moment(BEFORE), Moment(after(attention_s_total=3.0)), tokens=16, parallel=2)
    assert shares is not None
    assert shares.shares["other"] == 0.0
    assert sum(shares.shares.values()) == pytest.approx(1.0)


def test_cpu_times_are_per_step() -> None:
    shares = step_shares(Moment(BEFORE, CpuTimes(1.0, 2.0)), Moment(after(), CpuTimes(1.4, 2.2)), tokens=16, parallel=2)
    assert shares is not None
    assert (shares.expert_cpu_ms, shares.coordinator_cpu_ms) == (pytest.approx(100.0), pytest.approx(50.0))
    assert cpu_seconds([os.getpid()]) > 0


def test_without_a_step_there_is_nothing_to_share() -> None:
    assert step_shares(Moment(BEFORE), Moment(BEFORE), tokens=16, parallel=2) is None
    assert step_shares(Moment(BEFORE), Moment(after()), tokens=0, parallel=2) is None


def test_repeats_count_alike() -> None:
    mean = mean_shares([some_shares(0.25), some_shares(0.75)])
    assert mean is not None
    assert (mean.shares["attention"], mean.shares["waiting"], mean.shares["router"]) == (0.5, 0.5, 0.0)
    assert (mean.steps, mean.bytes_per_token) == (4, 2048.0)
    assert mean_shares([]) is None


def test_memory_is_summed_and_held_against_the_bar() -> None:
    held = memory_use([1, 2], weight_bytes=1_000_000_000, read={1: 900_000_000, 2: 1_100_000_000}.__getitem__)
    assert held == MemoryUse(num_processes=2, pss_bytes=2_000_000_000, weight_bytes=1_000_000_000)
    assert held.to_json() == {
        "num_processes": 2,
        "pss_bytes": 2_000_000_000,
        "weight_bytes": 1_000_000_000,
        "bar_bytes": 1_950_000_000,
        "within_bar": False,
    }


def test_a_peer_has_no_bar() -> None:
    assert memory_use([1], read=lambda pid: 5).to_json() == {"num_processes": 1, "pss_bytes": 5, "weight_bytes": 0}


def test_this_process_holds_something() -> None:
    assert 10_000_000 < proportional_bytes(os.getpid()) < 100_000_000_000
