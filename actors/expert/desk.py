"""Where rows are taken in, computed and counted, whichever lane they came by.

Checks all but the rows, cheapest first, and that there is room; the queue is bounded in tokens. Rows that a kernel
chokes on end in an error for their sender and in nothing else. What a message looks like is the lanes'
(`actors.expert.service` for gRPC, `actors.expert.lane_server` for shared memory), the columns are the replica's.

M rows of one message, D hidden size.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from actors.expert.replica import Column, ExpertReplica, state_name
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)


_READY, _FAILED, _OK = pb.REPLICA_STATE_READY, pb.REPLICA_STATE_FAILED, pb.STATUS_OK


class Refused(Exception):
    """A request that is answered with `status` instead of rows."""

    def __init__(self, status: pb.Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail


class Admitted(NamedTuple):
    """Rows that may be computed: `num_rows[i]` of them, one behind another, through `columns[i]` in `layer`.

    `total` is M.
    """

    layer: int
    columns: tuple[Column, ...]
    num_rows: tuple[int, ...]
    total: int
    deadline_unix_us: int
    arrived_s: float


class Outcome(NamedTuple):
    """Status OK: the answers have been given to the sink. Times in microseconds."""

    status: pb.Status
    detail: str = ""
    queue_us: int = 0
    compute_us: int = 0


class Desk:
    """One replica's. `wall_us` is the clock of deadlines, microseconds since 1970. Any thread may call."""

    def __init__(
        self,
        replica: ExpertReplica,
        *,
        max_queue_tokens: int,
        min_map_epoch: int = 0,
        wall_us: Callable[[], int] = lambda: time.time_ns() // 1000,
    ) -> None:
        self.replica = replica
        self.max_queue_tokens = max_queue_tokens
        self._min_map_epoch = min_map_epoch
        self._wall_us = wall_us

    def admit(
        self,
        layer: int,
        experts: Sequence[int],
        num_rows: Sequence[int],
        *,
        map_epoch: int,
        deadline_unix_us: int,
    ) -> Admitted:
        """Takes rows in, which `finish` must give out again. Raises Refused."""
        arrived_s = time.monotonic()
        replica = self.replica
        if deadline_unix_us == 0 or not experts:
            raise Refused(pb.STATUS_INVALID, "sequence, experts and deadline_unix_us must not be 0")
        if replica.state != _READY and (replica.state == pb.REPLICA_STATE_DRAINING or not replica.serves_while_loading):
            raise self._not_ready()
        if map_epoch < self._min_map_epoch:
            raise Refused(pb.STATUS_STALE_EPOCH, f"map_epoch {map_epoch} is older than {self._min_map_epoch}")
        columns = tuple([self._column(layer, expert) for expert in experts])
        self._check_deadline(deadline_unix_us)
        total = sum(num_rows)
        if not 1 <= total <= self.max_queue_tokens or len(num_rows) != len(experts):
            raise Refused(pb.STATUS_INVALID, f"{total} rows, expected 1 to {self.max_queue_tokens}")
        room = replica.take(total, self.max_queue_tokens)
        if room is not None:
            raise Refused(pb.STATUS_OVERLOADED, f"{total} rows, room for {room}")
        if map_epoch > replica.map_epoch:
            replica.map_epoch = map_epoch
        return Admitted(layer, columns, tuple(num_rows), total, deadline_unix_us, arrived_s)

    def compute(self, work: Admitted, x_MD: torch.Tensor, sink: Callable[[int, torch.Tensor], None]) -> Outcome:
        """Runs the columns; `sink(first row, answers)` is called for each. In the compute thread."""
        started_s = time.monotonic()
        try:
            if self.replica.state == _FAILED:
                raise Refused(pb.STATUS_NOT_HELD, f"this replica has failed: {self.replica.detail}")
            self._check_deadline(work.deadline_unix_us)
            if len(work.columns) == 1:  # the usual case: the rows as they are
                sink(0, work.columns[0].forward(work.layer, x_MD))
            else:
                at = 0
                for column, count in zip(work.columns, work.num_rows, strict=True):
                    sink(at, column.forward(work.layer, x_MD[at : at + count]))
                    at += count
        except Refused as error:
            return Outcome(error.status, error.detail)
        except Exception as error:  # rows that a kernel chokes on must not take the others' replica down
            LOG.exception("layer %d failed", work.layer)
            return Outcome(pb.STATUS_INTERNAL, f"{type(error).__name__}: {error}")
        queue_us = int((started_s - work.arrived_s) * 1e6)
        return Outcome(_OK, "", queue_us, int((time.monotonic() - started_s) * 1e6))

    def finish(self, work: Admitted, outcome: Outcome | None) -> None:
        """Counts what was computed, and gives its room back; None for work that nobody waits for any more."""
        computed = outcome is not None and outcome.status == _OK
        self.replica.give_back(
            work.total,
            tokens=work.total if computed else 0,
            queue_us=0 if outcome is None else outcome.queue_us,
            compute_us=0 if outcome is None else outcome.compute_us,
            errors=int(outcome is not None and not computed),
        )

    def _not_ready(self) -> Refused:
        if self.replica.state == pb.REPLICA_STATE_DRAINING:
            return Refused(pb.STATUS_DRAINING, "this replica is draining")
        return Refused(pb.STATUS_NOT_HELD, f"this replica is {state_name(self.replica.state)}")

    def _column(self, layer: int, expert: int) -> Column:
        column = self.replica.find(layer, expert)
        if column is None:
            raise Refused(pb.STATUS_NOT_HELD, f"this replica does not hold expert {expert} in layer {layer}")
        return column

    def _check_deadline(self, deadline_unix_us: int) -> None:
        late_us = self._wall_us() - deadline_unix_us
        if late_us >= 0:
            raise Refused(pb.STATUS_DEADLINE_EXCEEDED, f"expired {late_us / 1e3:.1f} ms ago")
