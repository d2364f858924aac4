"""The coordinator actor: its life from an empty process to a serving engine, and back.

A plain class with async methods and plain arguments, so that it runs as a Ray actor or inside a test. It
binds its port at once, loads in a thread, and opens its service when it has its weights and experts for every
layer. What is said over the wire is `actors.coordinator.service`'s, the hot loop `actors.coordinator.engine`'s.
"""

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from actors.channels import ClientAccess, GrpcServer, WireCredentials, serve_grpc
from actors.client_tokens import ClientTokens
from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import Failure
from actors.coordinator.forward_driver import ForwardDriver
from actors.coordinator.grammars import Grammars
from actors.coordinator.lane_memory import lane_memory
from actors.coordinator.loading import LoadedModel, load_model, num_threads
from actors.coordinator.report import CoordinatorReport, add_grammars
from actors.coordinator.sequence_traces import ExpertTotals, SequenceTraces
from actors.coordinator.service import GENERATE, SERVICE, ControlHooks, CoordinatorService
from actors.coordinator.submit_check import SubmitLimits
from actors.dispatch.attach import Attacher
from actors.dispatch.remote_experts import ExpertUnavailable, MapRejected, Patience, RemoteExperts
from actors.map_wire import MapRefused, refused
from actors.port_limits import COORDINATOR_PORT
from actors.tracing.opening import open_tracer
from cluster.config import ClusterConfig
from cluster.expert_map import ExpertMap
from cluster.load import LoadCounter
from cluster.microbatching import MicrobatchChooser, MicrobatchPolicy
from cluster.replica_times import seat_of
from cluster.scheduler import Scheduler
from protos.coordinator_pb2 import SnapshotReply
from protos.expert_pb2 import STATUS_DRAINING, STATUS_INVALID, STATUS_OVERLOADED

LOG = logging.getLogger(__name__)

STOP_GRACE_S = 1.0
EXPERT_WAIT_S = 10.0
OVERDUE_S = 1.0
"""A step that has taken so long may be waiting for an expert: then it is looked up and said."""

LOADING = Failure(STATUS_OVERLOADED, "the coordinator is still loading")
CUT_OFF = Failure(STATUS_DRAINING, "the coordinator shuts down, and there was no time left to finish")
DRAINING = Failure(STATUS_DRAINING, "the coordinator is draining and takes nothing new")


class Coordinator:
    """One coordinator of a cluster. Its state is loading, ready, draining or failed; `detail` says why.

    `auth_token` is the cluster's bearer token; that of `config` is not looked at. `node_id` is only reported.
    `checksums` are CRC-32Cs by canonical name, to which the weights it reads are held. Raises ClientTokenError for a
    file of client tokens that cannot be used.
    """

    def __init__(
        self,
        *,
        coordinator_id: str,
        config: ClusterConfig,
        auth_token: str,
        node_id: str = "",
        port: int = 0,
        checksums: Mapping[str, int] | None = None,
    ) -> None:
        self._config = config
        self._checksums = checksums
        self._port = port
        self._credentials = WireCredentials(
            auth_token, config.tls_cert, config.tls_key, config.tls_ca, config.tls_server_name
        )
        tokens = config.grpc_client_token_file
        self._clients = None if tokens is None else ClientTokens.load(tokens)
        self._report = CoordinatorReport(coordinator_id, node_id, config.block_size)
        self._model: LoadedModel | None = None
        self._engine: Engine | None = None
        self._experts: RemoteExperts | None = None
        self._service: CoordinatorService | None = None
        self._server: GrpcServer | None = None
        self._grammars: Grammars | None = None
        self._has_map = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._tracer = open_tracer(config, "coordinator", coordinator_id)
        self._ended = asyncio.Event()

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
            seat=seat_of(self._report.coordinator_id),
        )
        hooks = ControlHooks(
            apply_map=self._apply_map, map_epoch=self._map_epoch, snapshot=self._snapshot, drain=self.drain
        )
        service = self._service = CoordinatorService(hooks, LOADING, self._clients)
        self._server = await serve_grpc(
            service.register,
            service=SERVICE,
            host=self._config.bind_host,
            port=self._port,
            credentials=self._credentials,
            serving=False,
            clients=None if self._clients is None else ClientAccess(self._clients, frozenset({GENERATE})),
            limits=COORDINATOR_PORT,
        )
        self._report.address = self._server.address
        self._life = asyncio.create_task(self._live(self._server, service, self._experts))
        return self._server.address

    async def info(self) -> dict[str, Any]:
        """What Snapshot says, and how far loading is, as plain values under stable names."""
        return self._report.info(self._snapshot())

    async def drain(self, timeout_s: float, end_rest: bool = False) -> int:
        """Takes nothing new, waits up to `timeout_s` for what is in flight, returns the tokens that still are.

        With `end_rest` these are then told that they cannot be finished, rather than left to be cut off.
        """
        if self._report.state != "failed":
            self._report.turn("draining")
        if self._service is not None:
            self._service.close(DRAINING)
        if self._server is not None:
            await self._server.set_serving(False)
        if self._engine is None:
            return 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._engine.live.wait_for_none()
        left = self._engine.live.inflight_tokens
        if end_rest and left:
            LOG.warning("%d requests were not done within %g s and are ended", len(self._engine.live), timeout_s)
            self._engine.fail_all(CUT_OFF)
        return left

    async def ended(self) -> None:
        """Returns when it is stopped. To whoever waits here, the end of the process is an error at once."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Ends loading, computing and serving; whoever still waits is told so."""
        self._ended.set()
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
        if self._grammars is not None:
            self._grammars.close()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)

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
            service.close(Failure(STATUS_DRAINING, "the coordinator failed and waits to be replaced"))
            await server.set_serving(False)

    async def _load(self) -> LoadedModel:
        """In a thread that ends with its work, so that its compute pool does not outlive it."""
        self._report.detail = "reading weights"
        pool = ThreadPoolExecutor(1, "load")
        try:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(pool, load_model, self._config, self._report.progress, self._checksums)
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
        load = LoadCounter(
            model.config.num_layers, model.config.num_experts, divisible_rows=lambda: experts.divisible_rows
        )
        driver = ForwardDriver(model.backbone, model.kv, experts, load, _microbatches(self._config))
        return Engine(
            driver=driver,
            scheduler=Scheduler(model.scheduler_config, model.kv.num_blocks),
            eos_token_ids=model.eos_token_ids,
            sink=service.deliver,
            alarms=lambda: experts.alarms,
            traces=SequenceTraces(
                self._tracer,
                model=self._config.served_model_name or Path(self._config.model).resolve().name,
                totals=partial(_expert_totals, driver, experts),
            ),
        )

    def _open(self, engine: Engine, model: LoadedModel, service: CoordinatorService) -> None:
        limits = SubmitLimits(
            vocab_size=model.config.vocab_size,
            max_model_len=engine.scheduler.max_model_len,
            request_timeout_s=self._config.request_timeout_s,
            routed_experts=self._config.enable_return_routed_experts,
        )
        self._grammars = None if model.vocabulary is None else Grammars(model.vocabulary)
        service.open(engine, limits, self._grammars)
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
            raise refused(str(error), new, self._map_epoch()) from None
        self._has_map.set()

    def _map_epoch(self) -> int:
        current = None if self._experts is None else self._experts.expert_map
        return 0 if current is None else current.epoch

    def _snapshot(self) -> SnapshotReply:
        stats = None if self._experts is None else self._experts.stats
        standings, times = ((), ()) if self._experts is None else (self._experts.standings(), self._experts.times())
        reply = self._report.snapshot(
            self._model, self._engine, self._map_epoch(), stats, standings, self._waiting_for(), times
        )
        if self._grammars is not None:
            add_grammars(reply, self._grammars)
        return reply

    def _waiting_for(self) -> str:
        """Which expert the steps wait for, and why; empty while all goes well."""
        if self._engine is None or self._experts is None:
            return ""
        if not self._engine.waiting_for and self._engine.step_age_s < OVERDUE_S:
            return ""
        return self._experts.lacking() or self._engine.waiting_for


def _expert_totals(driver: ForwardDriver, experts: RemoteExperts) -> ExpertTotals:
    stats = experts.stats
    return ExpertTotals(
        messages=stats.calls,
        retries=stats.retries,
        wait_s=driver.expert_wait_s,
        compute_s=stats.compute_us / 1e6,
        queue_s=stats.queue_us / 1e6,
    )


def _microbatches(config: ClusterConfig) -> MicrobatchChooser:
    """As many as configured, else as many as turn out to be fastest."""
    if config.microbatches is None:
        return MicrobatchChooser()
    return MicrobatchChooser(MicrobatchPolicy(choices=(config.microbatches,), min_tokens=config.microbatches))
