"""The half of a tokenizer that both kinds share: from ids to pieces, bytes and text."""

from abc import ABC, abstractmethod
from collections.abc import Iterable

from model.text.pieces import DecodeRule, Piece, PieceDecoder

NO_PIECE = Piece(b"")


class PieceTable(ABC):
    """Pieces by id, remembered once looked up (so at most one entry per id of the vocabulary)."""

    def __init__(self, decode_rule: DecodeRule, vocab_size: int) -> None:
        self._decode_rule = decode_rule
        self._vocab_size = vocab_size
        self._pieces: dict[int, Piece] = {}

    @abstractmethod
    def _look_up(self, token_id: int) -> Piece:
        """The piece of an id in 0..vocab_size-1."""

    @abstractmethod
    def _entry(self, token_id: int) -> str:
        """The vocabulary's own writing of an id in 0..vocab_size-1."""

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def decode_rule(self) -> DecodeRule:
        return self._decode_rule

    def piece(self, token_id: int) -> Piece:
        """What `token_id` stands for; an id past the vocabulary (a padded lm_head) stands for nothing."""
        piece = self._pieces.get(token_id)
        if piece is None:
            if token_id < 0:
                raise ValueError(f"token id must be 0 or more, got {token_id}")
            if token_id >= self._vocab_size:
                return NO_PIECE
            piece = self._pieces[token_id] = self._look_up(token_id)
        return piece

    def token_bytes(self, token_id: int) -> bytes:
        return self.piece(token_id).data

    def token_text(self, token_id: int) -> str:
        """The token as text; bytes that are no character by themselves show as U+FFFD."""
        return self.piece(token_id).data.decode(errors="replace")

    def vocabulary_entry(self, token_id: int) -> str:
        """The id as the vocabulary writes it; an id past it has no writing."""
        return self._entry(token_id) if 0 <= token_id < self._vocab_size else ""

    def is_special(self, token_id: int) -> bool:
        return self.piece(token_id).is_special

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        decoder = PieceDecoder(self._decode_rule)
        texts: list[str] = []
        for token_id in ids:
            piece = self.piece(token_id)
            texts.append(decoder.skip_special() if skip_special and piece.is_special else decoder.push(piece))
        texts.append(decoder.flush())
        return "".join(texts)
