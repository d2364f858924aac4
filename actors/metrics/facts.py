"""A coordinator's snapshot as plain values, so that one set of metrics serves who has the message and who has a dict.

Fields that one side does not know yet are simply absent: whoever reads facts gives a default.
"""

from typing import Any

from actors.metrics.family import Facts
from protos.coordinator_pb2 import LayerLoad, SnapshotReply


def facts_of(reply: SnapshotReply) -> Facts:
    """Every field by name; messages are dicts, loads lists by layer."""
    return {field.name: _plain(getattr(reply, field.name)) for field in reply.DESCRIPTOR.fields}


def _plain(value: Any) -> Any:
    if isinstance(value, LayerLoad):
        return list(value.tokens)
    if hasattr(value, "DESCRIPTOR"):
        return {field.name: _plain(getattr(value, field.name)) for field in value.DESCRIPTOR.fields}
    if isinstance(value, int | float | str | bytes):
        return value
    return [_plain(one) for one in value]
