"""From vocabulary pieces to text, piece by piece, without ever showing half a character.

Knows nothing of files or tokenizer libraries: a tokenizer says what bytes each id stands for (`Piece`) and
how its library treats broken UTF-8 (`DecodeRule`). `decode` of a tokenizer and the incremental detokenizer
are both this one machine, so a streamed text and a text decoded at once cannot differ.
"""

from dataclasses import dataclass
from typing import NamedTuple

REPLACEMENT = "\ufffd"


class Piece(NamedTuple):
    """What one id stands for.

    `is_bytes`: `data` may begin or end inside a character, so it joins the bytes around it; otherwise
    `data` is whole characters. `strips`: one leading space is dropped when the piece opens the text
    (sentencepiece's dummy prefix).
    """

    data: bytes
    is_bytes: bool = False
    is_special: bool = False
    strips: bool = False


@dataclass(frozen=True, slots=True)
class DecodeRule:
    """How a library treats what is not plain text.

    `per_byte`: broken UTF-8 becomes one U+FFFD per byte (sentencepiece) and not one per broken sequence
    (Unicode's practice, which byte-level BPE follows). `specials_break`: a skipped special token ends a run
    of bytes.
    """

    per_byte: bool
    specials_break: bool


class PieceDecoder:
    """The state between pieces: at most 3 bytes of an unfinished character, and whether text has begun."""

    __slots__ = ("_at_start", "_pending", "_rule")

    def __init__(self, rule: DecodeRule, *, at_start: bool = True) -> None:
        self._rule = rule
        self._at_start = at_start
        self._pending = b""

    def push(self, piece: Piece) -> str:
        """The text that `piece` completes; its unfinished last character is held back."""
        before = "" if piece.is_bytes else self._resolve(final=True)
        if piece.is_bytes:
            self._pending += piece.data
            text = self._resolve(final=False)
        else:
            text = piece.data.decode()
        if self._at_start and text:
            self._at_start = False
            text = text.removeprefix(" ") if piece.strips else text
        return before + text

    def skip_special(self) -> str:
        """Account for a special token that is not shown."""
        return self._resolve(final=True) if self._rule.specials_break else ""

    def flush(self) -> str:
        """End the text: what was held back becomes U+FFFD."""
        return self._resolve(final=True)

    def _resolve(self, *, final: bool) -> str:
        if not self._pending:
            return ""
        text, self._pending = decode_utf8(self._pending, final=final, per_byte=self._rule.per_byte)
        self._at_start = self._at_start and not (final and text)
        return text


def decode_utf8(data: bytes, *, final: bool, per_byte: bool) -> tuple[str, bytes]:
    """`data` as (text, held back), broken sequences as U+FFFD.

    Held back is an unfinished character at the end, at most 3 bytes; none when `final`.

    >>> decode_utf8(b"a\\xe4\\xb8", final=False, per_byte=True)
    ('a', b'\\xe4\\xb8')
    """
    texts: list[str] = []
    while data:
        try:
            texts.append(data.decode())
            break
        except UnicodeDecodeError as error:
            texts.append(data[: error.start].decode())
            if not final and error.reason == "unexpected end of data":
                return "".join(texts), data[error.start :]
            texts.append(REPLACEMENT)
            data = data[error.start + 1 if per_byte else error.end :]
    return "".join(texts), b""
