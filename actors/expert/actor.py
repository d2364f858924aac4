"""ExpertActor: one process that holds one or more expert columns and serves them over gRPC.

It is a plain class with async methods: Ray makes an actor of it (`actors.ray_runtime`), a test just calls it.
It keeps the life cycle; how weights come to it is `actors.expert.growth`'s, answering peers
`actors.expert.service`'s, arithmetic `model.experts`'s. Its port is bound before the weights are read, so that a peer
can wait there and a probe can watch.
"""

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from actors.channels import GrpcServer, WireCredentials, serve_grpc
from actors.expert.canary import PASS_S, Canaries
from actors.expert.compute_thread import ComputeThread
from actors.expert.desk import Desk
from actors.expert.growth import Growth
from actors.expert.lane_server import TICKET_S, LaneServer
from actors.expert.model_facts import ModelFacts
from actors.expert.replica import ExpertReplica, state_name
from actors.expert.service import SERVICE, ExpertService, LoadError
from actors.port_limits import EXPERT_PORT
from protos.expert_pb2 import REPLICA_STATE_FAILED, REPLICA_STATE_READY

LOG = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0


class ExpertActor:
    """Every argument is plain and picklable. `start` binds and begins to load; `info` tells how far it is.

    `expert_ids` are the columns it holds, each for layers `first_layer` .. `first_layer + num_layers - 1`;
    `kernel` may be "auto", `device` is what torch calls it. `port` 0 takes a free one. `max_queue_tokens`
    bounds the rows that wait and are computed. `min_map_epoch` refuses senders whose map is older. Without `lane`
    rows come by gRPC only; an offer of one is good for `lane_ticket_s`. `checksums` are CRC-32Cs by canonical name, to
    which what is read is held.
    `canary_pass_s` is how long the canaries of all layers may take (see `actors.expert.canary`).

    `sources` are addresses of replicas that are asked for the weights before the disk is; with `model_facts` (see
    `actors.expert.model_facts`) they will do where there is no checkpoint. `load_bytes_per_s` bounds how fast
    weights are loaded, from wherever. A `gentle` one is added to a cluster that serves, and loads behind those that do;
    one that is missed does not.
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
        tls_server_name: str | None = None,
        threads: int = 1,
        max_queue_tokens: int = 16_384,
        min_map_epoch: int = 0,
        lane: bool = True,
        lane_ticket_s: float = TICKET_S,
        checksums: Mapping[str, int] | None = None,
        canary_pass_s: float = PASS_S,
        sources: Sequence[str] = (),
        load_bytes_per_s: int | None = None,
        model_facts: Mapping[str, Any] | None = None,
        gentle: bool = False,
    ) -> None:
        _check(replica_id, expert_ids, first_layer, num_layers, max_queue_tokens)
        layers = range(first_layer, first_layer + num_layers)
        self._replica = ExpertReplica(replica_id, tuple(expert_ids), layers, node_id=node_id)
        self._model = model
        self._threads = threads
        self._bind = (bind_host, port)
        self._credentials = WireCredentials(auth_token, tls_cert, tls_key, tls_ca, tls_server_name)
        self._max_queue_tokens = max_queue_tokens
        self._min_map_epoch = min_map_epoch
        self._compute = ComputeThread(replica_id, threads)
        canaries = Canaries(self._replica, self._compute, self._quarantine, pass_s=canary_pass_s)
        self._growth = Growth(
            self._replica,
            canaries,
            kernel=kernel,
            device=torch.device(device),
            threads=threads,
            checksums=checksums or {},
            facts=None if model_facts is None else ModelFacts.from_plain(model_facts),
            bytes_per_s=load_bytes_per_s,
            gentle=gentle,
        )
        self._sources = tuple(sources)
        self._lane = lane
        self._lane_ticket_s = lane_ticket_s
        self._lanes: LaneServer | None = None
        self._service: ExpertService | None = None
        self._server: GrpcServer | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()

    async def start(self) -> str:
        """Binds the port, begins to load, and returns `host:port` without waiting for the weights.

        Raises ChannelError when the address cannot be bound. What goes wrong with the weights shows in
        `info`.
        """
        if self._server is not None:
            return self._server.address
        self._loop = asyncio.get_running_loop()
        desk = Desk(self._replica, max_queue_tokens=self._max_queue_tokens, min_map_epoch=self._min_map_epoch)
        if self._lane:
            self._lanes = LaneServer(desk, self._compute, ticket_s=self._lane_ticket_s)
        self._service = ExpertService(desk, self._compute, self._load_column, self._lanes)
        host, port = self._bind
        self._server = await serve_grpc(
            self._service.register,
            service=SERVICE,
            host=host,
            port=port,
            credentials=self._credentials,
            serving=False,
            limits=EXPERT_PORT,
        )
        self._replica.address = self._server.address
        if self._lanes is not None:
            self._lanes.watch()
        self._compute.start()
        self._loading = asyncio.create_task(self._live(self._server, self._service))
        return self._server.address

    async def wait_settled(self) -> dict[str, Any]:
        """Returns `info` once the replica is ready, or has failed and says why in `detail`."""
        await self._replica.settled.wait()
        return await self.info()

    async def info(self) -> dict[str, Any]:
        """What InfoReply says, plus counters and loading progress, as plain values under stable names.

        `asked_experts` are those that it was started for.
        """
        about = self._replica.describe()
        facts: dict[str, Any] = {entry.name: getattr(about, entry.name) for entry in about.DESCRIPTOR.fields}
        facts["expert_ids"] = list(about.expert_ids)
        facts["asked_experts"] = list(self._replica.experts)
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

    async def ended(self) -> None:
        """Returns when it is stopped. To whoever waits here, the end of the process is an error at once."""
        await self._ended.wait()

    async def stop(self) -> None:
        """Ends loading, serving and computing. Streams are cut, so peers know at once."""
        self._ended.set()
        if self._server is None:
            return
        await self._growth.stop()
        await self._server.stop(_STOP_GRACE_S if self._replica.inflight_tokens else 0.0)
        await self._compute.stop()
        if self._lanes is not None:
            self._lanes.close()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)

    async def _live(self, server: GrpcServer, service: ExpertService) -> None:
        """Loads, and then watches over what it loaded."""
        await self._load_all(server, service)
        if self._replica.state == REPLICA_STATE_READY:
            self._growth.watch()
        if self._growth.watching is not None:
            await self._growth.watching
        if self._replica.state == REPLICA_STATE_FAILED:
            await server.set_serving(False)

    def _quarantine(self) -> None:
        """In the compute thread: the replica has failed, and everybody who waits for it hears of it."""
        if self._lanes is not None:
            self._lanes.end_all(self._replica.detail)
        if self._loop is not None and self._service is not None:
            self._loop.call_soon_threadsafe(self._service.break_off, self._replica.detail)

    async def _load_all(self, server: GrpcServer, service: ExpertService) -> None:
        """The replica settles whatever happens."""
        started_s = time.monotonic()
        replica = self._replica
        try:
            service.giver.checkpoint = await self._growth.open(self._model, self._sources, self._credentials)
            await self._growth.load(replica.experts, replica.layers)
            await self._growth.part_with_peers()
            await self._growth.tidy()
        except Exception as error:  # whatever it is: who waits for this replica must be told
            LOG.exception("%s cannot load", replica.replica_id)
            replica.settle(REPLICA_STATE_FAILED, f"{type(error).__name__}: {error}")
            return
        finally:
            await self._growth.part_with_peers()
        progress = replica.progress
        progress.seconds = time.monotonic() - started_s
        replica.settle(REPLICA_STATE_READY)
        from_peers, from_disk = progress.loaded_from_peer_bytes >> 20, progress.loaded_from_disk_bytes >> 20
        LOG.info("%s: %d MiB from peers, %d MiB from disk", replica.replica_id, from_peers, from_disk)
        await server.set_serving(replica.state == REPLICA_STATE_READY)

    async def _load_column(self, expert: int, layers: range) -> int:
        """For LoadColumn. Raises LoadError."""
        try:
            weight_bytes = await self._growth.load([expert], layers)
            await self._growth.tidy()
            return weight_bytes
        except LoadError:
            raise
        except Exception as error:
            LOG.exception("%s cannot load expert %d", self._replica.replica_id, expert)
            raise LoadError(f"{type(error).__name__}: {error}") from error


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
