"""JSON as a checkpoint may be trusted with it: one object, no key twice, no NaN, bounded in size.

What the fields mean is left to the callers: configurations, safetensors headers and shard indexes.
"""

import json
import re
from pathlib import Path
from typing import BinaryIO

_PIECE_BYTES = 1 << 18
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class JSONError(ValueError):
    """Text that is not one well-formed JSON object; the message does not name the file."""


def parse_object(data: bytes) -> dict[str, object]:
    """The JSON object in `data`, UTF-8. Raises JSONError for anything else, a repeated key included."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except JSONError:
        raise
    except UnicodeDecodeError as error:
        raise JSONError(f"not UTF-8: {error.reason} at byte {error.start}") from None
    except RecursionError:
        raise JSONError("nested too deeply") from None
    except ValueError as error:
        raise JSONError(f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise JSONError(f"expected a JSON object, got {type(value).__name__}")
    return value


def read_object(path: Path, max_bytes: int) -> tuple[dict[str, object], bytes]:
    """The JSON object in the file, and its raw bytes. Raises OSError or JSONError, over `max_bytes` too."""
    with path.open("rb") as file:
        data = _read(file, max_bytes)
    return parse_object(data), data


def _read(file: BinaryIO, max_bytes: int) -> bytes:
    """Piece by piece: one read of `max_bytes` takes so much memory, however short the file is."""
    data = bytearray()
    while piece := file.read(_PIECE_BYTES):
        data += piece
        if len(data) > max_bytes:
            raise JSONError(f"larger than the limit of {max_bytes} bytes")
    return bytes(data)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if _LONE_SURROGATE.search(key):
            raise JSONError(f"key {key!r} is not valid Unicode")
        if key in result:
            raise JSONError(f"key {key!r} appears twice")
        result[key] = value
    return result


def _refuse_constant(name: str) -> object:
    raise JSONError(f"{name} is not a JSON number")
