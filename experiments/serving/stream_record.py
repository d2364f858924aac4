"""What one streamed answer says and when: OpenAI's chunks in, a RequestResult out. No sockets, no clock."""

import itertools
import json
from typing import Any

from experiments.serving.results import RequestFailed, RequestResult

DONE = b"[DONE]"


class StreamRecord:
    """Collects the chunks of one answer; times are seconds after the request was sent.

    Every chunk of a completion that has choices carries tokens (its text may be empty, for half a character). A chat
    answer also has chunks of form only, the role and the end: those are no tokens unless nothing else came.
    """

    def __init__(self, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._chunk_times_s: list[float] = []
        self._texts: list[str] = []
        self._usage: tuple[int, int] | None = None
        self._done = False

    def add(self, event: bytes, at_s: float) -> None:
        """One event's data. Raises RequestFailed when it is not a chunk, or is the server's word that it failed."""
        if event.strip() == DONE:
            self._done = True
            return
        chunk = _json_object(event)
        if chunk.get("error"):
            raise RequestFailed("server_error", _error_text(chunk["error"]))
        if isinstance(chunk.get("usage"), dict):
            self._usage = _usage(chunk["usage"])
        choices = chunk.get("choices")
        if choices:
            self._add_choice(choices, at_s)

    def result(self, start_s: float) -> RequestResult:
        """The finished answer. Raises RequestFailed when its end, its tokens or its usage never came."""
        if not self._done:
            raise RequestFailed("bad_stream", "the stream ended before [DONE]")
        if not self._chunk_times_s:
            raise RequestFailed("no_tokens", "the stream had no tokens")
        if self._usage is None:
            raise RequestFailed("no_usage", "the stream had no usage, though stream_options asked for it")
        times = self._chunk_times_s
        return RequestResult(
            start_s=start_s,
            ttft_s=times[0],
            latency_s=times[-1],
            itl_s=tuple(later - earlier for earlier, later in itertools.pairwise(times)),
            input_tokens=self._usage[0],
            output_tokens=self._usage[1],
            text="".join(self._texts),
        )

    def _add_choice(self, choices: Any, at_s: float) -> None:
        if not isinstance(choices, list) or not isinstance(choices[0], dict):
            raise RequestFailed("bad_stream", "a chunk's choices are not a list of objects")
        choice = choices[0]
        holder = choice.get("delta") if self._is_chat else choice
        text = holder.get("content" if self._is_chat else "text") if isinstance(holder, dict) else None
        ends_empty = bool(choice.get("finish_reason")) and not self._chunk_times_s
        if not self._is_chat or text or ends_empty:
            self._chunk_times_s.append(at_s)
        if isinstance(text, str):
            self._texts.append(text)


def _json_object(event: bytes) -> dict[str, Any]:
    try:
        value = json.loads(event)
    except (ValueError, RecursionError):
        raise RequestFailed("bad_stream", f"an event is not JSON: {event[:80]!r}") from None
    if not isinstance(value, dict):
        raise RequestFailed("bad_stream", f"an event is not an object: {event[:80]!r}")
    return value


def _error_text(error: Any) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _usage(usage: dict[str, Any]) -> tuple[int, int]:
    counts = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if not all(type(count) is int and count >= 0 for count in counts):
        raise RequestFailed("bad_stream", f"the usage counts are {counts}")
    return int(counts[0] or 0), int(counts[1] or 0)
