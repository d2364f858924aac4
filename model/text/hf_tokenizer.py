"""Tokenizers in tokenizer.json: byte-level BPE, and sentencepiece-like BPE with byte fallback."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from model.text.piece_table import NO_PIECE, PieceTable
from model.text.pieces import DecodeRule, Piece
from model.text.tokenizer_files import SpecialTokens, TokenizerError

_SPACE = "▁"


class HFTokenizer(PieceTable):
    """tokenizer.json with the special tokens that the files beside it name.

    As in transformers, a special string in a user's text becomes its id here (`encode`), and the file's
    post-processor says what `add_bos` adds. Truncation and padding saved in the file are switched off: a
    prompt is never cut in silence. Raises TokenizerError for a file that cannot be used.
    """

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:
            raise TokenizerError(f"{path.name}: cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        _try_out(self._tokenizer, path.name)
        _add_missing(self._tokenizer, special)
        self._added = {i: (t.content, t.special) for i, t in self._tokenizer.get_added_tokens_decoder().items()}
        self._byte_level = _is_byte_level(self._tokenizer)
        self._strips = not self._byte_level and _strips_space(self._tokenizer)
        self._letters = _letter_bytes()
        rule = DecodeRule(per_byte=not self._byte_level, specials_break=False)
        super().__init__(rule, max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1)
        self._named = dict(special.named)
        own = self._tokenizer.token_to_id(self._named.get("eos_token", ""))
        self._eos_ids = tuple(dict.fromkeys([*([] if own is None else [own]), *special.eos_ids]))
        self._newline_ids = self._tokenizer.encode("\n", add_special_tokens=False).ids

    @property
    def bos_id(self) -> int | None:
        return self._tokenizer.token_to_id(self._named.get("bos_token", ""))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        return self._named

    @property
    def added_tokens(self) -> Mapping[str, bool]:
        return dict(self._added.values())

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_bos).ids

    def encode_template(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """One segment is encoded as transformers does; further ones as its `sanitize_control_tokens` does."""
        ids: list[int] = []
        for index, (text, is_plain) in enumerate(segments):
            encode = self._encode_plain if is_plain else self._encode_marked
            if index == 0 or not text:
                ids += encode(text)
                continue
            inner = encode("\n" + text)  # with text before it, no dummy space is put in front
            has_newline = inner[: len(self._newline_ids)] == self._newline_ids
            ids += inner[len(self._newline_ids) :] if has_newline else encode(text)
        return ids

    def _encode_marked(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_plain(self, text: str) -> list[int]:
        """The pipeline without its added tokens."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        words = [text]
        if self._tokenizer.pre_tokenizer is not None:
            words = [word for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in self._tokenizer.model.tokenize(word)]

    def _entry(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def _look_up(self, token_id: int) -> Piece:
        text = self._tokenizer.id_to_token(token_id)
        if text is None:
            return NO_PIECE
        is_special = self._added.get(token_id, ("", False))[1]
        if self._byte_level:
            known = all(letter in self._letters for letter in text)
            data = bytes(self._letters[letter] for letter in text) if known else text.encode()
            return Piece(data, is_bytes=True, is_special=is_special)
        if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            return Piece(bytes([int(text[3:5], 16)]), True, is_special, self._strips)
        return Piece(text.replace(_SPACE, " ").encode(), False, is_special, self._strips)


def _try_out(tokenizer: Tokenizer, name: str) -> None:
    """Encodes once, since a post-processor whose tokens do not exist is read without a word.

    What it does then is a Rust panic, whose class has no name to import and is no Exception.
    """
    try:
        tokenizer.encode("a", add_special_tokens=True)
    except BaseException as error:
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"{name}: cannot encode: {error}") from None
        raise


def _add_missing(tokenizer: Tokenizer, special: SpecialTokens) -> None:
    """Bring tokens that the JSON files name into the vocabulary, as transformers does; check their ids."""
    known = tokenizer.get_added_tokens_decoder()
    for token_id, entry in special.added.items():
        if token_id in known and known[token_id].content == entry.content:
            continue
        token = AddedToken(entry.content, special=entry.special, normalized=not entry.special)
        (tokenizer.add_special_tokens if entry.special else tokenizer.add_tokens)([token])
        if (got := tokenizer.token_to_id(entry.content)) != token_id:
            raise TokenizerError(f"added token {entry.content!r}: its id is {got} and not {token_id}")
    marked = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    for text in (*special.named.values(), *special.extra):
        if text not in marked and tokenizer.token_to_id(text) is not None:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])


def _decoder_steps(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    if tokenizer.decoder is None:
        raise TokenizerError("tokenizer.json: decoder is missing")
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _is_byte_level(tokenizer: Tokenizer) -> bool:
    """Which of the two kinds the decoder is; any other is refused, since its text would come out wrong."""
    types = [step["type"] for step in _decoder_steps(tokenizer)]
    if "ByteLevel" in types and set(types) <= {"ByteLevel", "Fuse"}:
        return True
    if types and set(types) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return False
    raise TokenizerError(f"tokenizer.json: decoder of type {' + '.join(types)} is not supported")


def _strips_space(tokenizer: Tokenizer) -> bool:
    """Whether the decoder drops the space that opens a text; checks that it does nothing else of the sort."""
    strips = False
    for step in _decoder_steps(tokenizer):
        kind = step["type"]
        if kind == "Replace" and (step["pattern"] != {"String": _SPACE} or step["content"] != " "):
            raise TokenizerError(f"tokenizer.json: decoder Replace of {step['pattern']} is not supported")
        if kind == "Strip":
            if (step["content"], step["start"], step["stop"]) not in ((" ", 1, 0), (" ", 0, 0)):
                raise TokenizerError(f"tokenizer.json: decoder Strip of {step} is not supported")
            strips = strips or step["start"] == 1
        if kind == "Metaspace":
            if step["replacement"] != _SPACE:
                raise TokenizerError(f"tokenizer.json: decoder Metaspace with {step['replacement']!r}")
            strips = strips or step.get("prepend_scheme", "always") != "never"
    return strips


def _letter_bytes() -> dict[str, int]:
    """Byte-level BPE writes each byte as a printable letter; this is the way back (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
