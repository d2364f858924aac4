"""A coordinator's end of a lane in a process of its own, to be killed: `python -m tests.support.lane_coordinator JSON`.

JSON has the replica's `replica_id`, `address`, `numerics_domain` and the rows' `width`. It opens a lane, sends messages
whose answers nobody awaits, prints a line, and lives until its standard input ends.
"""

import asyncio
import json
import sys
from typing import Any

import torch

from actors.dispatch.attach import Attacher
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.transport import ExpertRequest, ExpertRows, WireCounters
from cluster.expert_map import ReplicaInfo
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from tests.support.experts import FAR_FUTURE_US, credentials

NUM_MESSAGES = 20


async def _main(about: dict[str, Any]) -> None:
    memory = LaneMemory.create(256, about["width"], 256)
    replica = ReplicaInfo(
        replica_id=ReplicaId(about["replica_id"]),
        expert_ids=(ExpertId(0),),
        first_layer=LayerId(0),
        num_layers=2,
        address=about["address"],
        node_id=NodeId("node"),
        numerics_domain=about["numerics_domain"],
    )
    transport = await Attacher(credentials(), memory, lane_only=True)(replica, WireCounters(), 120)
    x_ND = torch.ones(8, about["width"])
    for _ in range(NUM_MESSAGES):
        transport.forward(ExpertRequest(0, 1, FAR_FUTURE_US, (ExpertRows(0, slice(0, 8)),), x_ND))
    print(transport.lane, flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(_main(json.loads(sys.argv[1])))
