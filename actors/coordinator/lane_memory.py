"""How much memory a coordinator shares with the replicas on its machine: room, not need, since pages come as touched.

What lies there is `actors.dispatch`'s business.
"""

import logging
from pathlib import Path

from actors.dispatch.lane_transport import LaneMemory, RegionError
from cluster.config import ClusterConfig
from model.config import ModelConfigError
from model.storage.config_reader import read_config

LOG = logging.getLogger(__name__)

ROUNDS = 4
"""Layers' worth of routed rows that may be in shared memory at once: one per microbatch, and some to spare."""


def lane_memory(config: ClusterConfig) -> LaneMemory | None:
    """None where lanes are switched off, the system has none, or the model cannot be read (which loading will say)."""
    if config.transport == "grpc":
        return None
    try:
        model = read_config(Path(config.model))
        num_rows = config.max_num_batched_tokens * model.top_k
        return LaneMemory.create(ROUNDS * num_rows, model.hidden_size, ROUNDS * num_rows)
    except (ModelConfigError, RegionError, OSError) as error:
        LOG.warning("no same-node lanes: %s", error)
        return None
