"""One choice's tokens as text: detokenisation, stop strings, and log-probabilities that keep step with the text.

Synchronous and free of I/O. Where the tokens come from is `actors.front.generation`'s work, how the text is framed
for a client `actors.front.completions`' and `actors.front.chat_completions`'.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import repeat
from typing import Literal, Protocol

from actors.front.stop_strings import Match, StopStrings
from actors.front.tools.parsers import CallParser, CallPiece
from protos.coordinator_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    PositionLogprobs,
    SequenceOutput,
)

FinishReason = Literal["stop", "length", "tool_calls"]


class Detokenizer(Protocol):
    """What is asked of `model.text.detokenizer.IncrementalDetokenizer`."""

    def push(self, ids: Sequence[int]) -> str:
        """The text that more tokens make certain."""
        ...

    def flush(self) -> str:
        """The text of what was left incomplete."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRules:
    """What a request says about its text. `include_stop`: the stop string or token is part of the text."""

    stops: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0


@dataclass(frozen=True, slots=True)
class TokenEntry:
    """A token that stands in the text from character `start` to `end` (equal while a character is incomplete)."""

    token_id: int
    logprobs: PositionLogprobs | None
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What a choice gained: new text, the entries of tokens wholly within the text so far, and how it ended.

    `token_ids` are all tokens that came, the stop token included; `num_tokens` counts them since the
    beginning, and `num_cached_tokens` those of the prompt that were not computed. `stop_reason` is the stop string or
    stop token that ended the choice, None for end of sequence or length. `calls` are pieces of tool calls, which are no
    part of `text`.
    """

    index: int
    text: str = ""
    calls: tuple[CallPiece, ...] = ()
    token_ids: tuple[int, ...] = ()
    entries: tuple[TokenEntry, ...] = ()
    num_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    routed_experts: tuple[bytes, ...] = ()


@dataclass(slots=True)
class Answer:
    """A choice's answer, or a piece of it, grown from deltas. `calls` is a piece each, or what a piece adds to each."""

    text: str = ""
    calls: dict[int, CallPiece] = field(default_factory=dict)
    entries: list[TokenEntry] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[PositionLogprobs] = field(default_factory=list)
    routed_experts: list[bytes] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @classmethod
    def of(cls, delta: Delta) -> "Answer":
        """One delta as a piece."""
        answer = cls()
        answer.add(delta)
        return answer

    def add(self, delta: Delta) -> None:
        """Takes the next delta of the same choice."""
        self.text += delta.text
        for piece in delta.calls:
            known = self.calls.get(piece.index, CallPiece(piece.index, None, ""))
            name = known.name if piece.name is None else piece.name
            self.calls[piece.index] = CallPiece(piece.index, name, known.arguments + piece.arguments)
        self.entries += delta.entries
        self.token_ids += delta.token_ids
        self.prompt_logprobs += delta.prompt_logprobs
        self.routed_experts += delta.routed_experts
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason


class ChoiceText:
    """Turns a choice's outputs into deltas. After a delta with a finish reason nothing may be fed.

    With `calls` the text is read for tool calls.
    """

    def __init__(
        self,
        index: int,
        detokenizer: Detokenizer,
        rules: TextRules,
        eos_ids: frozenset[int],
        calls: CallParser | None = None,
    ) -> None:
        self._index = index
        self._detokenizer = detokenizer
        self._rules = rules
        self._eos_ids = eos_ids
        self._calls = calls
        self._stops = StopStrings(rules.stops)
        self._unwatched = 0  # characters before min_tokens, where no stop string counts
        self._decoded = 0
        self._num_tokens = 0
        self._waiting: deque[TokenEntry] = deque()

    def feed(self, output: SequenceOutput) -> Delta:
        """The delta of one output that is neither an error nor a cancellation."""
        taken: list[int] = []
        pieces: list[str] = []
        match: Match | None = None
        stop_token = self._stop_token(output)
        last = len(output.token_ids) - 1
        for place, (token, logprobs) in enumerate(zip(output.token_ids, output.logprobs or repeat(None), strict=False)):
            taken.append(token)
            self._num_tokens += 1
            if place == last and stop_token is not None and not self._rules.include_stop:
                break
            piece, match = self._add(token, logprobs)
            pieces.append(piece)
            if match is not None:
                break
        if match is None and output.finish_reason in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
            piece, match = self._watch(self._detokenizer.flush())
            pieces.append(piece)
            if match is None:
                pieces.append(self._stops.flush())
        finish, stop_reason = self._end(output, match, stop_token)
        if match is not None and self._rules.include_stop:
            pieces.append(match.stop)
        text, calls = self._read("".join(pieces), ended=finish is not None)
        if finish == "stop" and self._calls is not None and self._calls.num_calls:
            finish = "tool_calls"
        return Delta(
            index=self._index,
            text=text,
            calls=calls,
            token_ids=tuple(taken),
            entries=tuple(self._release(finish, match)),
            num_tokens=self._num_tokens,
            num_cached_tokens=output.num_cached_tokens,
            finish_reason=finish,
            stop_reason=stop_reason,
            prompt_logprobs=tuple(output.prompt_logprobs),
            routed_experts=tuple(output.routed_experts),
        )

    def _read(self, text: str, *, ended: bool) -> tuple[str, tuple[CallPiece, ...]]:
        """Content, and pieces of calls."""
        if self._calls is None:
            return text, ()
        written = self._calls.push(text)
        if not ended:
            return written.content, written.calls
        rest = self._calls.finish()
        return written.content + rest.content, written.calls + rest.calls

    def _stop_token(self, output: SequenceOutput) -> int | None:
        ended = output.finish_reason == FINISH_REASON_STOP and output.token_ids
        return output.token_ids[-1] if ended else None

    def _add(self, token: int, logprobs: PositionLogprobs | None) -> tuple[str, Match | None]:
        piece = self._detokenizer.push([token])
        start, self._decoded = self._decoded, self._decoded + len(piece)
        self._waiting.append(TokenEntry(token, logprobs, start, self._decoded))
        if self._num_tokens <= self._rules.min_tokens:
            self._unwatched += len(piece)
            return piece, None
        return self._watch(piece)

    def _watch(self, piece: str) -> tuple[str, Match | None]:
        return self._stops.push(piece) if self._rules.stops else (self._pass(piece), None)

    def _pass(self, piece: str) -> str:
        self._unwatched += len(piece)
        return piece

    def _end(
        self, output: SequenceOutput, match: Match | None, stop_token: int | None
    ) -> tuple[FinishReason | None, str | int | None]:
        if match is not None:
            return "stop", match.stop
        if output.finish_reason == FINISH_REASON_STOP:
            return "stop", None if stop_token in self._eos_ids else stop_token
        return ("length", None) if output.finish_reason == FINISH_REASON_LENGTH else (None, None)

    def _release(self, finish: FinishReason | None, match: Match | None) -> list[TokenEntry]:
        """Entries whose text is out. At a stop string: those that begin before the cut; the others never come."""
        shown = self._unwatched + self._stops.num_released
        if match is not None:
            cut = self._unwatched + (match.end if self._rules.include_stop else match.start)
            return [entry for entry in self._waiting if entry.start < cut]
        if finish is not None:
            return list(self._waiting)
        released = []
        while self._waiting and self._waiting[0].end <= shown and self._waiting[0].start < shown:
            released.append(self._waiting.popleft())
        return released
