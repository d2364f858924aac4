"""Who works on a simulated batch and for how long: a server for each host, or one for each of a host's experts.

A host that is one process does everything in turn, and the selector knows how much that is. Of experts that are
processes of their own it knows what each has to do, as it does live, and a host works on `parallelism` of them at once.
L layers, E experts, N hosts, S servers.
"""

import numpy as np

from cluster.assignment import Assigner, host_seconds
from cluster.ids import NodeId
from cluster.layout import FloatArray, Host, IntArray, Layout, as_busy, parallelisms, speeds
from cluster.selector import SelectorPolicy
from cluster.service_time import ServiceTime


class Servers:
    """Of one layout; `cost` is of a call on a host of speed 1, `apart` says that experts are processes."""

    def __init__(self, layout: Layout, cost: ServiceTime, policy: SelectorPolicy, *, apart: bool) -> None:
        self._cost = cost
        self._num_hosts = len(layout.hosts)
        self._host_S: IntArray | None = None
        servers = layout
        if apart:
            servers, self._host_S = _by_expert(layout)
            self._used_N, self._first_N = np.unique(self._host_S, return_index=True)
            self._parallel_N = parallelisms(layout.hosts)[self._used_N]
        self._speed_S = speeds(servers.hosts)
        self._assigner = Assigner(servers, cost=cost, policy=policy)

    def work(self, tokens_LE: IntArray) -> tuple[FloatArray, FloatArray]:
        """Rows and seconds of each host in each layer, both (L, N); where experts are processes, of those it is done
        with last.
        """
        tokens_LS, calls_LS = self._assigner.assign(tokens_LE)
        seconds_LS = host_seconds(tokens_LS, calls_LS, self._cost, self._speed_S)
        return self._of_hosts(tokens_LS.astype(np.float64)), self._of_hosts(seconds_LS)

    def _of_hosts(self, work_LS: FloatArray) -> FloatArray:
        if self._host_S is None:
            return work_LS
        work_LN = np.zeros((len(work_LS), self._num_hosts))
        work_LN[:, self._used_N] = as_busy(
            np.add.reduceat(work_LS, self._first_N, axis=1),
            np.maximum.reduceat(work_LS, self._first_N, axis=1),
            self._parallel_N,
        )
        return work_LN


def _by_expert(layout: Layout) -> tuple[Layout, IntArray]:
    """A host for each expert that a host has something of, in order of hosts, and which host it is of."""
    grain = layout.grain
    of_UE = np.arange(grain.num_units)[:, None] % grain.num_experts == np.arange(grain.num_experts)
    held_UNE = layout.held_UN[:, :, None] & of_UE[:, None, :]
    host_S, expert_S = np.nonzero(held_UNE.any(axis=0))
    hosts = [
        Host(node_id=NodeId(f"{layout.hosts[n].node_id}/{e}"), slots=1, memory_bytes=1, speed=layout.hosts[n].speed)
        for n, e in zip(host_S, expert_S, strict=True)
    ]
    return Layout(grain, tuple(hosts), held_UNE[:, host_S, expert_S]), host_S
