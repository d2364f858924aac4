"""What this ingress remembers of its streams: the tokens it has received, so that a cut one need not be computed again.

Bounded in streams and tokens, oldest first, and for a limited time. It only saves work: an ingress that does not
remember a stream has it computed again, with the same result.
"""

import time
from array import array
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from protos.coordinator_pb2 import FINISH_REASON_UNSPECIFIED, FinishReason, SequenceOutput

MAX_STREAMS = 1024
MAX_TOKENS = 1 << 20
"""Of all streams together; 4 bytes each."""


@dataclass(slots=True)
class Known:
    """One choice: the tokens that came, how many of its prompt's were not computed, and how it ended if it has."""

    token_ids: "array[int]" = field(default_factory=lambda: array("I"))
    finish_reason: FinishReason = FINISH_REASON_UNSPECIFIED
    num_cached_tokens: int = 0

    def copy(self) -> "Known":
        """Another one, which does not grow with this one."""
        return Known(self.token_ids[:], self.finish_reason, self.num_cached_tokens)


class StreamMemory:
    """Streams by their key. `clock` is monotonic; a record that nothing was added to for `keep_s` is forgotten."""

    def __init__(
        self,
        keep_s: float,
        *,
        max_streams: int = MAX_STREAMS,
        max_tokens: int = MAX_TOKENS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._keep_s = keep_s
        self._max_streams = max_streams
        self._max_tokens = max_tokens
        self._clock = clock
        self._streams: OrderedDict[str, StreamRecord] = OrderedDict()
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._streams)

    def begin(self, key: str, num_choices: int) -> "StreamRecord":
        """The record of a stream that begins, or goes on here: it starts with what is known and replaces it."""
        known = self._recall(key, num_choices) or tuple(Known() for _ in range(num_choices))
        self._forget(key)
        record = self._streams[key] = StreamRecord(self, known, self._clock())
        self.add(sum(len(one.token_ids) for one in known))
        return record

    def add(self, num_tokens: int) -> None:
        """Counts tokens of a record that is kept, and forgets the oldest ones where there are too many."""
        self.num_tokens += num_tokens
        while self._streams and (len(self._streams) > self._max_streams or self.num_tokens > self._max_tokens):
            self._forget(next(iter(self._streams)))
        while self._streams and self._is_old(key := next(iter(self._streams))):
            self._forget(key)

    def touch(self, record: "StreamRecord") -> None:
        """Notes that something was added to it."""
        record.touched_s = self._clock()

    def _recall(self, key: str, num_choices: int) -> tuple[Known, ...] | None:
        record = self._streams.get(key)
        if record is None or self._is_old(key) or len(record.choices) != num_choices:
            return None
        return tuple(one.copy() for one in record.choices)

    def _is_old(self, key: str) -> bool:
        return self._clock() - self._streams[key].touched_s > self._keep_s

    def _forget(self, key: str) -> None:
        record = self._streams.pop(key, None)
        if record is not None:
            record.kept = False
            self.num_tokens -= sum(len(one.token_ids) for one in record.choices)


class StreamRecord:
    """One stream's tokens. Once it is no longer kept nothing is added."""

    def __init__(self, memory: StreamMemory, choices: tuple[Known, ...], touched_s: float) -> None:
        self._memory = memory
        self.choices = choices
        self.touched_s = touched_s
        self.kept = True

    def note(self, index: int, output: SequenceOutput) -> None:
        """Adds what came for choice `index`."""
        if self.kept:
            known = self.choices[index]
            if not known.token_ids:
                known.num_cached_tokens = output.num_cached_tokens
            known.token_ids.extend(output.token_ids)
            known.finish_reason = output.finish_reason
            self._memory.touch(self)
            self._memory.add(len(output.token_ids))
