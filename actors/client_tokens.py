"""Tokens of programs that may call `Generate` over gRPC and nothing else, read from a file that an operator writes.

One client a line: `NAME TOKEN`, or `NAME sha256:HEX` for who would rather not write the token down. Empty lines and
lines that begin with # are skipped. Only hashes are kept. Who may call what is `actors.channels`' to enforce, what a
client's stream may do `actors.coordinator.service`'s.
"""

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Self

MAX_FILE_BYTES = 1 << 20
MIN_TOKEN_LENGTH = 16
TOKEN_KEY = "authorization"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
_TOKEN = re.compile(rf"[\x21-\x7e]{{{MIN_TOKEN_LENGTH},512}}")
_HASHED = re.compile(r"sha256:([0-9a-f]{64})")

Metadata = Iterable[tuple[str, str | bytes]]


class ClientTokenError(ValueError):
    """A file of client tokens that cannot be used; the message names the file and the line, and shows no token."""


class ClientTokens:
    """Names of clients by the hash of their token; neither `repr` nor errors show one."""

    def __init__(self, hashes: Mapping[str, bytes]) -> None:
        self._hashes = dict(hashes)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Raises ClientTokenError."""
        try:
            with open(path, "rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise ClientTokenError(f"{path}: cannot be read: {error.strerror}") from None
        if len(data) > MAX_FILE_BYTES:
            raise ClientTokenError(f"{path}: larger than {MAX_FILE_BYTES} bytes")
        hashes: dict[str, bytes] = {}
        for number, line in enumerate(data.decode("latin-1").splitlines(), 1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, hashed = _parse(f"{path}: line {number}", line.split())
            if name in hashes or hashed in hashes.values():
                raise ClientTokenError(f"{path}: line {number}: the name or the token is there already")
            hashes[name] = hashed
        return cls(hashes)

    def who(self, metadata: Metadata) -> str | None:
        """The client whose token the call carries, None when it is no client's. Every token takes the same time."""
        found = None
        for key, value in metadata:
            if key == TOKEN_KEY:
                given = value if isinstance(value, bytes) else value.encode(errors="replace")
                hashed = hashlib.sha256(given.removeprefix(b"Bearer ")).digest() if given[:7] == b"Bearer " else b""
                for name, expected in self._hashes.items():
                    if hmac.compare_digest(hashed, expected):
                        found = name
        return found


def _parse(where: str, words: list[str]) -> tuple[str, bytes]:
    if len(words) != 2 or not _NAME.fullmatch(words[0]):
        raise ClientTokenError(f"{where}: must be NAME TOKEN, the name of letters, digits, '_', '.' and '-'")
    hashed = _HASHED.fullmatch(words[1])
    if hashed is not None:
        return words[0], bytes.fromhex(hashed[1])
    if words[1].startswith("sha256:") or not _TOKEN.fullmatch(words[1]):
        raise ClientTokenError(
            f"{where}: a token has {MIN_TOKEN_LENGTH} to 512 printable ASCII characters, or is sha256: and 64 digits"
        )
    return words[0], hashlib.sha256(words[1].encode()).digest()
