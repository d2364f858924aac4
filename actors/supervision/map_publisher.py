"""Gives every coordinator that lags behind the newest expert map, over gRPC.

Which map is the newest is decided in `cluster.reconcile`; a coordinator swaps it between two steps.
"""

import asyncio
import logging
from collections.abc import Iterable

import grpc

from actors.channels import WireCredentials, open_channel
from actors.map_wire import map_to_wire
from actors.supervision.member import View
from cluster.expert_map import ExpertMap
from protos.coordinator_pb2_grpc import CoordinatorServiceStub
from protos.expert_pb2 import STATUS_OK

LOG = logging.getLogger(__name__)

PUBLISH_TIMEOUT_S = 5.0
ROUND_WAIT_S = 0.5
"""How long a round waits for coordinators to take a map. A slower one still gets it, and holds nobody up."""


class MapPublisher:
    """Keeps one channel to each coordinator address."""

    def __init__(self, credentials: WireCredentials) -> None:
        self._credentials = credentials
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._sending: dict[str, asyncio.Task[None]] = {}

    async def publish(self, expert_map: ExpertMap, coordinators: Iterable[View]) -> None:
        """Sends a complete map to every living coordinator whose epoch is older; a failure is tried again later.

        A map that lacks an expert is nobody's use: until it is whole, coordinators keep the one they have.
        """
        epochs = {
            str(view.info["address"]): int(view.info["map_epoch"])
            for view in coordinators
            if view.info is not None and view.dead is None and view.info["address"]
        }
        for gone in self._channels.keys() - epochs.keys():
            await self._channels.pop(gone).close()
        if expert_map.missing():
            return
        self._sending = {address: task for address, task in self._sending.items() if not task.done()}
        for address, epoch in epochs.items():
            if epoch < expert_map.epoch and address not in self._sending:
                self._sending[address] = asyncio.create_task(self._send(address, expert_map))
        if self._sending:
            await asyncio.wait(self._sending.values(), timeout=ROUND_WAIT_S)

    async def close(self) -> None:
        """Closes all channels."""
        for task in self._sending.values():
            task.cancel()
        await asyncio.gather(*self._sending.values(), return_exceptions=True)
        channels, self._channels = self._channels, {}
        await asyncio.gather(*(channel.close() for channel in channels.values()))

    async def _send(self, address: str, expert_map: ExpertMap) -> None:
        if address not in self._channels:
            self._channels[address] = open_channel(address, self._credentials)
        stub = CoordinatorServiceStub(self._channels[address])  # type: ignore[no-untyped-call]  # generated
        try:
            reply = await stub.PublishMap(map_to_wire(expert_map), timeout=PUBLISH_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            LOG.warning("map epoch %d did not reach %s: %s", expert_map.epoch, address, error.details())
            channel = self._channels.pop(address, None)
            if channel is not None:
                await channel.close()
            return
        if reply.status != STATUS_OK:
            LOG.warning("%s refused map epoch %d: %s", address, expert_map.epoch, reply.detail)
