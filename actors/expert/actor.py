"""ExpertActor: one process that holds one or more expert columns and serves them over gRPC.

It is a plain class with async methods: Ray makes an actor of it (`actors.ray_runtime`), a test just calls it.
It loads weights and keeps the life cycle; answering peers is `actors.expert.service`'s, arithmetic
`model.experts`'s. Its port is bound before the weights are read, so that a peer can wait there and a probe
can watch.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from actors.channels import GrpcServer, WireCredentials, serve_grpc
from actors.expert.compute_thread import ComputeThread
from actors.expert.desk import Desk
from actors.expert.lane_server import LaneServer
from actors.expert.replica import ExpertReplica, state_name
from actors.expert.service import SERVICE, ExpertService, LoadError
from model.experts import Calibrations, ExpertColumn
from model.kernels import default_kernel
from model.memory import collapse_into_huge_pages
from model.storage.checkpoint import Checkpoint, Expert
from protos.expert_pb2 import REPLICA_STATE_FAILED, REPLICA_STATE_READY

LOG = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0


class ExpertActor:
    """Every argument is plain and picklable. `start` binds and begins to load; `info` tells how far it is.

    `expert_ids` are the columns it holds, each for layers `first_layer` .. `first_layer + num_layers - 1`;
    `kernel` may be "auto", `device` is what torch calls it. `port` 0 takes a free one. `max_queue_tokens`
    bounds the rows that wait and are computed. `min_map_epoch` refuses senders whose map is older. Without `lane`
    rows come by gRPC only.
    """

    def __init__(
        self,
        *,
        replica_id: str,
        expert_ids: Sequence[int],
        first_layer: int,
        num_layers: int,
        model: str,
        kernel: str,
        device: str,
        auth_token: str,
        bind_host: str = "127.0.0.1",
        port: int = 0,
        node_id: str = "",
        tls_cert: str | None = None,
        tls_key: str | None = None,
        tls_ca: str | None = None,
        threads: int = 1,
        max_queue_tokens: int = 16_384,
        min_map_epoch: int = 0,
        lane: bool = True,
    ) -> None:
        _check(replica_id, expert_ids, first_layer, num_layers, max_queue_tokens)
        layers = range(first_layer, first_layer + num_layers)
        self._replica = ExpertReplica(replica_id, tuple(expert_ids), layers, node_id=node_id)
        self._model = model
        self._kernel = kernel
        self._device = torch.device(device)
        self._threads = threads
        self._bind = (bind_host, port)
        self._credentials = WireCredentials(auth_token, tls_cert, tls_key, tls_ca)
        self._max_queue_tokens = max_queue_tokens
        self._min_map_epoch = min_map_epoch
        self._compute = ComputeThread(replica_id, threads)
        self._checkpoint: Checkpoint | None = None
        self._calibrated: Calibrations = {}
        self._lane = lane
        self._lanes: LaneServer | None = None
        self._service: ExpertService | None = None
        self._server: GrpcServer | None = None
        self._loading: asyncio.Task[None] | None = None
        self._load_lock = asyncio.Lock()
        self._stopping = False

    async def start(self) -> str:
        """Binds the port, begins to load, and returns `host:port` without waiting for the weights.

        Raises ChannelError when the address cannot be bound. What goes wrong with the weights shows in
        `info`.
        """
        if self._server is not None:
            return self._server.address
        desk = Desk(self._replica, max_queue_tokens=self._max_queue_tokens, min_map_epoch=self._min_map_epoch)
        if self._lane:
            self._lanes = LaneServer(desk, self._compute)
        self._service = ExpertService(desk, self._compute, self._load_column, self._lanes)
        host, port = self._bind
        self._server = await serve_grpc(
            self._service.register,
            service=SERVICE,
            host=host,
            port=port,
            credentials=self._credentials,
            serving=False,
        )
        self._replica.address = self._server.address
        if self._lanes is not None:
            self._lanes.watch()
        self._compute.start()
        self._loading = asyncio.create_task(self._load_all(self._server))
        return self._server.address

    async def wait_settled(self) -> dict[str, Any]:
        """Returns `info` once the replica is ready, or has failed and says why in `detail`."""
        await self._replica.settled.wait()
        return await self.info()

    async def info(self) -> dict[str, Any]:
        """What InfoReply says, plus counters and loading progress, as plain values under stable names."""
        about = self._replica.describe()
        facts: dict[str, Any] = {entry.name: getattr(about, entry.name) for entry in about.DESCRIPTOR.fields}
        facts["expert_ids"] = list(about.expert_ids)
        facts["state"] = state_name(about.state)
        progress = asdict(self._replica.progress)
        facts["load_s"] = progress.pop("seconds")
        return facts | progress | asdict(self._replica.counters) | {"threads": self._threads}

    async def drain(self, timeout_s: float) -> int:
        """Takes nothing new; returns the tokens that are still in flight after at most `timeout_s`."""
        if self._service is None or self._server is None:
            return 0
        await self._server.set_serving(False)
        return await self._service.drain(timeout_s)

    async def stop(self) -> None:
        """Ends loading, serving and computing. Streams are cut, so peers know at once."""
        if self._server is None:
            return
        self._stopping = True
        await self._server.stop(_STOP_GRACE_S if self._replica.inflight_tokens else 0.0)
        await self._compute.stop()
        if self._lanes is not None:
            self._lanes.close()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    async def _load_all(self, server: GrpcServer) -> None:
        """Reads every assigned column in the compute thread; the replica settles whatever happens."""
        started_s = time.monotonic()
        try:
            self._checkpoint = await asyncio.to_thread(Checkpoint.open, Path(self._model))
            self._check_assignment(self._checkpoint)
            self._replica.hidden_size = self._checkpoint.config.hidden_size
            self._replica.progress.bytes_total = sum(
                _column_bytes(self._checkpoint, expert, self._replica.layers) for expert in self._replica.experts
            )
            for expert in self._replica.experts:
                load = self._loader(self._checkpoint, expert, self._replica.layers)
                self._replica.add(expert, await self._compute.call(load))
            if self._device.type == "cpu":
                LOG.info("%d MiB in huge pages", await self._compute.call(collapse_into_huge_pages) >> 20)
        except Exception as error:  # whatever it is: who waits for this replica must be told
            LOG.exception("%s cannot load", self._replica.replica_id)
            self._replica.settle(REPLICA_STATE_FAILED, f"{type(error).__name__}: {error}")
            return
        self._replica.progress.seconds = time.monotonic() - started_s
        self._replica.settle(REPLICA_STATE_READY)
        await server.set_serving(self._replica.state == REPLICA_STATE_READY)

    async def _load_column(self, expert: int, layers: range) -> int:
        """For LoadColumn: one at a time, in a thread of its own so that serving goes on. Raises LoadError."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise LoadError("nothing is loaded yet")
        _check_range(checkpoint, expert, layers)
        async with self._load_lock:
            if self._replica.holds(expert, layers):
                return 0
            loader = ComputeThread(f"{self._replica.replica_id}-load", self._threads)
            loader.start()
            try:
                column = await loader.call(self._loader(checkpoint, expert, layers))
            except Exception as error:
                LOG.exception("%s cannot load expert %d", self._replica.replica_id, expert)
                raise LoadError(f"{type(error).__name__}: {error}") from error
            finally:
                await loader.stop()
            self._replica.add(expert, column)
            return column.weight_bytes

    def _loader(self, checkpoint: Checkpoint, expert: int, layers: range) -> Callable[[], ExpertColumn]:
        device = self._device
        kernel = default_kernel(checkpoint.dtype, device) if self._kernel == "auto" else self._kernel

        def note(name: str, _nbytes: int) -> None:
            if self._stopping:
                raise LoadError("stopped while loading")
            self._replica.progress.bytes_loaded += checkpoint.nbytes(name)

        def load() -> ExpertColumn:
            return ExpertColumn.load(checkpoint, expert, layers, kernel, device, note, self._calibrated)

        return load

    def _check_assignment(self, checkpoint: Checkpoint) -> None:
        for expert in self._replica.experts:
            _check_range(checkpoint, expert, self._replica.layers)


def _check(
    replica_id: str, expert_ids: Sequence[int], first_layer: int, num_layers: int, max_queue_tokens: int
) -> None:
    if not replica_id:
        raise ValueError("replica_id must not be empty")
    if not expert_ids or len(set(expert_ids)) != len(expert_ids) or min(expert_ids) < 0:
        raise ValueError(f"expert_ids is {list(expert_ids)}, expected distinct ids from 0, at least one")
    if first_layer < 0 or num_layers < 1:
        raise ValueError(f"layers {first_layer} + {num_layers}: expected first_layer >= 0 and num_layers >= 1")
    if max_queue_tokens < 1:
        raise ValueError(f"max_queue_tokens is {max_queue_tokens}, expected at least 1")


def _check_range(checkpoint: Checkpoint, expert: int, layers: range) -> None:
    config = checkpoint.config
    if not 0 <= expert < config.num_experts:
        raise LoadError(f"expert {expert} does not exist: the model has {config.num_experts}")
    if not layers or layers.start < 0 or layers.stop > config.num_layers:
        raise LoadError(f"layers {layers.start}..{layers.stop - 1} are not within 0..{config.num_layers - 1}")


def _column_bytes(checkpoint: Checkpoint, expert: int, layers: range) -> int:
    prefixes = tuple(f"layers.{layer}." for layer in layers)
    return sum(checkpoint.nbytes(name) for name in checkpoint.names(Expert(expert)) if name.startswith(prefixes))
