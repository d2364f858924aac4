"""Who works on a simulated batch and for how long: a server for each host, or one for each of a host's experts.

A host that is one process does everything in turn, and the selector knows how much that is. Of experts that are
processes of their own it knows what each has to do, as it does live, and a host works on `parallelism` of them at once.
Each server with something to do in a layer is a message and an answer. L layers, E experts, N hosts, S servers.
"""

from dataclasses import dataclass

import numpy as np

from cluster.assignment import Assigner, host_seconds
from cluster.ids import NodeId
from cluster.layout import BoolArray, FloatArray, Host, IntArray, Layout, as_busy, parallelisms, speeds
from cluster.selector import SelectorPolicy
from cluster.service_time import ServiceTime


@dataclass(frozen=True, slots=True, eq=False)
class Worked:
    """A batch: rows and seconds of each host in each layer, both (L, N), messages of all layers, and when the last
    answer of each layer was taken in, (L,). Of experts that are processes, a host's are of the one that is done last.
    """

    rows_LN: FloatArray
    seconds_LN: FloatArray
    num_messages: int
    ended_L: FloatArray


class Servers:
    """Of one layout; `cost` is of a call on a host of speed 1, `apart` says that experts are processes.

    A coordinator takes the answers of a layer in one after another, each in `answer_s`.
    """

    def __init__(
        self, layout: Layout, cost: ServiceTime, policy: SelectorPolicy, *, apart: bool, answer_s: float = 0.0
    ) -> None:
        self._cost, self._answer_s = cost, answer_s
        self._num_hosts = len(layout.hosts)
        self._host_S: IntArray | None = None
        servers = layout
        if apart:
            servers, self._host_S = _by_expert(layout)
            self._used_N, self._first_N = np.unique(self._host_S, return_index=True)
            self._parallel_N = parallelisms(layout.hosts)[self._used_N]
        self._speed_S = speeds(servers.hosts)
        self._assigner = Assigner(servers, cost=cost, policy=policy)

    def work(self, tokens_LE: IntArray) -> Worked:
        """What one batch is for them."""
        tokens_LS, calls_LS = self._assigner.assign(tokens_LE)
        seconds_LS = host_seconds(tokens_LS, calls_LS, self._cost, self._speed_S)
        seconds_LN = self._of_hosts(seconds_LS)
        ended_L = seconds_LN.max(axis=1)
        if self._answer_s:
            ended_L = taken_in(self._done(seconds_LS), calls_LS > 0, self._answer_s)
        num_messages = int(np.count_nonzero(calls_LS))
        return Worked(self._of_hosts(tokens_LS.astype(np.float64)), seconds_LN, num_messages, ended_L)

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

    def _done(self, seconds_LS: FloatArray) -> FloatArray:
        """When each server is done, shape (L, S): those of a host take turns where it does not work on all at once."""
        if self._host_S is None:
            return seconds_LS
        num_N = np.diff(np.append(self._first_N, len(self._host_S)))
        before_LS = np.cumsum(seconds_LS, axis=1) - seconds_LS
        since_LS = before_LS - np.repeat(before_LS[:, self._first_N], num_N, axis=1) + seconds_LS
        turns_S = np.repeat(num_N > self._parallel_N, num_N)
        in_turn_LS = np.maximum(since_LS / np.repeat(self._parallel_N, num_N), seconds_LS)
        done_LS: FloatArray = np.where(turns_S, in_turn_LS, seconds_LS)
        return done_LS


def taken_in(done_LS: FloatArray, asked_LS: BoolArray, answer_s: float) -> FloatArray:
    """When all answers of a layer are taken in, one after another as they come, each in `answer_s`, shape (L,).

    >>> taken_in(np.array([[4.0, 1.0, 4.0]]), np.array([[True, True, True]]), 0.5).tolist()
    [5.0]
    """
    latest_first_LS = -np.sort(-np.where(asked_LS, done_LS, -np.inf), axis=1)
    # Whoever has k answers at or after its own waits for all of these.
    ended_L: FloatArray = (latest_first_LS + answer_s * np.arange(1, done_LS.shape[1] + 1)).max(axis=1)
    return np.maximum(ended_L, 0.0)


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
