"""Prompts of a live scenario: real text of two kinds that is always at hand, as token ids of the served model."""

import random
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from experiments.engine_bench.prompts import Encode, word_ids
from model.storage.config_reader import read_config
from model.text.tokenizer import TokenizerError, load_tokenizer
from model.upcycling.calibration_text import CHARS_PER_TOKEN, standard_library_code, standard_library_prose


class TextSource:
    """Windows of text, from the beginning of a line; which ones, only the seed and the order of asking say."""

    def __init__(self, model: Path, seed: int, max_model_len: int) -> None:
        self._random = random.Random(seed)
        self._longest = max_model_len
        self._encode = _encoder(model)

    def prompt(self, weights: Mapping[str, float], length: int) -> list[int]:
        """About `length` ids (at least one, and room for an answer) of a kind drawn by its weight."""
        length = min(length, self._longest - 1)
        kind = self._random.choices(list(weights), list(weights.values()))[0]
        text, starts = _text(kind)
        start = self._random.choice(starts)
        return list(self._encode(text[start : start + length * CHARS_PER_TOKEN])[:length])

    def room_for(self, num_prompt: int, num_tokens: int) -> int:
        """So many tokens of an answer, or as many as the model's context leaves."""
        return max(min(num_tokens, self._longest - num_prompt), 1)


def _encoder(model: Path) -> Encode:
    try:
        tokenizer = load_tokenizer(model)
    except TokenizerError:
        return word_ids(read_config(model).vocab_size)
    return lambda text: tokenizer.encode(text, add_bos=True)


@cache
def _text(kind: str) -> tuple[str, list[int]]:
    text = {"prose": standard_library_prose, "code": standard_library_code}[kind]()
    return text, [match.start() for match in re.finditer(r"^.{16}", text, re.MULTILINE)]
