"""Damaged inputs out of good ones. Everything is a function of a seed and a number: each input can be made again."""

import json
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from tests.fuzz.target import Target

MAX_BYTES = 1 << 18
_NUMBERS = (
    0,
    1,
    -1,
    2,
    127,
    128,
    255,
    256,
    65_535,
    65_536,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**53,
    2**63,
    2**64 - 1,
)
_VALUES: tuple[Any, ...] = (
    *_NUMBERS,
    *(2**64, 10**30, -(2**63), 0.5, -0.0, 1e308, 1e-320, 1e400),
    *(None, True, False, "", "x", "\x00", "é\ud800", "x" * 5000, [], {}, [[]], [None], {"": None}, [0] * 300),
)
_RUNS = re.compile(rb"\d+")

Change = Callable[[random.Random, bytearray, Target], None]


def damaged(target: Target, seed: int, number: int) -> bytes:
    """Input `number` of a campaign."""
    chance = random.Random((seed << 40) ^ number)
    base = chance.choice(target.seeds)
    if target.is_json and chance.random() < 0.5:
        base = _other_json(chance, base)
    data = bytearray(base)
    rounds = chance.choice((0, 1, 1, 1, 2, 3, 8)) if target.is_json else chance.choice((1, 1, 1, 2, 3, 8, 32))
    for _ in range(rounds):
        chance.choice(_CHANGES)(chance, data, target)
    whole = bytes(data[:MAX_BYTES])
    return target.repair(whole) if target.repair is not None and chance.random() < 0.7 else whole


def _place(chance: random.Random, data: Sequence[int]) -> int:
    return chance.randrange(len(data) + 1)


def _flip(chance: random.Random, data: bytearray, _: Target) -> None:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)


def _overwrite(chance: random.Random, data: bytearray, _: Target) -> None:
    if data:
        data[chance.randrange(len(data))] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))


def _integer(chance: random.Random, data: bytearray, _: Target) -> None:
    """A number where a number may be, little-endian."""
    size = chance.choice((2, 4, 8))
    if len(data) >= size:
        at = chance.randrange(len(data) - size + 1)
        data[at : at + size] = (chance.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, "little")


def _insert(chance: random.Random, data: bytearray, _: Target) -> None:
    at = _place(chance, data)
    data[at:at] = chance.randbytes(chance.choice((1, 1, 4, 16, 300)))


def _delete(chance: random.Random, data: bytearray, _: Target) -> None:
    at = _place(chance, data)
    del data[at : at + chance.choice((1, 1, 4, 16, 300))]


def _truncate(chance: random.Random, data: bytearray, _: Target) -> None:
    del data[_place(chance, data) :]


def _repeat(chance: random.Random, data: bytearray, _: Target) -> None:
    at = _place(chance, data)
    piece = bytes(data[at : at + chance.choice((1, 4, 16, 64))])
    data[at:at] = piece * chance.choice((1, 2, 16, 200))


def _splice(chance: random.Random, data: bytearray, target: Target) -> None:
    other = chance.choice(target.seeds)
    at, there = _place(chance, data), _place(chance, other)
    data[at:] = other[there:]


def _word(chance: random.Random, data: bytearray, target: Target) -> None:
    at = _place(chance, data)
    if target.words:
        data[at : at + chance.choice((0, 0, 1, 8))] = chance.choice(target.words)


def _digits(chance: random.Random, data: bytearray, _: Target) -> None:
    """Another number for one that is written out."""
    found = list(_RUNS.finditer(bytes(data[:4096])))
    if found:
        run = chance.choice(found)
        data[run.start() : run.end()] = str(chance.choice(_NUMBERS)).encode()


_CHANGES: tuple[Change, ...] = (
    *(_flip, _flip, _overwrite, _integer, _insert, _delete, _truncate, _repeat, _splice, _word, _word, _digits),
)


def _other_json(chance: random.Random, base: bytes) -> bytes:
    """One value, key or place of a JSON text is another."""
    try:
        tree = json.loads(base)
    except ValueError:
        return base
    holders = list(_holders(tree))
    if not holders:
        return base
    holder = chance.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = chance.choice(keys)
    what = chance.randrange(4)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[chance.choice((str(key) + "x", "", "__class__", "x" * 3000))] = holder.pop(key)
    elif what == 2:
        holder[key] = _deep(chance)
    else:
        holder[key] = chance.choice(_VALUES)
    return json.dumps(tree).encode()


def _deep(chance: random.Random) -> Any:
    value: Any = chance.choice(_VALUES)
    for _ in range(chance.choice((1, 5, 60, 400))):
        value = [value] if chance.random() < 0.5 else {"a": value}
    return value


def _holders(tree: Any) -> Any:
    """Every object and array that is not empty."""
    rest = [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, dict | list) and node:
            yield node
            rest.extend(node.values() if isinstance(node, dict) else node)
