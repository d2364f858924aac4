"""The supervisor actor: keeps the processes that are equal to those that should be, and tells who serves what.

Round after round its keepers look, decide and act. It is not on the data plane: coordinators and experts go on
serving while it is away, and a new one finds them again by name.
"""

import asyncio
import dataclasses
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

from actors import ray_runtime
from actors.channels import WireCredentials
from actors.ray_runtime import RuntimeFailure
from actors.supervision.blueprint import Blueprint
from actors.supervision.fleet import Fleet
from actors.supervision.keepers import CoordinatorKeeper, ExpertKeeper
from actors.supervision.map_publisher import MapPublisher
from actors.supervision.runtime import Runtime
from actors.supervision.status import ClusterStatus
from actors.supervision.status_report import report
from cluster.config import ClusterConfig
from cluster.ids import NodeId
from cluster.placement import NodeSlots
from cluster.processes import Phase
from cluster.reconcile import ReconcileState
from model.storage.checkpoint import Checkpoint

LOG = logging.getLogger(__name__)

ROUND_S = 1.0
STARTING_ROUND_S = 0.2
MAX_EVENTS = 64
HOPELESS_FAILURES = 2


class Supervisor:
    """One per namespace; built inside an event loop. `config.auth_token` must be set: every actor gets it.

    Raises CheckpointError, ModelConfigError or ConfigError when the model is not what it seems.
    """

    def __init__(self, *, config: ClusterConfig, runtime: Runtime = ray_runtime) -> None:
        assert config.auth_token is not None, "who starts a supervisor draws the token"
        self._runtime = runtime
        token = config.auth_token
        checkpoint = Checkpoint.open(Path(config.model))
        # Reads a little of the files, once: here, and not in the middle of somebody's status.
        LOG.info("%s: weights %s", config.model, checkpoint.weights_id)
        shape = checkpoint.config
        config.check_model(shape.num_experts, shape.max_context)
        self._blueprint = Blueprint(config, checkpoint, sum(node.num_gpus for node in runtime.nodes()))
        self._experts = ExpertKeeper(
            self._blueprint,
            token,
            Fleet(config.namespace, "expert", runtime),
            self._say,
            ReconcileState.initial(shape.num_layers, shape.num_experts),
        )
        self._coordinators = CoordinatorKeeper(
            self._blueprint, token, Fleet(config.namespace, "coordinator", runtime), self._say
        )
        self._credentials = WireCredentials(token, config.tls_cert, config.tls_key, config.tls_ca)
        self._publisher = MapPublisher(self._credentials)
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._began_s = time.monotonic()
        self._retired = False
        self._was_ready = False
        self._unheard: set[str] = set()
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def status(self) -> dict[str, Any]:
        """`ClusterStatus` as a plain dict."""
        return dataclasses.asdict(self._status())

    async def endpoints(self) -> dict[str, Any] | None:
        """Arguments of `actors.supervision.launch.Endpoints`, or None while the cluster is not ready.

        Raises RuntimeFailure when an actor cannot start. In a cluster that was ready once, it is waited for.
        """
        if not self._was_ready:
            for name, detail in self._failed().items():
                raise RuntimeFailure(f"{name} cannot start: {detail}")
        status = self._status()
        if status.state != "ready":
            return None
        return {
            "coordinators": tuple(one.address for one in status.coordinators),
            "credentials": self._credentials,
            "model_path": status.model_path,
            "max_model_len": min(one.max_model_len for one in status.coordinators),
            "served_model_name": status.model,
            "system_fingerprint": status.system_fingerprint,
        }

    async def drain(self, drain_s: float) -> None:
        """Coordinators take nothing new and get up to `drain_s` seconds for what they have; nothing is restarted."""
        self._retired = True
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)
        await self._coordinators.fleet.drain_all(drain_s=drain_s)

    async def retire(self) -> None:
        """Ends every process, whatever it is doing; `drain` first where that matters."""
        await self.drain(0.0)
        await self._coordinators.fleet.stop_all()
        await self._experts.fleet.stop_all()
        await self._publisher.close()

    async def _run(self) -> None:
        adopted = False
        while True:
            try:
                if not adopted:
                    self._adopt()
                    adopted = True
                await self._round()
            except Exception:
                LOG.exception("a round of the supervisor failed; the next one follows")
            settled = not self._experts.state.expert_map.missing()
            await asyncio.sleep(ROUND_S if settled else STARTING_ROUND_S)

    def _adopt(self) -> None:
        """Finds what an earlier supervisor started; its map's epoch is overtaken once a coordinator says it."""
        self._experts.fleet.adopt(replica.replica_id for replica in self._blueprint.replicas())
        self._coordinators.fleet.adopt(self._blueprint.coordinator_ids)
        self._unheard = set(self._coordinators.fleet.members)

    def _overtake_adopted(self) -> None:
        """Each adopted coordinator has a map that this supervisor did not make, perhaps of the very same epoch."""
        views = self._coordinators.views
        epochs = {name: int(view.info["map_epoch"]) for name, view in views.items() if view.info is not None}
        heard = self._unheard & epochs.keys()
        self._unheard -= heard
        for name in heard:
            self._experts.overtake(epochs[name])

    async def _round(self) -> None:
        nodes = tuple(
            NodeSlots(
                node_id=NodeId(node.node_id),
                gpu=node.num_gpus,
                cpu=node.num_cpus,
                memory_bytes=node.memory_bytes,
                labels=node.labels,
            )
            for node in self._runtime.nodes()
        )
        placement = await self._experts.round(nodes)
        await self._coordinators.round(nodes, placement)
        self._overtake_adopted()
        await self._publisher.publish(self._experts.state.expert_map, self._coordinators.views.values())
        self._was_ready = self._was_ready or self._status().state == "ready"

    def _status(self) -> ClusterStatus:
        return report(
            self._blueprint,
            self._experts.state,
            self._experts.views,
            self._coordinators.views,
            self._failed(),
            self._experts.unplaced,
            uptime_s=time.monotonic() - self._began_s,
            draining=self._retired,
            events=tuple(self._events),
        )

    def _failed(self) -> dict[str, str]:
        """Processes that failed again and again, and why; once all were ready, only while they are down."""
        records = dict(self._experts.state.records) | dict(self._coordinators.records)
        return {
            name: record.detail
            for name, record in records.items()
            if record.failures >= HOPELESS_FAILURES
            and (record.phase is Phase.ABSENT or (record.phase is not Phase.READY and not self._was_ready))
        }

    def _say(self, event: str) -> None:
        if not (self._events and self._events[-1].endswith(event)):
            LOG.warning("%s", event)
            self._events.append(f"{time.strftime('%H:%M:%S')} {event}")
