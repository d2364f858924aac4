"""Tokens of one batch to hosts, for all layers at once: `selector.assign` on arrays, with nothing in flight.

It gives what the live selector gives, layer by layer and to the last bit; a test holds it to that. L layers, E
experts, N hosts; X is N and one more host, which does not exist and takes what is given to nobody; R holders of an
expert, P parts.
"""

import numpy as np
import numpy.typing as npt

from cluster.layout import FloatArray, Grain, IntArray, Layout, speeds
from cluster.selector import LEAST_B_S, SelectorPolicy
from cluster.service_time import ServiceTime

BoolArray = npt.NDArray[np.bool_]

_NEVER_S = 1e15  # when the host that does not exist is done


class Assigner:
    """For one layout; `cost` is of a host of speed 1. A step costs some array operations for each expert that has a
    choice anywhere, however many layers and copies there are.
    """

    def __init__(
        self, layout: Layout, *, cost: ServiceTime, policy: SelectorPolicy | None = None, seat: int = 0
    ) -> None:
        if (layout.copies_U == 0).any():
            unit = int(np.argmin(layout.copies_U))
            raise ValueError(f"nobody holds {layout.grain.say(unit)}")
        grain: Grain = layout.grain
        self._policy = SelectorPolicy() if policy is None else policy
        self._num_hosts = len(layout.hosts)
        self._a_X: FloatArray = np.append(cost.a_s / speeds(layout.hosts), _NEVER_S)
        self._b_X: FloatArray = np.append(cost.b_s / speeds(layout.hosts), 1.0)
        self._rows_L = np.arange(grain.num_layers)
        which_L = np.searchsorted(grain.bounds, np.arange(grain.num_layers), side="right") - 1
        self._copies_LE: IntArray = layout.copies_U.reshape(grain.num_ranges, grain.num_experts)[which_L]
        most = int(layout.copies_U.max())
        # Holders of each unit in order of hosts, filled up with the host that does not exist.
        holders_UR = np.full((grain.num_units, most), self._num_hosts, np.int64)
        for unit in range(grain.num_units):
            columns = np.flatnonzero(layout.held_UN[unit])
            holders_UR[unit, : len(columns)] = columns
        self._holders_LER = holders_UR.reshape(grain.num_ranges, grain.num_experts, most)[which_L]
        self._least_a_LE: FloatArray = self._a_X[self._holders_LER].min(axis=2)
        self._least_b = float(self._b_X[:-1].min())
        held_GN = layout.held_UN.reshape(grain.num_ranges, grain.num_experts, -1).any(axis=1)
        self._num_hosts_L: IntArray = held_GN.sum(axis=1)[which_L]
        turns_LER = (np.arange(most) - seat) % self._copies_LE[:, :, None] / self._copies_LE[:, :, None]
        self._leanings_LER: FloatArray = 1.0 + self._policy.leaning(seat) * turns_LER

    def assign(self, tokens_LE: IntArray) -> tuple[IntArray, IntArray]:
        """Tokens and calls of each host in each layer, both (L, N)."""
        work = _Work(len(self._rows_L), self._a_X, self._b_X)
        forced_LE = (self._copies_LE == 1) & (tokens_LE > 0)
        layers, experts = np.nonzero(forced_LE)
        work.add(layers, self._holders_LER[layers, experts, 0], tokens_LE[layers, experts])
        choice_LE = (self._copies_LE > 1) & (tokens_LE > 0)
        num_L = choice_LE.sum(axis=1)
        if not num_L.any():
            return work.result()
        forced_L = work.latest_L.copy()
        # Largest batches first, of equals the first expert; those without a choice at the end.
        order_LE = np.argsort(np.where(choice_LE, -tokens_LE, 1), axis=1, kind="stable")
        for place in range(int(num_L.max())):
            layers = np.flatnonzero(num_L > place)
            self._place(work, layers, order_LE[layers, place], tokens_LE)
        bar_L = work.latest_L * (1 - self._policy.lean) - self._policy.message_s
        doubtful = np.flatnonzero((num_L > 1) & (work.latest_L > forced_L) & (self._whole_L(tokens_LE) < bar_L))
        if len(doubtful):
            other = self._fewest(doubtful, tokens_LE)
            better = other.latest_L < bar_L[doubtful]
            work.take(doubtful[better], other, better)
        return work.result()

    def _whole_L(self, tokens_LE: IntArray) -> FloatArray:
        """No sooner does a layer end with whole experts: one alone, all shared evenly (a hair less: rounding)."""
        work_LE = np.where(tokens_LE > 0, self._least_a_LE + self._least_b * tokens_LE, 0.0)
        bound_L: FloatArray = np.maximum(work_LE.max(axis=1), work_LE.sum(axis=1) / self._num_hosts_L) * (1 - 1e-9)
        return bound_L

    def _place(self, work: "_Work", layers: IntArray, experts: IntArray, tokens_LE: IntArray) -> None:
        """One expert's rows in each of these layers to one of its holders, or to several."""
        policy = self._policy
        num_L1 = tokens_LE[layers, experts][:, None]
        holders_LR = self._holders_LER[layers, experts]
        a_LR, b_LR = self._a_X[holders_LR], self._b_X[holders_LR]
        at = (layers[:, None], holders_LR)
        begins_LR = work.finish_LX[at] + np.where(work.calls_LX[at] > 0, 0.0, policy.message_s)
        work_LR = a_LR + b_LR * num_L1
        ends_LR = begins_LR + work_LR
        best_L = (begins_LR + work_LR * self._leanings_LER[layers, experts]).argmin(axis=1)
        chosen = (np.arange(len(layers)), best_L)
        hosts_L, end_L, a_L, b_L = holders_LR[chosen], ends_LR[chosen], a_LR[chosen], b_LR[chosen]
        may_L = (end_L > work.latest_L[layers]) & (b_L * num_L1[:, 0] > policy.split_past * a_L)
        if policy.split and may_L.any():
            split_L = np.zeros(len(layers), np.bool_)
            parts_LR = _split(
                num_L1[may_L, 0], a_LR[may_L], b_LR[may_L], begins_LR[may_L], ends_LR[may_L],
                (1 - policy.split_gain) * end_L[may_L], work.latest_L[layers[may_L]], policy.split_past,
            )  # fmt: skip
            split_L[may_L] = parts_LR.any(axis=1)
            which, column = np.nonzero(parts_LR)
            work.add(layers[may_L][which], holders_LR[may_L][which, column], parts_LR[which, column])
            whole_L = ~split_L
            work.add_apart(layers[whole_L], hosts_L[whole_L], num_L1[whole_L, 0])
        else:
            work.add_apart(layers, hosts_L, num_L1[:, 0])

    def _fewest(self, layers: IntArray, tokens_LE: IntArray) -> "_Work":
        """`selector.fewest_in_flight` in these layers."""
        work = _Work(len(layers), self._a_X, self._b_X)
        work.tokens_LX[:, -1] = np.iinfo(np.int64).max // 2
        for expert in range(tokens_LE.shape[1]):
            rows = np.flatnonzero(tokens_LE[layers, expert])
            holders_LR = self._holders_LER[layers[rows], expert]
            chosen_L = work.tokens_LX[rows[:, None], holders_LR].argmin(axis=1)
            work.add_apart(rows, holders_LR[np.arange(len(rows)), chosen_L], tokens_LE[layers[rows], expert])
        return work


class _Work:
    """What each host has to do in each layer, and when it and the layer are done."""

    def __init__(self, num_layers: int, a_X: FloatArray, b_X: FloatArray) -> None:
        self.tokens_LX = np.zeros((num_layers, len(a_X)), np.int64)
        self.calls_LX = np.zeros_like(self.tokens_LX)
        self.finish_LX = np.zeros(self.tokens_LX.shape)
        self.latest_L = np.zeros(num_layers)
        self._a_X, self._b_X = a_X, b_X

    def add(self, layers: IntArray, hosts: IntArray, tokens: IntArray) -> None:
        """So many tokens in one call, for each of these places; a place may be there several times."""
        np.add.at(self.tokens_LX, (layers, hosts), tokens)
        np.add.at(self.calls_LX, (layers, hosts), 1)
        np.add.at(self.finish_LX, (layers, hosts), self._a_X[hosts] + self._b_X[hosts] * tokens)
        np.maximum.at(self.latest_L, layers, self.finish_LX[layers, hosts])

    def add_apart(self, layers: IntArray, hosts: IntArray, tokens: IntArray) -> None:
        """`add` where each layer is there once: several times cheaper."""
        self.tokens_LX[layers, hosts] += tokens
        self.calls_LX[layers, hosts] += 1
        ends_s = self.finish_LX[layers, hosts] + (self._a_X[hosts] + self._b_X[hosts] * tokens)
        self.finish_LX[layers, hosts] = ends_s
        self.latest_L[layers] = np.maximum(self.latest_L[layers], ends_s)

    def take(self, layers: IntArray, other: "_Work", which: BoolArray) -> None:
        """The other's rows in place of these layers."""
        self.tokens_LX[layers] = other.tokens_LX[which]
        self.calls_LX[layers] = other.calls_LX[which]

    def result(self) -> tuple[IntArray, IntArray]:
        """Tokens and calls, both (L, N)."""
        return self.tokens_LX[:, :-1], self.calls_LX[:, :-1]


def _split(
    num_L: IntArray,
    a_LR: FloatArray,
    b_LR: FloatArray,
    begins_LR: FloatArray,
    ends_LR: FloatArray,
    before_L: FloatArray,
    latest_L: FloatArray,
    split_past: float,
) -> IntArray:
    """Parts that end together, of as many holders as it takes, shape (L, R); zeros where it is better not to split."""
    order_LR = np.argsort(ends_LR, axis=1, kind="stable")
    a_LP, b_LP, begins_LP = (np.take_along_axis(each, order_LR, 1) for each in (a_LR, b_LR, begins_LR))
    starts_LP, slopes_LP = begins_LP + a_LP, np.maximum(b_LP, LEAST_B_S)
    least_LP = np.maximum(split_past * a_LP / slopes_LP, 1.0)
    together_LP = (num_L[:, None] + np.cumsum(starts_LP / slopes_LP, axis=1)) / np.cumsum(1 / slopes_LP, axis=1)
    best_L = np.zeros(len(num_L), np.int64)
    best_s_L, end_L = before_L.copy(), np.zeros(len(num_L))
    for several in range(2, order_LR.shape[1] + 1):
        end_L1 = together_LP[:, several - 1 : several]
        parts_LP = (end_L1 - starts_LP[:, :several]) / slopes_LP[:, :several]
        ends_L = np.maximum(end_L1[:, 0], latest_L)
        better_L = (parts_LP >= least_LP[:, :several]).all(axis=1) & (ends_L < best_s_L)
        best_L[better_L], best_s_L[better_L], end_L[better_L] = several, ends_L[better_L], end_L1[better_L, 0]
    ranks = np.arange(order_LR.shape[1])
    taken_LP = ranks < best_L[:, None]
    parts_LP = np.where(taken_LP, (end_L[:, None] - starts_LP) / slopes_LP, 0.0).astype(np.int64)
    left_L1 = num_L[:, None] - parts_LP.sum(axis=1, keepdims=True)
    parts_LP += taken_LP & (ranks < left_L1)
    parts_LR = np.zeros_like(parts_LP)
    np.put_along_axis(parts_LR, order_LR, parts_LP, 1)
    return parts_LR


def host_seconds(tokens_LN: IntArray, calls_LN: IntArray, cost: ServiceTime, speed_N: FloatArray) -> FloatArray:
    """How long each host works in each layer, shape (L, N)."""
    seconds: FloatArray = (calls_LN * cost.a_s + tokens_LN * cost.b_s) / speed_N
    return seconds
