"""A tokenizer's tokens as grammars see them: the bytes of each, which are special, and which end a text.

It travels as plain parts to the process that tries grammars out. What a text is to the tokenizer is `model.text`'s
knowledge; only the bytes of single tokens are asked there.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

from llguidance import LLTokenizer

from model.grammar.spec import GrammarError


class _Pieces:
    """What the library asks of a tokenizer. Texts are never tokenised: grammars here force none."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: "Vocabulary") -> None:
        self.tokens = vocabulary.tokens
        self.eos_token_id = vocabulary.eos_ids[0]
        self.special_token_ids = sorted(vocabulary.special_ids)

    def __call__(self, text: str) -> list[int]:
        return []


@dataclass(frozen=True)
class Vocabulary:
    """`tokens` are the bytes by id, empty where an id has none. A grammar's text is made of all but `special_ids`,
    and may end with any of `eos_ids`. Raises GrammarError without an end.
    """

    tokens: Sequence[bytes]
    special_ids: frozenset[int]
    eos_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.eos_ids:
            raise GrammarError("the model has no end-of-sequence token, which an answer that follows a grammar needs")

    @classmethod
    def of(
        cls,
        vocab_size: int,
        token_bytes: Callable[[int], bytes],
        is_special: Callable[[int], bool],
        eos_ids: Iterable[int],
    ) -> "Vocabulary":
        """The vocabulary of a model with `vocab_size` rows of logits; ids without a piece have no bytes."""
        ends = tuple(sorted(token for token in set(eos_ids) if token < vocab_size))
        special = frozenset(token for token in range(vocab_size) if is_special(token)) | set(ends)
        return cls([token_bytes(token) for token in range(vocab_size)], special, ends)

    @property
    def size(self) -> int:
        """Ids, those without bytes included."""
        return len(self.tokens)

    @cached_property
    def ll_tokenizer(self) -> LLTokenizer:
        """As llguidance has it: a trie of all tokens, made once (half a second for 50,000)."""
        return LLTokenizer(_Pieces(self), eos_token=list(self.eos_ids))  # type: ignore[arg-type]

    def parts(self) -> tuple[dict[str, Any], bytes]:
        """Plain values and one blob, for another process."""
        ends = list(accumulate(map(len, self.tokens), initial=0))
        return {"ends": ends, "special_ids": sorted(self.special_ids), "eos_ids": self.eos_ids}, b"".join(self.tokens)

    @classmethod
    def from_parts(cls, facts: dict[str, Any], blob: bytes) -> "Vocabulary":
        """What `parts` gave."""
        tokens = [blob[start:end] for start, end in pairwise(facts["ends"])]
        return cls(tokens, frozenset(facts["special_ids"]), tuple(facts["eos_ids"]))
