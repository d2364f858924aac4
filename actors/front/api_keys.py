"""API keys as their file has them: hashes, never the keys; and who a key belongs to.

A key is drawn from 256 bits (`new_key`), so one SHA-256 is enough: there is nothing to guess that a slow hash would
slow down. Reading the file again when it changes is `actors.front.key_file`'s work, limits are those of
`actors.front.accounts`.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from actors.front.openai_errors import param_of

PREFIX = "sk-octavo-"
MAX_KEYS = 10_000
MAX_KEY_CHARS = 512
MIN_KEY_CHARS = 16
_MOST = 10**12

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@-]{0,63}$")]
Rate = Annotated[int, Field(ge=1, le=_MOST)]


class KeysError(ValueError):
    """The keys' file cannot be used. Says where and why, without what stands there."""


def _time(value: object) -> object:
    """ISO 8601, at UTC where it names no zone."""
    if not isinstance(value, str):
        raise ValueError("must be a time such as 2030-12-31T00:00:00Z")
    try:
        read = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError("must be a time such as 2030-12-31T00:00:00Z") from None
    return read.replace(tzinfo=read.tzinfo or UTC)


class KeyEntry(BaseModel):
    """One key. `tenant` shares turns in the queue among all its keys; without one the name is. None is no limit."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: Name
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", repr=False)]
    tenant: Name | None = None
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    concurrency: Rate | None = None
    expires: Annotated[datetime, BeforeValidator(_time)] | None = None

    @property
    def whose(self) -> str:
        """The tenant's name."""
        return self.tenant or self.name

    def is_expired(self, now_unix_s: float) -> bool:
        """True from the moment on that it names."""
        return self.expires is not None and now_unix_s >= self.expires.timestamp()


def _unique(entries: list[KeyEntry]) -> list[KeyEntry]:
    for what in ("name", "sha256"):
        seen: set[str] = set()
        for place, entry in enumerate(entries):
            value = getattr(entry, what)
            if value in seen:
                raise ValueError(f"keys[{place}].{what} is that of another entry")
            seen.add(value)
    return entries


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    keys: Annotated[list[KeyEntry], Field(max_length=MAX_KEYS), AfterValidator(_unique)]


def parse_keys(text: str | bytes) -> tuple[KeyEntry, ...]:
    """The entries of a file's JSON. Raises KeysError."""
    try:
        return tuple(_File.model_validate(json.loads(text)).keys)
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False, include_context=False)[0]
        reason = details["msg"].removeprefix("Value error, ")
        raise KeysError(f"{param_of(details['loc']) or 'the file'}: {reason}") from None
    except (ValueError, RecursionError) as error:
        where = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise KeysError(f"it is no JSON{where}") from None


def digest(key: str) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def new_key(name: str, **limits: Any) -> tuple[str, KeyEntry]:
    """A key that nobody can guess, and its entry. Raises KeysError where the name or a limit is none."""
    key = PREFIX + secrets.token_urlsafe(32)
    return key, one_key(name, key, **limits)


def one_key(name: str, key: str, **limits: Any) -> KeyEntry:
    """The entry of a given key. Raises KeysError; the key is not in its message."""
    if not MIN_KEY_CHARS <= len(key) <= MAX_KEY_CHARS:
        raise KeysError(f"an API key has {len(key)} characters, but must have {MIN_KEY_CHARS} to {MAX_KEY_CHARS}")
    if not key.isascii() or not key.isprintable() or " " in key:
        raise KeysError("an API key must be of printable ASCII characters without spaces")
    entry = {"name": name, "sha256": digest(key), **limits}
    return parse_keys(json.dumps({"keys": [entry]}))[0]


class KeyRing:
    """Finds the entry of a key in a time that says nothing about the keys there are.

    Entries are found by a hash under a secret of this process, which no stranger can steer, and compared in constant
    time.
    """

    def __init__(self, entries: Iterable[KeyEntry]) -> None:
        self._secret = secrets.token_bytes(32)
        self.entries = tuple(entries)
        self._by_blinded = {self._blinded(bytes.fromhex(entry.sha256)): entry for entry in self.entries}

    def find(self, key: str) -> KeyEntry | None:
        """Whose key that is, expired or not."""
        if len(key) > MAX_KEY_CHARS:
            return None
        hashed = hashlib.sha256(key.encode()).digest()
        entry = self._by_blinded.get(self._blinded(hashed))
        known = bytes(32) if entry is None else bytes.fromhex(entry.sha256)
        return entry if hmac.compare_digest(hashed, known) else None

    def _blinded(self, hashed: bytes) -> bytes:
        return hashlib.blake2b(hashed, key=self._secret, digest_size=16).digest()
