"""The supervisor actor: keeps the processes that are equal to those that should be, and tells who serves what.

Round after round its keepers look, decide and act. It is not on the data plane: coordinators and experts go on
serving while it is away, and a new one finds them again by name.
"""

import asyncio
import contextlib
import dataclasses
import logging
import time
from collections import deque
from pathlib import Path
from typing import Any

from actors import ray_runtime
from actors.channels import WireCredentials
from actors.command.cache_dir import user_cache_dir
from actors.ray_runtime import RuntimeFailure
from actors.supervision.balancing import Balancing
from actors.supervision.blueprint import Blueprint
from actors.supervision.fleet import Fleet
from actors.supervision.host_control import HostControl, NoHostControl
from actors.supervision.hosts import RayHosts
from actors.supervision.keepers import HOPELESS_FAILURES, CoordinatorKeeper, ExpertKeeper
from actors.supervision.leaving import Leaving
from actors.supervision.map_publisher import MapPublisher
from actors.supervision.measured import Measured
from actors.supervision.mover import Mover
from actors.supervision.node_watch import NodeWatch
from actors.supervision.runtime import Runtime
from actors.supervision.status import ClusterStatus
from actors.supervision.status_report import report
from actors.supervision.verbs import Verbs
from cluster.config import BalanceMode, ClusterConfig
from cluster.processes import Phase
from cluster.reconcile import ReconcileState
from model.storage.integrity import verified
from model.storage.ledger import Ledger

LOG = logging.getLogger(__name__)

ROUND_S = 1.0
STARTING_ROUND_S = 0.2
MAX_EVENTS = 64


class Supervisor:
    """One per namespace; built inside an event loop. `config.auth_token` must be set: every actor gets it.

    Raises CheckpointError, ModelConfigError or ConfigError when the model is not what it seems.
    """

    def __init__(
        self, *, config: ClusterConfig, runtime: Runtime = ray_runtime, hosts: HostControl | None = None
    ) -> None:
        assert config.auth_token is not None, "who starts a supervisor draws the token"
        self._runtime = runtime
        token = config.auth_token
        # Without a manifest every tensor is read for one: here, once, before anybody loads.
        checkpoint = verified(Ledger.open(Path(config.model)), user_cache_dir()).checkpoint
        LOG.info("%s: weights %s", config.model, checkpoint.content_id)
        shape = checkpoint.config
        config.check_model(shape.num_experts, shape.max_context)
        config.check_layers(shape.num_layers)
        self._blueprint = Blueprint(config, checkpoint, sum(node.num_gpus for node in runtime.nodes()))
        self._nodes = NodeWatch(runtime)
        self._changed = asyncio.Event()
        self._experts = ExpertKeeper(
            self._blueprint,
            token,
            Fleet(config.namespace, "expert", runtime, self._changed),
            self._say,
            ReconcileState.initial(shape.num_layers, shape.num_experts),
        )
        self._coordinators = CoordinatorKeeper(
            self._blueprint, token, Fleet(config.namespace, "coordinator", runtime, self._changed), self._say
        )
        limits = config.host_limits
        self._hosts = None if limits is None else RayHosts(runtime, limits, self._say)
        self._credentials = WireCredentials(
            token, config.tls_cert, config.tls_key, config.tls_ca, config.tls_server_name
        )
        self._publisher = MapPublisher(self._credentials)
        self._measured = Measured(runtime)
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._began_s = time.monotonic()
        self._retired = False
        self._was_ready = False
        self._unheard: set[str] = set()
        mover = Mover(
            self._experts,
            self._blueprint.grain(),
            hosts or self._hosts or NoHostControl(),
            drain_s=config.drain_timeout_s,
            expert_slots=config.expert_slots,
            bytes_per_s=config.balance_bytes_per_s,
            cpus_each=config.expert_threads,
        )
        self._balancing = Balancing(config, mover, lambda: self._coordinators.views, self._say)
        self._verbs = Verbs(mover, self._balancing, self._say)
        self._leaving = Leaving(mover, self._coordinators, self._say)
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def status(self) -> dict[str, Any]:
        """`ClusterStatus` as a plain dict."""
        return dataclasses.asdict(self._status())

    async def window(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """`status`, and what each coordinator that answers says of itself, as `actors.metrics.facts` has it."""
        told = [view.info for view in self._coordinators.views.values() if view.info is not None and view.dead is None]
        return await self.status(), [dict(info) for info in told]

    async def endpoints(self) -> dict[str, Any] | None:
        """Arguments of `actors.supervision.launch.Endpoints`, or None while the cluster is not ready.

        Raises RuntimeFailure when an actor cannot start. In a cluster that was ready once, it is waited for, and the
        coordinators that serve meanwhile are told.
        """
        if not self._was_ready:
            for name, detail in self._failed().items():
                raise RuntimeFailure(f"{name} cannot start: {detail}")
        status = self._status()
        if status.state != "ready" and not (self._was_ready and status.state == "degraded"):
            return None
        serving = [one for one in status.coordinators if one.state in ("ready", "draining")]
        return {
            "coordinators": tuple(one.address for one in serving),
            "credentials": self._credentials,
            "model_path": status.model_path,
            "max_model_len": min(one.max_model_len for one in serving),
            "served_model_name": status.model,
            "system_fingerprint": status.system_fingerprint,
        }

    async def balance(self, dry_run: bool) -> dict[str, Any]:
        """See `actors.supervision.verbs.Verbs`, as for the three that follow."""
        return await self._verbs.balance(dry_run=dry_run)

    async def switch_balance(self, mode: BalanceMode) -> None:
        """Balancing is off, dry_run or on from now on, until this supervisor ends."""
        self._balancing.switch(mode)

    async def replicate(self, expert: int, first: int | None, last: int | None, node: str | None) -> dict[str, Any]:
        """One more replica of an expert. Raises MoveRefused."""
        return self._verbs.replicate(expert, first, last, node)

    async def drain_replica(self, replica_id: str) -> dict[str, Any]:
        """One replica fewer. Raises MoveRefused."""
        return self._verbs.drain(replica_id)

    async def fold(self, num_groups: int) -> dict[str, Any]:
        """All experts in so many processes. Raises MoveRefused."""
        return self._verbs.fold(num_groups)

    async def drain_node(self, node_id: str, drain_s: float) -> list[str]:
        """See `actors.supervision.leaving.Leaving.drain`. Raises MoveRefused."""
        return await self._leaving.drain(node_id, self._nodes.slots, drain_s)

    async def drain(self, drain_s: float) -> None:
        """Coordinators take nothing new and get up to `drain_s` seconds for what they have; nothing is restarted."""
        self._retired = True
        await self._balancing.close()
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
                    await self._adopt()
                    adopted = True
                self._changed.clear()
                await self._round()
                self._measured.tell(self._status, self._coordinators.views.values())
            except Exception:
                LOG.exception("a round of the supervisor failed; the next one follows")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ROUND_S if self._is_settled() else STARTING_ROUND_S):
                    await self._changed.wait()

    def _is_settled(self) -> bool:
        """False while a process is on its way or about to end: then it is worth looking more often."""
        if self._experts.former:
            return False
        views = (*self._experts.views.values(), *self._coordinators.views.values())
        return not any(view.state in ("starting", "loading") for view in views)

    async def _adopt(self) -> None:
        """Finds what an earlier supervisor started; its map's epoch is overtaken once a coordinator says it."""
        await self._experts.adopt()
        await self._coordinators.fleet.adopt()
        self._unheard = set(self._coordinators.fleet.members)
        self._was_ready = bool(self._unheard)
        if self._unheard:
            self._say(f"a new supervisor has found {len(self._experts.fleet.members)} replicas that run")

    def _overtake_adopted(self) -> None:
        """Each adopted coordinator has a map that this supervisor did not make, perhaps of the very same epoch."""
        views = self._coordinators.views
        epochs = {name: int(view.info["map_epoch"]) for name, view in views.items() if view.info is not None}
        heard = self._unheard & epochs.keys()
        self._unheard -= heard
        for name in heard:
            self._experts.overtake(epochs[name])

    async def _round(self) -> None:
        was_silent = self._nodes.head_silent
        await self._nodes.look()
        if self._nodes.head_silent and not was_silent:
            self._say("Ray's head does not answer: what runs goes on, nothing can be started")
        elif was_silent and not self._nodes.head_silent:
            self._say("Ray's head answers again")
        if self._hosts is not None:
            await self._hosts.look(self._nodes.slots, head_silent=self._nodes.head_silent, lost=self._nodes.lost)
        self._leaving.look()
        placement = await self._experts.round(self._nodes, self._coordinators.reports(), self._coordinators.epochs())
        await self._coordinators.round(self._nodes, placement)
        self._overtake_adopted()
        await self._publisher.publish(self._experts.state.expert_map, self._coordinators.views.values())
        self._was_ready = self._was_ready or self._status().state == "ready"

    def _status(self) -> ClusterStatus:
        return report(
            self._blueprint,
            self._experts,
            self._coordinators.views,
            self._failed(),
            wanted=self._coordinators.crew.wanted,
            was_ready=self._was_ready,
            uptime_s=time.monotonic() - self._began_s,
            draining=self._retired,
            events=tuple(self._events),
            balance=self._balancing.status,
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
