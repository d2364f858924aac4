"""The names of replicas: what one holds can be read from its id, so that a new supervisor knows it without asking.

`expert-3-r0`, `experts-0-3-r1`, `experts-0-1+4-r0` for groups with gaps, `expert-3-l0-15-r2` for some layers only.
Who gets which name is decided in `cluster.desired_set`.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cluster.ids import ExpertId, ReplicaId

_NAME = re.compile(r"experts?-(?P<experts>\d+(?:-\d+)?(?:\+\d+(?:-\d+)?)*)(?:-l(?P<first>\d+)-(?P<last>\d+))?-r(\d+)")


@dataclass(frozen=True, slots=True)
class Held:
    """What a name says. `layers` is None for all of them."""

    expert_ids: tuple[ExpertId, ...]
    layers: range | None


def replica_name(expert_ids: Sequence[int], layers: range | None, copy: int) -> ReplicaId:
    """The name of a replica of these experts; `layers` None is all of them."""
    experts = "+".join(_spans(sorted(expert_ids)))
    where = "" if layers is None else f"-l{layers.start}-{layers.stop - 1}"
    return ReplicaId(f"expert{'s' if len(expert_ids) > 1 else ''}-{experts}{where}-r{copy}")


def free_name(expert_ids: Sequence[int], layers: range | None, taken: Collection[ReplicaId]) -> ReplicaId:
    """The name with the lowest copy number that nobody has."""
    copy = 0
    while (name := replica_name(expert_ids, layers, copy)) in taken:
        copy += 1
    return name


def read_name(replica_id: ReplicaId) -> Held | None:
    """What a replica of that name holds; None for a name of another form."""
    found = _NAME.fullmatch(replica_id)
    if found is None:
        return None
    experts: list[ExpertId] = []
    for span in found["experts"].split("+"):
        low, _, high = span.partition("-")
        experts += map(ExpertId, range(int(low), int(high or low) + 1))
    layers = None if found["first"] is None else range(int(found["first"]), int(found["last"]) + 1)
    if not experts or len(set(experts)) != len(experts) or (layers is not None and not layers):
        return None
    return Held(tuple(experts), layers)


def _spans(ascending: Sequence[int]) -> list[str]:
    """0, 1, 2, 5 as 0-2 and 5."""
    spans: list[list[int]] = []
    for number in ascending:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return [str(span[0]) if len(span) == 1 else f"{span[0]}-{span[-1]}" for span in spans]
