"""Finds tool calls in what a model writes, piece by piece: one parser for each way in which chat formats write them.

Pure: text in, content and pieces of calls out. The result does not depend on where the pieces were cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from actors.front.tools.call_scanner import CallScanner

_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class CallPiece:
    """A piece of call `index`: its `name`, with the first one, and more text of its arguments."""

    index: int
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class Written:
    """What text turned out to be."""

    content: str = ""
    calls: tuple[CallPiece, ...] = ()


class CallParser(Protocol):
    """Of one answer."""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        ...

    def push(self, text: str) -> Written:
        """What is certain now."""
        ...

    def finish(self) -> Written:
        """What was held back: nothing more comes."""
        ...


class MarkedCalls:
    """Calls as JSON objects behind `opening`: one each up to `closing`, or, without one, an array of them.

    Hermes and Qwen write `<tool_call>{...}</tool_call>`, Mistral `[TOOL_CALLS][{...}, {...}]`. White space around
    calls is not content. What stands behind the opening but is no call is content as it stands.
    """

    def __init__(self, opening: str, closing: str | None) -> None:
        self._opening = opening
        self._closing = closing
        self._held = ""
        self._scanner: CallScanner | None = None
        self._state: Callable[[str], str | None] = self._outside
        self._spaces = ""
        self._content: list[str] = []
        self._after_call = False
        self._pieces: list[CallPiece] = []
        self._named = False
        self.num_calls = 0

    def push(self, text: str) -> Written:
        """As of `CallParser`."""
        rest: str | None = self._held + text
        self._held = ""
        while rest:
            rest = self._state(rest)
        return self._take()

    def finish(self) -> Written:
        """As of `CallParser`."""
        held, self._held = self._held, ""
        if self._state == self._outside:
            self._say(held)
        elif self._scanner is not None and not self._named:
            self._say(self._give_up(held))
        if not self.num_calls:
            self._content.append(self._spaces)
        return self._take()

    def _take(self) -> Written:
        written = Written("".join(self._content), tuple(self._pieces))
        self._content.clear()
        self._pieces.clear()
        return written

    def _outside(self, text: str) -> str | None:
        """Content, up to an opening or what may become one."""
        place = text.find(self._opening)
        if place >= 0:
            self._say(text[:place])
            self._open()
            return text[place + len(self._opening) :]
        kept = _beginning(text, self._opening)
        self._say(text[: len(text) - kept])
        self._held = text[len(text) - kept :]
        return None

    def _open(self) -> None:
        self._state = self._in_call if self._closing is not None else self._before_array
        self._begin_call()

    def _begin_call(self) -> None:
        self._scanner, self._named = CallScanner(), False

    def _before_array(self, text: str) -> str | None:
        text = text.lstrip(_SPACE)
        if not text:
            return None
        if text[0] != "[":
            return self._give_up(text)
        self._state = self._in_call
        return text[1:]

    def _in_call(self, text: str) -> str | None:
        scanner = self._scanner
        assert scanner is not None, "a call is read by nobody"
        rest = scanner.push(text)
        if not self._named and scanner.broken:
            return self._give_up(rest)
        if scanner.name is not None:
            self._tell(scanner)
        if scanner.done:
            self._state = self._behind_call if self._closing is not None else self._between_calls
            return rest
        if scanner.broken:  # it was told already: there is no way back, and no end to it
            self._state = self._behind_call if self._closing is not None else self._dropping
            return rest
        return None

    def _tell(self, scanner: CallScanner) -> None:
        arguments = scanner.take_arguments()
        if not self._named:
            self._pieces.append(CallPiece(self.num_calls, scanner.name, arguments))
            self._named = True
            self.num_calls += 1
        elif arguments:
            self._pieces.append(CallPiece(self.num_calls - 1, None, arguments))

    def _behind_call(self, text: str) -> str | None:
        """Up to the closing; what stands before it is nothing."""
        assert self._closing is not None, "there is no closing"
        place = text.find(self._closing)
        if place < 0:
            self._held = text[len(text) - _beginning(text, self._closing) :]
            return None
        self._close()
        return text[place + len(self._closing) :]

    def _between_calls(self, text: str) -> str | None:
        text = text.lstrip(_SPACE)
        if not text:
            return None
        if text[0] == ",":
            self._begin_call()
            self._state = self._in_call
        elif text[0] == "]":
            self._close()
        else:
            self._state = self._dropping
        return text[1:]

    def _dropping(self, text: str) -> str | None:
        return None

    def _close(self) -> None:
        self._scanner = None
        self._spaces, self._after_call = "", True
        self._state = self._outside

    def _give_up(self, rest: str) -> str:
        """It is no call: it is content, the opening included."""
        raw = "" if self._scanner is None else "".join(self._scanner.raw)
        array = "[" if self._closing is None and self._state == self._in_call else ""
        self._scanner, self._state = None, self._outside
        self._say(self._opening + array + raw)
        return rest

    def _say(self, text: str) -> None:
        """White space waits for what comes: around calls it is nothing."""
        text = self._spaces + text
        if self._after_call:
            text = text.lstrip(_SPACE)
            self._after_call = not text
        shown = text.rstrip(_SPACE)
        if shown:
            self._content.append(shown)
        self._spaces = text[len(shown) :]


def _beginning(text: str, marker: str) -> int:
    """Characters at the end of `text` that `marker` begins with."""
    sizes = range(min(len(text), len(marker) - 1), 0, -1)
    return next((size for size in sizes if text.endswith(marker[:size])), 0)
