"""Which decoders a campaign is about, and how many executions each gets."""

import tempfile
from pathlib import Path

from tests.fuzz.registry import MAKERS, make


def names_of(only: str) -> list[str]:
    """The decoders named in a list with commas, all when it is empty. Raises SystemExit for a stranger."""
    names = [name for name in only.split(",") if name] or list(MAKERS)
    for name in names:
        if name not in MAKERS:
            raise SystemExit(f"there is no decoder {name!r}; there are {', '.join(MAKERS)}")
    return names


def shares(names: list[str], executions: int) -> dict[str, int]:
    """So many executions shared out by the decoders' own shares; at least one each, and that many together."""
    with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home:
        parts = {name: make(name, Path(home)).share for name in names}
    whole = sum(parts.values())
    given = {name: max(1, int(executions * part / whole)) for name, part in parts.items()}
    given[names[0]] += max(0, executions - sum(given.values()))
    return given
