"""The keys that count now: those of a file, read again when it changes, and one that was given by itself.

A new file that is wrong changes nothing: the keys before it stay in force, and the log says what is wrong with it.
"""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from actors.front.api_keys import KeyEntry, KeyRing, KeysError, one_key, parse_keys

LOG = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
MAX_FILE_BYTES = 8 * 1024 * 1024

_Stamp = tuple[int, int, int]


ONLY_KEY = "default"
"""The name of the key that is given by itself."""


class Keys:
    """`file` may be None, then only `extra` counts. `clock` is monotonic, in seconds. Raises KeysError at first."""

    def __init__(
        self, file: Path | None, extra: tuple[KeyEntry, ...] = (), clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._file = file
        self._extra = extra
        self._clock = clock
        self._stamp: _Stamp | None = None
        self._looked_at_s = clock()
        self._ring = KeyRing(extra)
        if file is not None:
            self._ring = KeyRing((*self._read(file), *extra))
            self._stamp = _stamp(file)

    @property
    def ring(self) -> KeyRing:
        """The keys in force. Looks at the file if it has not for a second."""
        now_s = self._clock()
        if self._file is not None and now_s - self._looked_at_s >= LOOK_EVERY_S:
            self._looked_at_s = now_s
            self._look(self._file)
        return self._ring

    def _look(self, file: Path) -> None:
        stamp = _stamp(file)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            entries = self._read(file)
        except KeysError as error:
            LOG.error("the API keys stay as they were: %s", error)
            return
        self._ring = KeyRing((*entries, *self._extra))
        LOG.warning("%d API keys are in force, read anew from %s", len(self._ring.entries), file)

    def _read(self, file: Path) -> tuple[KeyEntry, ...]:
        entries = read_keys(file)
        names = {entry.name for entry in entries}
        for one in self._extra:
            if one.name in names:
                raise KeysError(f"{file}: the name {one.name!r} is taken")
        return entries


def load_keys(file: str | None, only_key: str | None) -> Keys | None:
    """The keys of a server; None where it has none. Raises KeysError."""
    if file is None and only_key is None:
        return None
    extra = () if only_key is None else (one_key(ONLY_KEY, only_key),)
    return Keys(None if file is None else Path(file), extra)


def read_keys(file: Path) -> tuple[KeyEntry, ...]:
    """The entries of `file`. Raises KeysError naming it."""
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeysError(f"{file}: {error.strerror}") from None
    if len(text) > MAX_FILE_BYTES:
        raise KeysError(f"{file}: it is larger than {MAX_FILE_BYTES} bytes")
    try:
        return parse_keys(text)
    except KeysError as error:
        raise KeysError(f"{file}: {error}") from None


def _stamp(file: Path) -> _Stamp | None:
    """What changes when a file is written or, as Kubernetes does, exchanged; None where there is none."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
