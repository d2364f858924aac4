"""The coordinator actor: its life from an empty process to a serving engine, and back.

A plain class with async methods and plain arguments, so that it runs as a Ray actor or inside a test. It
binds its port at once, loads in a thread, and opens its service when it has its weights and experts for every
layer. What is said over the wire is `actors.coordinator.service`'s, the hot loop `actors.coordinator.engine`'s.
"""

import asyncio
import contextlib
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from actors.channels import GrpcServer, WireCredentials, serve_grpc
from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import Failure
from actors.coordinator.forward_driver import ForwardDriver
from actors.coordinator.lane_memory import lane_memory
from actors.coordinator.loading import LoadedModel, load_model, num_threads
from actors.coordinator.report import CoordinatorReport
from actors.coordinator.service import SERVICE, ControlHooks, CoordinatorService
from actors.coordinator.submit_check import SubmitLimits
from actors.dispatch.attach import Attacher
from actors.dispatch.remote_experts import ExpertUnavailable, MapRejected, Patience, RemoteExperts
from actors.map_wire import MapRefused, refused
from cluster.config import ClusterConfig
from cluster.expert_map import ExpertMap
from cluster.load import LoadCounter
from cluster.microbatching import MicrobatchChooser, MicrobatchPolicy
from cluster.scheduler import Scheduler
from protos.coordinator_pb2 import SnapshotReply
from protos.expert_pb2 import STATUS_DRAINING, STATUS_INTERNAL, STATUS_INVALID, STATUS_OVERLOADED

LOG = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
EXPERT_WAIT_S = 10.0

LOADING = Failure(STATUS_OVERLOADED, "the coordinator is still loading")
DRAINING = Failure(STATUS_DRAINING, "the coordinator is draining and takes nothing new")


class Coordinator:
    """One coordinator of a cluster. Its state is loading, ready, draining or failed; `detail` says why.

    `auth_token` is the cluster's bearer token; that of `config` is not looked at. `node_id` is only reported.
    """

    def __init__(
        self, *, coordinator_id: str, config: ClusterConfig, auth_token: str, node_id: str = "", port: int = 0
    ) -> None:
        self._config = config
        self._port = port
        self._credentials = WireCredentials(auth_token, config.tls_cert, config.tls_key, config.tls_ca)
        self._report = CoordinatorReport(coordinator_id, node_id, config.block_size)
        self._model: LoadedModel | None = None
        self._engine: Engine | None = None
        self._experts: RemoteExperts | None = None
        self._service: CoordinatorService | None = None
        self._server: GrpcServer | None = None
        self._has_map = asyncio.Event()
        self._life: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """Binds the gRPC port, begins to load, and returns `host:port`. Raises ChannelError.

        What goes wrong with the weights shows in `info` and `Snapshot`.
        """
        if self._server is not None:
            return self._server.address
        torch.set_num_threads(num_threads(self._config))
        lanes = lane_memory(self._config)
        self._experts = RemoteExperts(
            Attacher(self._credentials, lanes, lane_only=self._config.transport == "shm"),
            Patience(deadline_s=self._config.expert_deadline_s),
            lanes=lanes,
        )
        hooks = ControlHooks(
            apply_map=self._apply_map, map_epoch=self._map_epoch, snapshot=self._snapshot, drain=self.drain
        )
        service = self._service = CoordinatorService(hooks, LOADING)
        self._server = await serve_grpc(
            service.register,
            service=SERVICE,
            host=self._config.bind_host,
            port=self._port,
            credentials=self._credentials,
            serving=False,
        )
        self._report.address = self._server.address
        self._life = asyncio.create_task(self._live(self._server, service, self._experts))
        return self._server.address

    async def info(self) -> dict[str, Any]:
        """What Snapshot says, and how far loading is, as plain values under stable names."""
        return self._report.info(self._snapshot())

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing new, waits up to `timeout_s` for what is in flight, returns the tokens that still are."""
        if self._report.state != "failed":
            self._report.turn("draining")
        if self._service is not None:
            self._service.close(DRAINING)
        if self._server is not None:
            await self._server.set_serving(False)
        if self._engine is None:
            return 0
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._engine.live.wait_for_none(), timeout_s)
        return self._engine.live.inflight_tokens

    async def stop(self) -> None:
        """Ends loading, computing and serving; whoever still waits is told so."""
        if self._life is not None:
            self._life.cancel()
            await asyncio.gather(self._life, return_exceptions=True)
        if self._service is not None:
            self._service.close(DRAINING)
            self._service.end_streams()
        if self._server is not None:
            await self._server.stop(STOP_GRACE_S)
        if self._experts is not None:
            await self._experts.close()

    async def _live(self, server: GrpcServer, service: CoordinatorService, experts: RemoteExperts) -> None:
        """Loads, waits for the experts, serves. An error ends in the state `failed`, where only reports are given."""
        try:
            self._model = await self._load()
            await self._wait_for_experts(experts)
            self._engine = self._make_engine(self._model, experts, service)
            if self._report.state == "loading":
                self._open(self._engine, self._model, service)
                await server.set_serving(True)
            await self._engine.run()
        except Exception as error:  # whatever it is, the supervisor must be able to read it
            LOG.exception("the coordinator failed")
            self._report.turn("failed", f"{type(error).__name__}: {error}")
            service.close(Failure(STATUS_INTERNAL, "the coordinator failed and waits to be replaced"))
            await server.set_serving(False)

    async def _load(self) -> LoadedModel:
        """In a thread that ends with its work, so that its compute pool does not outlive it."""
        self._report.detail = "reading weights"
        pool = ThreadPoolExecutor(1, "load")
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(pool, load_model, self._config, self._report.progress)
        finally:
            pool.shutdown(wait=False)  # a stop does not wait for a load

    async def _wait_for_experts(self, experts: RemoteExperts) -> None:
        self._report.detail = "waiting for a map of all experts"
        await self._has_map.wait()
        while True:
            try:
                await experts.wait_ready(EXPERT_WAIT_S)
                return
            except ExpertUnavailable as error:
                self._report.detail = f"waiting for the experts: {error}"

    def _make_engine(self, model: LoadedModel, experts: RemoteExperts, service: CoordinatorService) -> Engine:
        load = LoadCounter(model.config.num_layers, model.config.num_experts)
        return Engine(
            driver=ForwardDriver(model.backbone, model.kv, experts, load, _microbatches(self._config)),
            scheduler=Scheduler(model.scheduler_config, model.kv.num_blocks),
            eos_token_ids=model.eos_token_ids,
            sink=service.deliver,
        )

    def _open(self, engine: Engine, model: LoadedModel, service: CoordinatorService) -> None:
        limits = SubmitLimits(
            vocab_size=model.config.vocab_size,
            max_model_len=engine.scheduler.max_model_len,
            request_timeout_s=self._config.request_timeout_s,
        )
        service.open(engine, limits)
        self._report.turn("ready")

    def _apply_map(self, new: ExpertMap) -> None:
        """Raises MapRefused; the map in force then stays."""
        assert self._experts is not None, "the service is made after the experts"
        if self._model is not None:
            shape = (self._model.config.num_layers, self._model.config.num_experts)
            if (new.num_layers, new.num_experts) != shape:
                raise MapRefused(
                    STATUS_INVALID,
                    f"the map is of {new.num_layers} layers of {new.num_experts} experts, "
                    f"but the model has {shape[0]} of {shape[1]}",
                )
        try:
            self._experts.apply_map(new)
        except MapRejected as error:
            raise refused(error, new, self._map_epoch()) from None
        self._has_map.set()

    def _map_epoch(self) -> int:
        current = None if self._experts is None else self._experts.expert_map
        return 0 if current is None else current.epoch

    def _snapshot(self) -> SnapshotReply:
        stats = None if self._experts is None else self._experts.stats
        return self._report.snapshot(self._model, self._engine, self._map_epoch(), stats)


def _microbatches(config: ClusterConfig) -> MicrobatchChooser:
    """As many as configured, else as many as turn out to be fastest."""
    if config.microbatches is None:
        return MicrobatchChooser()
    return MicrobatchChooser(MicrobatchPolicy(choices=(config.microbatches,), min_tokens=config.microbatches))
