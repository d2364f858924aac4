"""FetchColumn: gives another replica the weights that this one holds, as they are stored, in small pieces.

They are read from this replica's own checkpoint, not from its memory: packed weights cannot be turned back, and what
is stored is what checksums are of. So the receiver packs what it would have packed from a disk of its own. Giving never
has the compute thread's time, and the rest of the machine only between two pieces: while rows are in flight a piece
waits for them a little, and while this replica is busy its pieces keep to a rate. Receiving is
`actors.expert.fetching`'s.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import grpc
import torch

from actors.expert.desk import Refused
from actors.expert.replica import ExpertReplica, state_name
from cluster.throttle import Throttle, ThrottleState, begin, take
from model.storage.checkpoint import Checkpoint, CheckpointError
from model.storage.safetensors_file import read_into
from model.storage.safetensors_header import StoredTensor
from model.storage.torch_dtypes import to_torch
from model.tensor_checksum import tensor_checksum
from protos import expert_pb2 as pb
from protos.pieces import PIECE_BYTES, Piece, encode_no_piece, encode_piece
from protos.weight_parts import PARTS

LOG = logging.getLogger(__name__)

MAX_RECEIVERS = 8
"""Who comes when so many are being given to is told OVERLOADED."""

WRITE_S = 60.0
"""A receiver that takes no piece for so long is given up; one that is throttled may need a while."""

YIELD_S = 0.05
"""So long at most a piece waits for rows in flight."""

BUSY_THROTTLE = Throttle(bytes_per_s=64 << 20, burst_bytes=PIECE_BYTES)
"""All pieces together, while this replica computes for others."""

Context: TypeAlias = "grpc.aio.ServicerContext[pb.FetchColumnRequest, bytes]"


@dataclass(slots=True)
class _Weight:
    layer: int
    expert: int
    part: str
    name: str
    stored: StoredTensor
    start: int
    """Where in the file."""
    nbytes: int
    shape: tuple[int, int]
    crc: int = 0
    """Of what was read so far."""


class ColumnGiver:
    """One replica's. `checkpoint` is set once it is open; without one, nothing can be given."""

    def __init__(self, replica: ExpertReplica, clock: Callable[[], float] = time.monotonic) -> None:
        self.checkpoint: Checkpoint | None = None
        self.receivers = 0
        self._replica = replica
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()
        self._idle = asyncio.Event()
        self._tokens_seen = 0
        self._throttle: ThrottleState = begin(BUSY_THROTTLE, clock())

    async def give(self, request: pb.FetchColumnRequest, context: Context) -> None:
        """Answers one call: all pieces, or as many as could be given and why there are no more."""
        self.receivers += 1
        try:
            if self.receivers > MAX_RECEIVERS:
                raise Refused(pb.STATUS_OVERLOADED, f"{MAX_RECEIVERS} replicas are being given weights already")
            for weight in self._weights(request):
                await self._give_weight(weight, context)
        except Refused as error:
            LOG.warning("%s gives no weights: %s", self._replica.replica_id, error.detail)
            await context.write(encode_no_piece(error.status, error.detail))
        finally:
            self.receivers -= 1

    def _weights(self, request: pb.FetchColumnRequest) -> Iterator[_Weight]:
        """What was asked for, in order; checked before the first, and that it is still held before each."""
        expert, layers = request.expert_id, range(request.first_layer, request.first_layer + request.num_layers)
        checkpoint = self.checkpoint
        if checkpoint is None:
            raise Refused(pb.STATUS_NOT_HELD, "this replica has no checkpoint of its own to give weights from")
        config = checkpoint.config
        if not 0 <= expert < config.num_experts or not layers or layers.stop > config.num_layers:
            raise Refused(
                pb.STATUS_INVALID,
                f"expert_id {expert}, layers {layers.start} + {len(layers)}: expected an expert below "
                f"{config.num_experts}, and at least one layer, all below {config.num_layers}",
            )
        self._check_held(expert, layers)
        for layer in layers:
            for part in PARTS:
                self._check_held(expert, range(layer, layer + 1))
                name = f"layers.{layer}.experts.{expert}.{part}"
                stored, first, nbytes = checkpoint.stored(name)
                rows, columns = checkpoint.shape(name)
                yield _Weight(layer, expert, part, name, stored, stored.start + first, nbytes, (rows, columns))

    def _check_held(self, expert: int, layers: range) -> None:
        replica = self._replica
        if replica.state == pb.REPLICA_STATE_DRAINING:
            raise Refused(pb.STATUS_DRAINING, "this replica is draining")
        if replica.state == pb.REPLICA_STATE_FAILED:
            raise Refused(pb.STATUS_NOT_HELD, f"this replica is {state_name(replica.state)}")
        missing = next((layer for layer in layers if replica.find(layer, expert) is None), None)
        if missing is not None:
            raise Refused(pb.STATUS_NOT_HELD, f"this replica does not hold expert {expert} in layer {missing}")

    async def _give_weight(self, weight: _Weight, context: Context) -> None:
        staging = torch.empty(min(PIECE_BYTES, weight.nbytes), dtype=torch.uint8)
        for offset in range(0, weight.nbytes, PIECE_BYTES):
            async with self._turn:
                await self._give_way(min(PIECE_BYTES, weight.nbytes - offset))
                data = await asyncio.to_thread(self._piece, weight, offset, staging)
            await self._write(context, data)

    async def _write(self, context: Context, data: bytes) -> None:
        try:
            async with asyncio.timeout(WRITE_S):
                await context.write(data)
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no piece was taken for {WRITE_S:g} s")

    def _piece(self, weight: _Weight, offset: int, staging: torch.Tensor) -> bytes:
        """In a thread beside the event loop. Raises Refused where the file is not what it was."""
        part = staging[: weight.nbytes - offset]
        try:
            read_into(weight.stored.path, weight.start + offset, part)
        except CheckpointError as error:
            raise Refused(pb.STATUS_INTERNAL, str(error)) from None
        weight.crc = tensor_checksum(part, weight.crc)
        is_last = offset + len(part) == weight.nbytes
        expected = None if self.checkpoint is None else self.checkpoint.checksums.get(weight.name)
        if is_last and expected not in (None, weight.crc):
            where = f"{weight.stored.path}: {weight.name}"
            raise Refused(pb.STATUS_CORRUPT, f"{where} is damaged: CRC-32C {weight.crc:08x}, not {expected:08x}")
        return encode_piece(
            Piece(
                weight.layer,
                weight.expert,
                weight.part,
                to_torch(weight.stored.dtype),
                weight.shape,
                offset,
                part,
                weight.crc if is_last else 0,
            )
        )

    async def _give_way(self, num_bytes: int) -> None:
        """Returns when the next piece may take the machine's time."""
        replica, now_s = self._replica, self._clock()
        tokens = replica.counters.tokens_total
        busy = tokens != self._tokens_seen or replica.inflight_tokens > 0
        self._tokens_seen = tokens
        wait_s, self._throttle = take(BUSY_THROTTLE, self._throttle, num_bytes, now_s)
        if not busy:
            self._throttle = begin(BUSY_THROTTLE, now_s)
            return
        if wait_s:
            await asyncio.sleep(wait_s)
        if replica.inflight_tokens > 0:
            await self._until_idle()

    async def _until_idle(self) -> None:
        """Until the last row in flight is answered, or for `YIELD_S`: a replica that is never idle gives, too."""
        self._idle.clear()
        told = self._note_idle
        self._replica.on_idle += (told,)
        try:
            if self._replica.inflight_tokens > 0:
                async with asyncio.timeout(YIELD_S):
                    await self._idle.wait()
        except TimeoutError:
            pass
        finally:
            self._replica.on_idle = tuple(one for one in self._replica.on_idle if one is not told)

    def _note_idle(self) -> None:
        """In any thread."""
        self._loop.call_soon_threadsafe(self._idle.set)
