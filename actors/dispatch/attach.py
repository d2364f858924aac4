"""Agrees with a replica on how to talk: is it the one the map means, is it ready, does it share this machine?

`Attach` answers when the replica is ready and offers the same-node lane to a coordinator that says it is on the same
machine. A lane that is offered and cannot be opened is no misfortune: gRPC is the fallback, always, unless the
operator has forced the lane.
"""

import asyncio
import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from actors.channels import ChannelError, WireCredentials, open_channel
from actors.dispatch.grpc_transport import METHOD, GrpcTransport, said
from actors.dispatch.lane_transport import LaneMemory
from actors.dispatch.transport import ExpertTransport, TransportError, WireCounters
from actors.machine import machine_id
from cluster.expert_map import ReplicaInfo
from protos import expert_pb2 as pb

LOG = logging.getLogger(__name__)

NUM_CHANNELS = 3
"""Connections to a replica over gRPC: one for small messages, the others for large ones."""

_INFO_TIMEOUT_S = 5.0
_LANE_TIMEOUT_S = 30.0  # a replica says welcome between two jobs; over gRPC rows would wait for the same job


@dataclass(frozen=True, slots=True)
class Attacher:
    """An `OpenTransport`. Without `lanes`, gRPC is used; with `lane_only`, nothing but the lane is."""

    credentials: WireCredentials
    lanes: LaneMemory | None = None
    lane_only: bool = False

    async def __call__(self, replica: ReplicaInfo, counters: WireCounters, timeout_s: float) -> ExpertTransport:
        """See OpenTransport."""
        channel = None
        try:
            channel = open_channel(replica.address, self.credentials)
            return await self._connect(channel, replica, counters, timeout_s)
        except BaseException as error:
            if channel is not None:
                await channel.close()
            if isinstance(error, grpc.aio.AioRpcError):
                raise TransportError(f"{replica.address}: {said(error)}") from None
            if isinstance(error, ChannelError | TransportError):
                raise TransportError(f"{replica.address}: {error}") from None
            raise

    async def _connect(
        self, channel: grpc.aio.Channel, replica: ReplicaInfo, counters: WireCounters, timeout_s: float
    ) -> ExpertTransport:
        agreed, incarnation = await self._agree(channel, replica, timeout_s)
        if agreed.lane == "shm" and self.lanes is not None:
            try:
                lane = await self.lanes.connect(
                    replica.replica_id, agreed.endpoint, agreed.ticket, counters, _LANE_TIMEOUT_S
                )
                lane.incarnation = incarnation
                lane.guard(partial(_watch, channel), channel.close)
                return lane
            except TransportError as error:
                LOG.warning("%s; falling back to gRPC", error)
                if self.lane_only:
                    raise
        if self.lane_only:
            raise TransportError("no same-node lane with this replica, and transport is shm")
        transport = await self._open_streams(channel, replica, counters, timeout_s)
        transport.incarnation = incarnation
        return transport

    async def _agree(
        self, channel: grpc.aio.Channel, replica: ReplicaInfo, timeout_s: float
    ) -> tuple[pb.AttachReply, str]:
        """What Attach answers, which is when the replica is ready, and which process it is.

        Raises TransportError for one that the map does not mean.
        """
        attach: Any = channel.unary_unary(
            METHOD + "Attach", pb.AttachRequest.SerializeToString, pb.AttachReply.FromString
        )
        about: Any = channel.unary_unary(METHOD + "Info", pb.InfoRequest.SerializeToString, pb.InfoReply.FromString)
        known = ("grpc",) if self.lanes is None else ("shm", "grpc")
        wanted = pb.AttachRequest(machine_id=machine_id(), lanes=known)
        agreed: pb.AttachReply = await attach(wanted, timeout=timeout_s, wait_for_ready=True)
        if agreed.lane not in known:
            raise TransportError(f"offers lane {agreed.lane!r}, known here: {', '.join(known)}")
        info = await about(pb.InfoRequest(), timeout=_INFO_TIMEOUT_S)
        for name in ("replica_id", "numerics_domain"):
            meant, found = getattr(replica, name), getattr(info, name)
            if meant != found:
                raise TransportError(f"{name} is {found!r}, the map says {meant!r}")
        return agreed, f"{info.pid}@{info.node_id}/{replica.address}"

    async def _open_streams(
        self, channel: grpc.aio.Channel, replica: ReplicaInfo, counters: WireCounters, timeout_s: float
    ) -> GrpcTransport:
        more = [open_channel(replica.address, self.credentials) for _ in range(NUM_CHANNELS - 1)]
        transport = GrpcTransport(replica.replica_id, (channel, *more), counters)
        try:
            await transport.open(timeout_s)
        except BaseException:
            await asyncio.gather(*(one.close() for one in more))
            raise
        return transport


async def _watch(channel: grpc.aio.Channel) -> str:
    """Returns when the replica's process is gone or does not answer pings: the channel's keep-alive tells."""
    try:
        watch: Any = channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        async for _ in watch(health_pb2.HealthCheckRequest()):
            pass
        return "the replica ended its health watch"
    except grpc.aio.AioRpcError as error:
        return said(error)
