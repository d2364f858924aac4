"""Where this user's files of ours are kept."""

import os
from pathlib import Path


def user_cache_dir() -> Path:
    """$XDG_CACHE_HOME/octavo, or ~/.cache/octavo where that is unset or (by its standard) not absolute."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "octavo"
