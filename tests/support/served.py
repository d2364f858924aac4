"""A coordinator's service over real gRPC on loopback, with a real engine behind it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from actors.channels import GrpcServer, WireCredentials, open_channel, serve_grpc
from actors.coordinator.engine import Engine
from actors.coordinator.engine_io import Failure
from actors.coordinator.grammars import Grammars
from actors.coordinator.service import SERVICE, ControlHooks, CoordinatorService
from actors.coordinator.submit_check import SubmitLimits
from actors.map_wire import MapRefused
from cluster.expert_map import ExpertMap
from protos.coordinator_pb2 import Cancel, GenerateRequest, Sampling, SequenceOutput, SnapshotReply, Submit
from protos.coordinator_pb2_grpc import CoordinatorServiceStub
from protos.expert_pb2 import STATUS_OVERLOADED, STATUS_STALE_EPOCH
from tests.support.engines import TinyModel, make_engine, running

CREDENTIALS = WireCredentials("a-token-for-tests-only")
CLOSED = Failure(STATUS_OVERLOADED, "not open yet")


@dataclass
class Served:
    """`service` is open for `engine`; `maps` are those published."""

    service: CoordinatorService
    engine: Engine
    server: GrpcServer
    maps: list[ExpertMap] = field(default_factory=list)

    @property
    def address(self) -> str:
        return self.server.address


@contextlib.asynccontextmanager
async def served(
    model: TinyModel,
    *,
    port: int = 0,
    routed_experts: bool = False,
    grammars: Grammars | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Serves until the block ends, then audits the engine's books."""
    maps: list[ExpertMap] = []

    def apply(new: ExpertMap) -> None:
        if maps and new.epoch <= maps[-1].epoch:
            raise MapRefused(STATUS_STALE_EPOCH, "older")
        maps.append(new)

    async def drain(timeout_s: float) -> int:
        service.close(Failure(STATUS_OVERLOADED, "draining"))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.live.wait_for_none(), timeout_s)
        return engine.live.inflight_tokens

    hooks = ControlHooks(
        apply_map=apply,
        map_epoch=lambda: maps[-1].epoch if maps else 0,
        snapshot=lambda: SnapshotReply(coordinator_id="coordinator-0", state="ready"),
        drain=drain,
    )
    service = CoordinatorService(hooks, CLOSED)
    engine = make_engine(model, service.deliver, **settings)
    limits = SubmitLimits(
        vocab_size=model.backbone.config.vocab_size,
        max_model_len=engine.scheduler.max_model_len,
        request_timeout_s=600.0,
        routed_experts=routed_experts,
    )
    server = await serve_grpc(service.register, service=SERVICE, host="127.0.0.1", port=port, credentials=CREDENTIALS)
    service.open(engine, limits, grammars)
    try:
        async with running(engine):
            yield Served(service, engine, server, maps)
            await server.stop(0)
    finally:
        await server.stop(0)


def submit(request_id: int, prompt: list[int], max_tokens: int = 4, **fields: Any) -> Submit:
    """A greedy request that does not stop early."""
    sampling = Sampling(top_p=1.0, repetition_penalty=1.0)
    defaults: dict[str, Any] = {"sampling": sampling, "ignore_eos": True}
    return Submit(request_id=request_id, prompt_token_ids=prompt, max_tokens=max_tokens, **{**defaults, **fields})


class RawStream:
    """A Generate stream without a client's manners, to see what is said message by message."""

    def __init__(self, address: str, credentials: WireCredentials = CREDENTIALS) -> None:
        self._channel = open_channel(address, credentials)
        self.stub: Any = CoordinatorServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self.call: Any = self.stub.Generate()
        self.told: dict[int, list[SequenceOutput]] = {}
        self.num_replies = 0

    async def send(self, *messages: Submit | Cancel) -> None:
        for message in messages:
            if isinstance(message, Submit):
                await self.call.write(GenerateRequest(submit=message))
            else:
                await self.call.write(GenerateRequest(cancel=message))

    async def read(self) -> list[SequenceOutput]:
        """The next reply's outputs. Raises AioRpcError, or EOFError at a good end."""
        reply = await asyncio.wait_for(self.call.read(), 120)
        if not hasattr(reply, "outputs"):
            raise EOFError
        self.num_replies += 1
        for output in reply.outputs:
            self.told.setdefault(output.request_id, []).append(output)
        return list(reply.outputs)

    async def read_until_done(self, *request_ids: int) -> None:
        while not all(self.last(one) is not None for one in request_ids):
            await self.read()

    def last(self, request_id: int) -> SequenceOutput | None:
        """The output that ended the request."""
        return next((one for one in self.told.get(request_id, []) if one.finish_reason), None)

    def tokens(self, request_id: int) -> list[int]:
        return [token for one in self.told.get(request_id, []) for token in one.token_ids]

    async def close(self) -> None:
        self.call.cancel()
        await self._channel.close()


@contextlib.asynccontextmanager
async def raw_stream(address: str) -> AsyncIterator[RawStream]:
    stream = RawStream(address)
    try:
        yield stream
    finally:
        await stream.close()
