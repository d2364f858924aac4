"""Clusters that rows run on: what every kind offers, and `octavo serve` on Ray. Without Ray: `tests.chaos.plain`.

A cluster says who its processes are and whether it is whole; hurting them is `tests.chaos.faults`'.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import psutil

from actors import ray_runtime
from actors.ray_runtime import RuntimeFailure
from actors.supervision.status import ClusterStatus
from tests.support.served_cluster import NAMESPACE, ServedCluster

WHOLE_TIMEOUT_S = 240.0
POLL_S = 0.2
WORK_WINDOW_S = 2.2  # a supervisor looks once a second
CALL_TIMEOUT_S = 30.0
MODEL_ID = "chaos"
NUM_EXPERTS = 8  # of both models
COUNTS = ("expert_calls_total", "hedges_total", "expert_retries_total")
"""A coordinator's counters of its calls to experts, as its snapshot names them."""


class NotWhole(RuntimeError):
    """A cluster did not become whole again in time; it is of no use to the next row."""


@dataclass(frozen=True, slots=True)
class Process:
    """An expert replica, or a coordinator without `expert_ids`; `work` grows with what a replica computes."""

    name: str
    pid: int
    state: str
    expert_ids: tuple[int, ...] = ()
    address: str = ""
    work: int = 0


@dataclass(frozen=True, slots=True)
class Counters:
    """All coordinators' counters summed; `extra` are hedges and retries. None where the cluster does not count."""

    calls: int | None
    extra: int | None

    def since(self, before: "Counters") -> "Counters":
        """The difference; a coordinator that began anew counts from 0."""
        return Counters(_minus(self.calls, before.calls), _minus(self.extra, before.extra))


class Cluster(Protocol):
    """A running cluster with an OpenAI-compatible front door at `url`, which serves `model_id`."""

    url: str
    model_id: str

    async def replicas(self) -> Sequence[Process]:
        """Every expert replica that should be there, by name."""
        ...

    async def coordinators(self) -> Sequence[Process]:
        """Every coordinator that should be there, by name."""
        ...

    async def counters(self) -> Counters:
        """What the coordinators count of calls to experts."""
        ...

    async def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        """Returns when everything that should be there is there and trusted. Raises NotWhole saying what lacks."""
        ...


@dataclass(frozen=True)
class Served:
    """Needs `octavo serve MODEL OPTIONS` on a Ray of its own."""

    options: tuple[str, ...] = ("--replicas", "2")

    @asynccontextmanager
    async def open(self, model: Path, home: Path) -> AsyncIterator["ServedChaos"]:
        """Starts it in this thread: the command is to end with the thread that started it, and that is the main one."""
        served = ServedCluster(home, model, "--served-model-name", MODEL_ID, *self.options)
        try:
            yield ServedChaos(served)
        finally:
            served.stop()


class ServedChaos:
    """`octavo serve`, asked through its supervisor and, for the coordinators' own counters, through Ray."""

    def __init__(self, served: ServedCluster) -> None:
        self.served = served
        self.url = served.url
        self.model_id = MODEL_ID
        served.status()  # connects to Ray, from the main thread

    async def status(self) -> ClusterStatus:
        """What `octavo status` shows. Raises RuntimeFailure or TimeoutError while the supervisor is away."""
        return await asyncio.to_thread(self.served.status)

    async def replicas(self) -> Sequence[Process]:
        """See Cluster."""
        return [
            Process(one.replica_id, one.pid, one.state, tuple(one.expert_ids), one.address, one.tokens_total)
            for one in (await self.status()).replicas
        ]

    async def coordinators(self) -> Sequence[Process]:
        """See Cluster."""
        return [
            Process(one.coordinator_id, one.pid, one.state, (), one.address)
            for one in (await self.status()).coordinators
        ]

    async def info(self, coordinator_id: str) -> Mapping[str, Any] | None:
        """The account that a coordinator gives of itself, every field of its snapshot; None while it is away."""
        return await asyncio.to_thread(_info, f"coordinator/{coordinator_id}/")

    async def counters(self) -> Counters:
        """See Cluster. Unknown while the supervisor is away."""
        try:
            return sum_counters([await self.info(one.name) or {} for one in await self.coordinators()])
        except (RuntimeFailure, TimeoutError, AssertionError):
            return Counters(None, None)

    async def wait_whole(self, timeout_s: float = WHOLE_TIMEOUT_S) -> None:
        """See Cluster."""
        deadline_s = time.monotonic() + timeout_s
        while (lacking := await self._lacking()) is not None:
            if time.monotonic() > deadline_s:
                raise NotWhole(f"not whole within {timeout_s:g} s: {lacking}")
            await asyncio.sleep(POLL_S)

    def processes(self, title: str) -> list[psutil.Process]:
        """The cluster's processes whose title begins so, e.g. `ray::ServeController`, `ray::ServeReplica`."""
        return [one for one in self.served.processes() if _title(one).startswith(title)]

    async def _lacking(self) -> str | None:
        try:
            status = await self.status()
            if status.state != "ready":
                away = [one.replica_id for one in status.replicas if one.state != "ready"]
                return f"the cluster is {status.state}; not ready: {', '.join(away) or 'a coordinator'}"
            pids = [one.pid for one in status.replicas] + [one.pid for one in status.coordinators]
            gone = [pid for pid in pids if not alive(pid)]
            if gone:  # the supervisor has not noticed yet
                return f"no process {gone[0]}"
            for one in status.coordinators:
                info = await self.info(one.coordinator_id)
                distrusted = None if info is None else unhealthy(info)
                if info is None or distrusted:
                    return f"{one.coordinator_id}: {distrusted or 'does not answer'}"
        except (RuntimeFailure, TimeoutError, AssertionError) as error:
            return str(error)
        return None


async def holders(cluster: Cluster, expert: int) -> list[Process]:
    """The replicas of an expert that are ready, by name."""
    return [one for one in await cluster.replicas() if expert in one.expert_ids and one.state == "ready"]


async def in_use(cluster: Cluster, expert: int) -> Process:
    """The replica that computes this expert's rows now: of two copies one may do all the work, and to hurt the other
    would prove nothing.
    """
    before = {one.name: one.work for one in await holders(cluster, expert)}
    await asyncio.sleep(WORK_WINDOW_S)
    after = await holders(cluster, expert)
    if not after:
        raise NotWhole(f"nobody has expert {expert}")
    return max(after, key=lambda one: one.work - before.get(one.name, one.work))


def alive(pid: int) -> bool:
    """True for a process that is there and is not only waited for."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def unhealthy(info: Mapping[str, Any]) -> str | None:
    """The first replica that a coordinator does not trust, from `replica_health`; None too where it tells nothing."""
    for one in info.get("replica_health") or ():
        if one["state"] != "healthy":
            return f"{one['replica_id']} is {one['state']}"
    return None


def sum_counters(infos: Sequence[Mapping[str, Any]]) -> Counters:
    """Of coordinators' own accounts; those that do not count calls to experts make it None."""
    calls = [info.get("expert_calls_total") for info in infos]
    if not calls or not any(calls):
        return Counters(None, None)
    extra = sum(int(info.get("hedges_total") or 0) + int(info.get("expert_retries_total") or 0) for info in infos)
    return Counters(sum(int(one or 0) for one in calls), extra)


def _info(prefix: str) -> Mapping[str, Any] | None:
    for name in ray_runtime.names(NAMESPACE):
        actor = ray_runtime.find(name, NAMESPACE) if name.startswith(prefix) else None
        if actor is not None:
            try:
                info: Mapping[str, Any] = actor.call_sync("info", timeout_s=CALL_TIMEOUT_S)
                return info
            except (RuntimeFailure, TimeoutError):
                continue
    return None


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _minus(now: int | None, before: int | None) -> int | None:
    if now is None:
        return None
    return now - before if before is not None and before <= now else now
