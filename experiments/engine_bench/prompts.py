"""Prompts of exactly so many tokens, out of real text that is always at hand: random tokens overstate routing skew.

The text is the prose and code of Python's standard library; which part of it, only the seed says.
"""

import random
import re
import zlib
from collections.abc import Callable, Sequence
from functools import cache

from experiments.engine_bench.failures import BenchError
from model.upcycling.calibration_text import CHARS_PER_TOKEN, standard_library_code, standard_library_prose

Encode = Callable[[str], Sequence[int]]


def make_prompts(encode: Encode, *, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` prompts of `length` ids, all distinct, each from the beginning of a line.

    Raises BenchError where the text does not have so many.
    """
    text, starts = _text()
    order = random.Random(seed).sample(starts, len(starts))
    found: dict[tuple[int, ...], None] = {}
    for start in order:
        ids = tuple(encode(text[start : start + length * CHARS_PER_TOKEN])[:length])
        if len(ids) == length:
            found[ids] = None
            if len(found) == count:
                return [list(ids) for ids in found]
    raise BenchError(f"the standard library's text has no {count} distinct prompts of {length} tokens")


def word_ids(vocab_size: int) -> Encode:
    """Stands in for the tokenizer of a model without one: equal words get equal ids, common ones come often."""

    def encode(text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % vocab_size for word in re.findall(r"\w+|[^\w\s]", text)]

    return encode


@cache
def _text() -> tuple[str, list[int]]:
    """The text, and where its lines begin; lines that are empty or very short begin nothing."""
    text = standard_library_prose() + "\n\n" + standard_library_code()
    return text, [match.start() for match in re.finditer(r"^.{16}", text, re.MULTILINE)]
