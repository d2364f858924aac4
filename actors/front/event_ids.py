"""The `id:` of a stream's events: all that another ingress needs to go on after one of them, in a line of ASCII.

    1-<request>-<fingerprint>-<seed>-<created>-<name>[~<label>]-<age>-<position>.<position>...[-u]

It says what was asked and of which model (as hashes), how the answer was drawn, when, what the client called its
request (the label), and how far each choice was told.
Nothing in it is secret or trusted: whoever forges one gets what a request with that seed would give. Whether a stream
may go on is `actors.front.resume`'s decision.
"""

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import NamedTuple, Self

from actors.front.request_fields import REQUEST_ID

MAX_CHARS = 2048
_HEX = "([0-9a-f]{%s})"
_POSITION = r"[0-9]{1,8}[nose]"
_FORM = re.compile(
    "-".join(["1", *(_HEX % size for size in ("16", "8", "1,16", "1,10", "24"))])
    + rf"(?:~({REQUEST_ID.pattern}))?-{_HEX % '1,8'}-({_POSITION}(?:\.{_POSITION})*)(-u)?"
)


class Stage(Enum):
    """How much of a choice was told."""

    NOTHING = "n"
    OPEN = "o"
    """Something; more may come."""
    SAID = "s"
    """All of its text, but not that it has ended."""
    ENDED = "e"


class Position(NamedTuple):
    """How far a choice was told: all that its first `num_tokens` tokens make certain."""

    num_tokens: int = 0
    stage: Stage = Stage.NOTHING


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamKey:
    """What a stream is: `request` and `fingerprint` are hashes, `name` is drawn, `created` is in Unix seconds.

    `label` is the client's own name for it, or empty.
    """

    request: str
    fingerprint: str
    seed: int
    created: int
    name: str
    label: str = ""

    @classmethod
    def draw(
        cls, *, request: str, fingerprint: str, seed: int, created: int, name: str | None = None, label: str = ""
    ) -> Self:
        """The key of a new stream. `name`, if it is given, was drawn for it and for nothing else."""
        return cls(
            request=request,
            fingerprint=fingerprint,
            seed=seed,
            created=created,
            name=name or secrets.token_hex(12),
            label=label,
        )

    def __str__(self) -> str:
        called = f"~{self.label}" if self.label else ""
        return f"1-{self.request}-{self.fingerprint}-{self.seed:x}-{self.created:x}-{self.name}{called}"


@dataclass(frozen=True, slots=True)
class EventId:
    """One event of a stream. `age_s` is the stream's age when the event was sent."""

    key: StreamKey
    age_s: int
    positions: tuple[Position, ...]
    usage_told: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """The id that `EventIds` wrote. Raises ValueError for any other text."""
        match = _FORM.fullmatch(text) if len(text) <= MAX_CHARS else None
        if match is None:
            raise ValueError("not the id of an event of this server")
        request, fingerprint, seed, created, name, label, age, positions, usage = match.groups()
        key = StreamKey(
            request=request,
            fingerprint=fingerprint,
            seed=int(seed, 16),
            created=int(created, 16),
            name=name,
            label=label or "",
        )
        told = tuple(Position(int(one[:-1]), Stage(one[-1])) for one in positions.split("."))
        return cls(key, int(age, 16), told, usage is not None)

    @property
    def sent_at(self) -> int:
        """When the event was sent, in Unix seconds."""
        return self.key.created + self.age_s


class EventIds:
    """Writes the ids of one stream's events, in the order in which they are sent."""

    def __init__(self, key: StreamKey, told: Sequence[Position], wall_clock: Callable[[], float]) -> None:
        self._prefix = str(key)
        self._created = key.created
        self._wall_clock = wall_clock
        self._told = [_text(position) for position in told]

    def at(self, index: int, num_tokens: int, stage: Stage) -> str:
        """The id of an event that takes choice `index` to a new position."""
        self._told[index] = f"{num_tokens}{stage.value}"
        return self._write()

    def with_usage(self) -> str:
        """The id of the usage's event, after which there is nothing."""
        return f"{self._write()}-u"

    def _write(self) -> str:
        age_s = max(0, int(self._wall_clock()) - self._created)
        return f"{self._prefix}-{age_s:x}-{'.'.join(self._told)}"


def digest(*parts: bytes, size: int) -> str:
    """A hash of `parts`, of `size` bytes, as hexadecimal digits."""
    hashed = blake2b(digest_size=size)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()


def _text(position: Position) -> str:
    return f"{position.num_tokens}{position.stage.value}"
