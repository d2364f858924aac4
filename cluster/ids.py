"""The names of things: one NewType per kind of id, so that two ints cannot be swapped unseen.

Nothing else lives here. `model/` speaks plain ints; the conversion happens in `actors/`.
"""

from typing import NewType

LayerId = NewType("LayerId", int)
"""A decoder layer, 0-based."""

ExpertId = NewType("ExpertId", int)
"""A logical expert of the model, 0-based; the same number in every layer."""

ReplicaId = NewType("ReplicaId", str)
"""One actor-held copy of one or more logical experts, e.g. `expert-3-r0`. Survives restarts of its process.
"""

NodeId = NewType("NodeId", str)
"""A machine of the cluster, as the runtime names it."""

SequenceId = NewType("SequenceId", int)
"""One sequence in one coordinator; never used twice by it."""

CoordinatorId = NewType("CoordinatorId", str)
"""One coordinator actor, e.g. `coordinator-0`. Survives restarts of its process."""
