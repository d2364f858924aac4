"""A process of `experiments.copy_cost`: `python -m experiments.copy_cost_child expert|coordinator JSON`.

Imports what an actor's process imports, when it does. Lives until its standard input ends.
"""

import asyncio
import json
import sys
from typing import Any

from actors.expert import behind
from actors.expert.process import ExpertProcess


async def be_expert(kwargs: dict[str, Any]) -> None:
    """Prints what `info` says once the actor has settled; `_nice` is how far it stands behind until then."""
    behind.NICE = kwargs.pop("_nice", behind.NICE)
    actor = ExpertProcess(**kwargs)
    await actor.start()
    print(json.dumps(await actor.wait_settled()), flush=True)
    await asyncio.to_thread(sys.stdin.read)


async def be_coordinator(kwargs: dict[str, Any]) -> None:
    """Prints its address."""
    from actors.coordinator.actor import Coordinator
    from cluster.config import ClusterConfig

    token = kwargs.pop("auth_token")
    config = ClusterConfig(device="cpu", coordinator_threads=2, kv_cache_bytes=1 << 30, **kwargs)
    print(await Coordinator(coordinator_id="coordinator-0", config=config, auth_token=token).start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    kind, text = sys.argv[1:]
    asyncio.run((be_expert if kind == "expert" else be_coordinator)(json.loads(text)))
