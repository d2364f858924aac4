"""What the rest of the house knows of a tokenizer, and how one is found in a checkpoint's directory.

The two kinds live in `model.text.hf_tokenizer` (tokenizer.json) and `model.text.sentencepiece_tokenizer`
(tokenizer.model). Streaming text is `model.text.detokenizer`'s work, prompts of conversations
`model.text.chat_template`'s.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from model.text.hf_tokenizer import HFTokenizer
from model.text.pieces import DecodeRule, Piece
from model.text.sentencepiece_tokenizer import SentencePieceTokenizer
from model.text.tokenizer_files import TokenizerError, read_special_tokens

__all__ = ["HFTokenizer", "SentencePieceTokenizer", "Tokenizer", "TokenizerError", "load_tokenizer"]


class Tokenizer(Protocol):
    """Text to ids and back. Safe to share between threads once loaded."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id with a piece."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a generation: the tokenizer's own, then generation_config.json's."""

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """bos_token and the like by name, for chat templates."""

    @property
    def added_tokens(self) -> Mapping[str, bool]:
        """Strings with an id of their own beside the trained vocabulary; True for special ones."""

    @property
    def decode_rule(self) -> DecodeRule: ...

    def encode(self, text: str, *, add_bos: bool) -> list[int]:
        """Ids of a user's text. `add_bos` adds what the checkpoint puts around a prompt of its own."""

    def encode_template(self, segments: Sequence[tuple[str, bool]]) -> list[int]:
        """Ids of a rendered chat given as (text, is_plain) in order; nothing is added around it.

        Special strings become their ids, except in plain segments, which come from users.
        """

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """`ids` as a text of its own; broken characters become U+FFFD, ids without a piece nothing."""

    def piece(self, token_id: int) -> Piece: ...

    def token_bytes(self, token_id: int) -> bytes: ...

    def token_text(self, token_id: int) -> str: ...

    def vocabulary_entry(self, token_id: int) -> str:
        """The id as the vocabulary writes it (`▁the`, `Ġthe`, `<0x0A>`); empty past the vocabulary."""

    def is_special(self, token_id: int) -> bool: ...


def load_tokenizer(model_dir: Path | str) -> Tokenizer:
    """The tokenizer of the checkpoint in `model_dir`: tokenizer.json, else tokenizer.model, which may end in Mistral's
    version, `.v1`.

    Raises TokenizerError when there is neither, or what is there cannot be used.
    """
    model_dir = Path(model_dir)
    special = read_special_tokens(model_dir)
    if (path := model_dir / "tokenizer.json").is_file():
        return HFTokenizer(path, special)
    for path in (model_dir / "tokenizer.model", *sorted(model_dir.glob("tokenizer.model.v[0-9]*"), reverse=True)):
        if path.is_file():
            return SentencePieceTokenizer(path, special)
    raise TokenizerError(f"{model_dir} holds neither tokenizer.json nor tokenizer.model")
