"""A little real text that is always at hand: the prose and code of Python's standard library.

Which text, and which parts of it, is decided by name and position alone, so the same Python gives the same
windows. What is done with them is `model.upcycling.calibration`'s work.
"""

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data import topics

CODE_MODULES = ("argparse", "difflib", "heapq", "random", "statistics", "textwrap")
ROUND = 4  # windows come in rounds: three of English prose, then one of code

CHARS_PER_TOKEN = 8  # more than any vocabulary's average on such text


def standard_library_prose() -> str:
    """The language reference as `help()` shows it, some 460,000 characters, in order of topic."""
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def standard_library_code() -> str:
    """The source of a few modules."""
    sources = []
    for name in CODE_MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and Path(spec.origin).suffix == ".py":
            sources.append(Path(spec.origin).read_text(encoding="utf-8"))
    return "\n\n".join(sources)


def calibration_windows(
    encode: Callable[[str], Sequence[int]], *, num_windows: int, window_tokens: int
) -> list[list[int]]:
    """`num_windows` windows of `window_tokens` ids each, spread evenly over the text; every ROUND-th is code.

    Raises ValueError where there is too little text.
    """
    num_code = num_windows // ROUND
    windows = _spread(standard_library_prose(), encode, num_windows - num_code, window_tokens)
    for index, window in enumerate(_spread(standard_library_code(), encode, num_code, window_tokens)):
        windows.insert(index * ROUND + ROUND - 1, window)
    return windows


def _spread(text: str, encode: Callable[[str], Sequence[int]], count: int, window_tokens: int) -> list[list[int]]:
    """`count` windows that do not overlap, each from the beginning of a line, at equal distances."""
    excerpt = window_tokens * CHARS_PER_TOKEN
    windows = []
    for index in range(count):
        begin = text.index("\n", len(text) * index // count) + 1
        ids = encode(text[begin : begin + excerpt])[:window_tokens]
        if len(text) // count < 2 * excerpt or len(ids) < window_tokens:
            raise ValueError(f"{len(text)} characters of text are too few for {count} windows of {window_tokens}")
        windows.append(list(ids))
    return windows
