"""Puts a round's answers in place, and believes them: the rows so far, how many parts are missing, who gave what.

Looking costs one sum over all rows when the last answer is in place: a sum is finite only if every element is (one
that merely overflows is looked at again). What happens to answers that are not believed, and what to do about parts
that are missing, is `actors.dispatch.recovery`'s.

N routed rows, M rows of one message, D hidden size.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch

from actors.dispatch.cross_check import CrossCheck
from actors.dispatch.doubts import Doubts, is_strange
from actors.dispatch.replica_pool import ReplicaPool
from actors.dispatch.round_parts import Failure, Message, Part, RemoteStats, failure_of, still_open
from actors.dispatch.transport import TransportError
from cluster.replica_record import State
from model.dispatch import DispatchPlan

_QUARANTINED = State.QUARANTINED
NOT_FINITE = Failure("NONFINITE", "the answer is not finite")


class Gathering:
    """One round's. `weights_TK` is there once answers came that were summed elsewhere."""

    def __init__(
        self,
        pool: ReplicaPool,
        stats: RemoteStats,
        cross_check: CrossCheck,
        layer: int,
        plan: DispatchPlan,
        x_ND: torch.Tensor,
    ) -> None:
        self.missing = 0
        """Parts without an answer; whoever sends some adds to it."""
        self.output_ND = torch.empty_like(x_ND, memory_format=torch.contiguous_format)
        self._out_ND = _plain(self.output_ND)
        self.weights_TK: torch.Tensor | None = None
        self._pool = pool
        self._stats = stats
        self._cross_check = cross_check
        self._layer = layer
        self._plan = plan
        self._x_ND = x_ND
        self._doubts: Doubts | None = None

    def take(self, message: Message) -> Failure | None:
        """Copies an answer, which has come, to its place, or says why there is none."""
        answer = message.reply.outcome()
        if isinstance(answer, TransportError) or answer.output is None or message.link.record.state is _QUARANTINED:
            if not isinstance(answer, TransportError) and answer.malformed:
                self._doubts = self._doubts or Doubts(self._pool)
                for part in still_open(message.parts):
                    self._doubts.malformed(part.asked, message.link)
            return failure_of(message)
        self._stats.compute_us += answer.compute_us
        self._stats.queue_us += answer.queue_us
        if message.merged is not None:
            return self._unpack(message, answer.output)
        if self._doubts is not None and not self._believes(message, answer.output, self._doubts):
            return NOT_FINITE
        self._put(message, answer.output)
        return None

    def disbelieved(self, messages: Iterable[Message]) -> list[Message]:
        """Once nothing is missing: messages whose answers must be asked for again; their parts are open again."""
        if self._doubts is not None or math.isfinite(self.output_ND.sum(dtype=torch.float32).item()):
            return []  # with doubts, each answer was looked at as it came
        doubts = self._doubts = Doubts(self._pool)
        found = []
        for message in messages:
            given = [part for part in message.parts if part.answered_by is message]
            believed = [
                doubts.believes(part.asked, message.link, self.output_ND[part.asked.rows], self._x_ND[part.asked.rows])
                for part in given
            ]
            if not all(believed):  # if some of it is wrong, all of it may be
                found.append(message)
                for part in given:
                    part.answered, part.answered_by = False, None
                self.missing += len(given)
        return found

    def agrees(self, messages: Iterable[Message], replica_id: str, row: int, y_1D: torch.Tensor) -> bool:
        """Whether another answer to one row is the one that is in place, if one is."""
        for message in messages:
            for part in message.parts:
                if part.answered_by is message and part.asked.rows.start <= row < part.asked.rows.stop:
                    used = self.output_ND[row : row + 1]
                    return self._cross_check.compare(self._layer, message, used, replica_id, y_1D)
        return True

    def _put(self, message: Message, output_MD: torch.Tensor) -> None:
        at, plain_MD = 0, _plain(output_MD)
        for part in message.parts:
            rows = part.asked.rows
            stop = at + rows.stop - rows.start
            if part.answered or part.pieces:
                self._put_late(message, part, output_MD[at:stop])
            else:
                self._out_ND[rows] = plain_MD[at:stop]
                part.answered_by = message
                self._note_answered(part)
            at = stop

    def _put_late(self, message: Message, part: Part, y_MD: torch.Tensor) -> None:
        """Somebody else has answered, or was asked for pieces of it."""
        if part.answered_by is not None:
            used = self.output_ND[part.asked.rows]
            self._cross_check.compare(self._layer, part.answered_by, used, message.link.replica.replica_id, y_MD)
        for piece in list(still_open(part.pieces)):
            at = piece.asked.rows.start - part.asked.rows.start
            self.output_ND[piece.asked.rows] = y_MD[at : at + piece.asked.num_rows]
            self._note_answered(piece)

    def _unpack(self, message: Message, output_UD: torch.Tensor) -> Failure | None:
        """Sums are looked at before they are in place: they cannot be taken back."""
        assert message.merged is not None, "these are no sums"
        if any(part.answered or part.pieces for part in message.parts):
            return failure_of(message)
        finite = math.isfinite(output_UD.sum(dtype=torch.float32).item())
        if not finite and is_strange(output_UD, message.merged.entries.x_UD):
            return NOT_FINITE
        if self.weights_TK is None:
            self.weights_TK = self._plan.weights_TK.to("cpu", copy=True)
        message.merged.unpack(output_UD, self.output_ND, self.weights_TK)
        for part in message.parts:
            self._note_answered(part)
        return None

    def _believes(self, message: Message, output_MD: torch.Tensor, doubts: Doubts) -> bool:
        """Whether all of an answer is what the model says."""
        at, believed = 0, True
        for part in message.parts:
            y_MD = output_MD[at : at + part.asked.num_rows]
            at += part.asked.num_rows
            if any(still_open([part])):
                believed &= doubts.believes(part.asked, message.link, y_MD, self._x_ND[part.asked.rows])
        return believed

    def _note_answered(self, part: Part) -> None:
        part.answered = True
        if part.pursuit is not None:
            part.pursuit.cancel()
        self.missing -= 1


def _plain(rows_MD: torch.Tensor) -> Any:
    """The same memory as a numpy array, whose slices and copies cost a third of a tensor's; numpy knows no bf16."""
    return rows_MD.numpy() if rows_MD.dtype is torch.float32 else rows_MD
