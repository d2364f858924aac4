"""Mixtral's own kind of tokenizer: a sentencepiece model, with tokens that a checkpoint may add beside it."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import sentencepiece

from model.text.piece_table import NO_PIECE, PieceTable
from model.text.pieces import DecodeRule, Piece
from model.text.tokenizer_files import SpecialTokens, TokenizerError

_SPACE = "▁"
_RULE = DecodeRule(per_byte=True, specials_break=True)


class SentencePieceTokenizer(PieceTable):
    """tokenizer.model. A user's text never becomes a control token: `</s>` in it is four characters.

    Raises TokenizerError when the file is no sentencepiece model or added tokens contradict it.
    """

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{path.name}: not a sentencepiece model: {error}") from error
        self._added = {
            token_id: entry
            for token_id, entry in special.added.items()
            if token_id >= self._model.vocab_size() or self._model.id_to_piece(token_id) != entry.content
        }
        for token_id, entry in self._added.items():
            if token_id < self._model.vocab_size():
                known = self._model.id_to_piece(token_id)
                raise TokenizerError(f"added token {entry.content!r}: its id {token_id} is {known!r}")
        super().__init__(_RULE, max([self._model.vocab_size(), *(i + 1 for i in self._added)]))
        self._specials = self._special_ids()
        self._named = self._named_tokens(special)
        own = [self._specials[text] for text in (self._named.get("eos_token"),) if text in self._specials]
        self._eos_ids = tuple(dict.fromkeys([*own, *special.eos_ids]))
        self._legacy = special.legacy
        longest_first = sorted(self._specials, key=len, reverse=True)
        self._special_re = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._newline_ids: list[int] = self._model.encode("\n")

    @property
    def bos_id(self) -> int | None:
        return self._specials.get(self._named.get("bos_token", ""))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self._eos_ids

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        return self._named

    @property
    def added_tokens(self) -> Mapping[str, bool]:
        by_text = {entry.content: entry.special for entry in self._added.values()}
        return {text: by_text.get(text, True) for text in self._specials}

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Sentencepiece's ids of `text`, bos in front when asked and when there is one."""
        ids: list[int] = self._model.encode(text)
        return [self.bos_id, *ids] if add_bos and self.bos_id is not None else ids

    def encode_template(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Each stretch between special strings is encoded by itself, with the dummy space in front.

        This is how mistral-common encodes messages. Where tokenizer_config.json says `"legacy": false`,
        only a stretch that opens the chat gets the space. A plain segment joins the text before it, without
        the space.
        """
        ids: list[int] = []
        inside = False
        for text, is_plain in segments:
            position = 0
            for match in [] if is_plain else list(self._special_re.finditer(text)):
                ids += self._encode_stretch(text[position : match.start()], inside)
                ids.append(self._specials[match.group()])
                position, inside = match.end(), not self._legacy
            ids += self._encode_stretch(text[position:], inside)
            inside = inside or position < len(text)
        return ids

    def _encode_stretch(self, text: str, inside: bool) -> list[int]:
        """`inside`: other text stands before it, so no dummy space; a newline in front takes it away."""
        ids: list[int] = self._model.encode("\n" + text if inside and text else text)
        return ids[len(self._newline_ids) :] if inside and text else ids

    def _entry(self, token_id: int) -> str:
        if (added := self._added.get(token_id)) is not None:
            return added.content
        return self._model.id_to_piece(token_id) if token_id < self._model.vocab_size() else ""

    def _look_up(self, token_id: int) -> Piece:
        if (entry := self._added.get(token_id)) is not None:
            return Piece(entry.content.encode(), is_special=entry.special)
        if token_id >= self._model.vocab_size():
            return NO_PIECE
        text: str = self._model.id_to_piece(token_id)
        if self._model.is_byte(token_id):
            return Piece(bytes([int(text[3:5], 16)]), is_bytes=True)
        if self._model.is_control(token_id):
            return Piece(text.encode(), is_special=True)
        if self._model.is_unknown(token_id):
            return Piece(self._model.decode([token_id]).encode())
        return Piece(text.replace(_SPACE, " ").encode(), strips=text.startswith(_SPACE))

    def _special_ids(self) -> dict[str, int]:
        model = self._model
        control = {model.id_to_piece(i): i for i in range(model.vocab_size()) if model.is_control(i)}
        added = {entry.content: token_id for token_id, entry in self._added.items()}
        return {text: token_id for text, token_id in (control | added).items() if text}

    def _named_tokens(self, special: SpecialTokens) -> dict[str, str]:
        """The model file's own bos, eos and unk, unless the checkpoint's JSON names others."""
        own = {"bos_token": self._model.bos_id(), "eos_token": self._model.eos_id()}
        own["unk_token"] = self._model.unk_id()
        return {name: self._model.id_to_piece(i) for name, i in own.items() if i >= 0} | dict(special.named)
