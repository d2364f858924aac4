"""Where a coordinator's steps spent their time between two snapshots, and what went over the wire.

Two of the shares are arithmetic and not measurements. The coordinator waits for a layer's experts as a whole;
`expert_compute` is the part of that wait in which the experts' summed compute time fits if all that can compute at once
do so, and the rest is `waiting`: transport, wake-ups, queueing, uneven experts. Experts time themselves by the wall
clock, so where more of them compute than there are cores, their times contain the waits for a core and `expert_compute`
is too large. CPU times, which the system counts, have no such fault: they are beside.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

import psutil

from protos.coordinator_pb2 import SnapshotReply

PHASES = ("attention", "router", "dispatch", "expert_compute", "combine", "head", "sampling", "waiting", "other")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShares:
    """`shares` of a step's time by phase, which sum to 1; the rest in the units of their names, per step or token.

    `expert_compute_ms` and `expert_queue_ms` are sums over the experts of a step, which work side by side.
    `expert_cpu_ms` and `coordinator_cpu_ms` are the CPU time of those processes, all threads; 0 where nobody asked.
    """

    steps: int
    step_ms: float
    shares: Mapping[str, float]
    expert_compute_ms: float
    expert_queue_ms: float
    bytes_per_token: float
    messages_per_token: float
    expert_cpu_ms: float = 0.0
    coordinator_cpu_ms: float = 0.0

    def to_json(self) -> dict[str, object]:
        """Plain values under stable names."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Seconds of CPU that the processes of a cluster have used so far."""

    experts_s: float = 0.0
    coordinators_s: float = 0.0


def cpu_seconds(pids: Iterable[int]) -> float:
    """User and system time of all, in the system's ticks of 10 ms. Raises psutil.Error for one that is gone."""
    times = [psutil.Process(pid).cpu_times() for pid in pids]
    return float(sum(one.user + one.system for one in times))


@dataclass(frozen=True, slots=True)
class Moment:
    """All that was counted up to one moment."""

    snapshot: SnapshotReply
    cpu: CpuTimes = CpuTimes()


def step_shares(began: Moment, ended: Moment, *, tokens: int, parallel: int) -> StepShares | None:
    """`tokens` were computed between the two; at most `parallel` experts compute at once. None without a step."""
    before, after = began.snapshot, ended.snapshot

    def passed(name: str) -> float:
        return float(getattr(after, name) - getattr(before, name))

    steps, step_s = int(passed("steps_total")), passed("step_s_total")
    if steps < 1 or step_s <= 0 or tokens < 1:
        return None
    compute_s = passed("expert_compute_us_total") / 1e6
    wait_s = passed("expert_wait_s_total")
    expert_s = min(wait_s, compute_s / parallel)
    seconds = {
        "attention": passed("attention_s_total") + passed("prepare_s_total"),
        "router": passed("router_s_total"),
        "dispatch": passed("dispatch_s_total"),
        "expert_compute": expert_s,
        "combine": passed("combine_s_total"),
        "head": passed("head_s_total"),
        "sampling": passed("sampling_s_total"),
        "waiting": wait_s - expert_s,
    }
    seconds["other"] = max(0.0, step_s - sum(seconds.values()))
    whole_s = sum(seconds.values())
    num_bytes = passed("wire_bytes_sent_total") + passed("wire_bytes_received_total")
    return StepShares(
        steps=steps,
        step_ms=1e3 * step_s / steps,
        shares={name: seconds[name] / whole_s for name in PHASES},
        expert_compute_ms=1e3 * compute_s / steps,
        expert_queue_ms=passed("expert_queue_us_total") / 1e3 / steps,
        bytes_per_token=num_bytes / tokens,
        messages_per_token=passed("wire_messages_total") / tokens,
        expert_cpu_ms=1e3 * (ended.cpu.experts_s - began.cpu.experts_s) / steps,
        coordinator_cpu_ms=1e3 * (ended.cpu.coordinators_s - began.cpu.coordinators_s) / steps,
    )


def mean_shares(parts: list[StepShares]) -> StepShares | None:
    """The average over repeats, each repeat counting alike."""
    if not parts:
        return None

    def mean(name: str) -> float:
        return float(sum(getattr(part, name) for part in parts) / len(parts))

    return StepShares(
        steps=round(mean("steps")),
        step_ms=mean("step_ms"),
        shares={name: sum(part.shares[name] for part in parts) / len(parts) for name in PHASES},
        expert_compute_ms=mean("expert_compute_ms"),
        expert_queue_ms=mean("expert_queue_ms"),
        bytes_per_token=mean("bytes_per_token"),
        messages_per_token=mean("messages_per_token"),
        expert_cpu_ms=mean("expert_cpu_ms"),
        coordinator_cpu_ms=mean("coordinator_cpu_ms"),
    )
