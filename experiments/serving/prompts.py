"""Prompts as pure functions of a seed: random token ids, or windows of a text file."""

from pathlib import Path

import numpy as np

from experiments.serving.settings import BenchError, ServeSettings

Prompt = str | list[int]

CHARS_A_TOKEN = 4
MAX_TEXT_BYTES = 64 * 2**20
NUM_SPECIAL_IDS = 260  # of Mixtral's and SmolLM2's kind: special tokens and single bytes come first


def make_prompts(settings: ServeSettings, num: int, repeat: int) -> list[Prompt]:
    """`num` prompts. Repeat 0 is the warm-up; no two repeats share prompts, so that a prefix cache cannot help.

    Raises BenchError when the text file cannot serve.
    """
    rng = np.random.default_rng([settings.seed, repeat])
    if settings.text_path is None:
        return random_prompts(rng, num, settings.input_len, settings.vocab_size)
    return text_prompts(rng, num, settings.input_len * CHARS_A_TOKEN, read_text(settings.text_path))


def random_prompts(rng: np.random.Generator, num: int, length: int, vocab_size: int) -> list[Prompt]:
    """Prompts of `length` ids, each id uniform below `vocab_size` and not among the first, special ones."""
    lowest = min(NUM_SPECIAL_IDS, vocab_size // 2)
    return [rng.integers(lowest, vocab_size, length).tolist() for _ in range(num)]


def text_prompts(rng: np.random.Generator, num: int, num_chars: int, text: str) -> list[Prompt]:
    """Windows of at most `num_chars` characters at random places; each starts with a whole word if it can.

    There is no tokenizer here: four characters count as a token, and the server's usage says what it was.
    """
    if len(text) < num_chars:
        raise BenchError(
            f"--text-path has {len(text)} characters, but must have {num_chars}: "
            f"{CHARS_A_TOKEN} for each token of --input-len"
        )
    starts = rng.integers(0, len(text) - num_chars, num, endpoint=True)
    return [_from_whole_word(text[start : start + num_chars]) for start in starts.tolist()]


def read_text(path: Path) -> str:
    """The file's text. Raises BenchError when it is not there, too large or not UTF-8."""
    try:
        size = path.stat().st_size
        if size > MAX_TEXT_BYTES:
            raise BenchError(f"--text-path has {size} bytes, but must have at most {MAX_TEXT_BYTES}")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise BenchError(f"--text-path is {str(path)!r}, but cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise BenchError(f"--text-path is {str(path)!r}, but must be UTF-8 text") from None


def _from_whole_word(window: str) -> str:
    cut = window.find(" ")
    return window[cut + 1 :] if 0 <= cut < len(window) // 2 else window
