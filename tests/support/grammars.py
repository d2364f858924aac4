"""Grammars over the tests' byte tokenizer, followed at random."""

import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from model.grammar.compiled import Compiled, library_text
from model.grammar.spec import GrammarSpec
from model.grammar.vocabulary import Vocabulary
from model.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.tokenizers import write_byte_tokenizer

VOCAB = 310
"""A few ids more than the tokenizer has, as models do whose logits are padded."""


@cache
def byte_tokenizer() -> Tokenizer:
    with TemporaryDirectory() as folder:
        write_byte_tokenizer(Path(folder), 300)
        return load_tokenizer(folder)


@cache
def byte_vocabulary() -> Vocabulary:
    tokenizer = byte_tokenizer()
    return Vocabulary.of(VOCAB, tokenizer.token_bytes, tokenizer.is_special, tokenizer.eos_ids)


def compiled(spec: GrammarSpec) -> Compiled:
    return Compiled(byte_vocabulary(), library_text(spec))


def ramble(grammar: Compiled, seed: int, most: int = 2000, end_at_once: float = 0.5) -> tuple[list[int], bool]:
    """Tokens drawn evenly from those allowed, without the end, and whether an end came before there were too many."""
    draw, matcher, tokens = random.Random(seed), grammar.matcher(), list[int]()
    while len(tokens) < most:
        following = matcher.next()
        if following.may_end and (not following.ids.size or draw.random() < end_at_once):
            return tokens, True
        token = int(draw.choice(following.ids))
        matcher.observe(token)
        tokens.append(token)
    return tokens, False


def text_of(tokens: list[int]) -> str:
    return b"".join(map(byte_tokenizer().token_bytes, tokens)).decode()
