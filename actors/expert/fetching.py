"""Fetches weights from another replica: a source that packing reads, tensor after tensor, as it does from a disk.

Nothing is believed: a piece must be the one that comes next, of the right shape, undamaged; all pieces of a weight
together must have the checksum that the weight should have. Never more than one piece is held beside the tensor that is
filled: the next one is asked for when it is needed, so that a receiver that waits holds its sender back. What follows
when a peer fails is `actors.expert.loading`'s, the other end `actors.expert.giving`'s.

The calls live in the event loop, reading happens in the thread that loads.
"""

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError
from typing import Any

import grpc
import torch

from actors.channels import WireCredentials, open_channel
from actors.expert.model_facts import ModelFacts
from model.tensor_checksum import tensor_checksum
from protos import expert_pb2 as pb
from protos.codec import CodecError
from protos.pieces import Piece, PieceRefused, split_piece

PIECE_S = 10.0
"""A peer that sends no piece for so long, while one is waited for, has failed."""

MAX_STRIKES = 3
"""Whoever failed so often is not asked again."""

_METHOD = "/octavo.ExpertService/FetchColumn"
_ONLY_LATER = (pb.STATUS_NOT_HELD, pb.STATUS_OVERLOADED, pb.STATUS_DRAINING)


class PeerError(Exception):
    """A peer gave no weights, or wrong ones; the message says whose fault it seems.

    `is_fault` is false where a peer said in good order that it has nothing to give.
    """

    def __init__(self, address: str, detail: str, *, is_fault: bool = True) -> None:
        super().__init__(f"{address}: {detail}")
        self.is_fault = is_fault


class Peer:
    """Another replica at `address`. Make and close it in the event loop; `fetch` is for another thread."""

    def __init__(self, address: str, credentials: WireCredentials, *, piece_s: float = PIECE_S) -> None:
        self.address = address
        self.strikes = 0
        self._piece_s = piece_s
        self._loop = asyncio.get_running_loop()
        self._channel = open_channel(address, credentials)

    def fetch(self, expert: int, layer: int) -> "PieceStream":
        """The weights of one expert in one layer, to be closed."""
        request = pb.FetchColumnRequest(expert_id=expert, first_layer=layer, num_layers=1)
        fetch: Any = self._channel.unary_stream(_METHOD, pb.FetchColumnRequest.SerializeToString)
        return PieceStream(self.address, self._loop, lambda: fetch(request), self._piece_s)

    async def close(self) -> None:
        """Whoever waits for a piece gets an error."""
        await self._channel.close()


class PieceStream:
    """The pieces of one call, which begins with the first. From one thread beside the event loop."""

    def __init__(
        self, address: str, loop: asyncio.AbstractEventLoop, begin: Callable[[], Any], piece_s: float = PIECE_S
    ) -> None:
        self.address = address
        self._loop = loop
        self._begin = begin
        self._piece_s = piece_s
        self._call: Any = None

    def next(self) -> Piece:
        """The next piece, undamaged. Raises PeerError."""
        waiting = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        try:
            data = waiting.result()
            return split_piece(data)
        except PieceRefused as refused:
            detail = f"{pb.Status.Name(refused.status)}: {refused}"
            raise PeerError(self.address, detail, is_fault=refused.status not in _ONLY_LATER) from None
        except CodecError as error:
            raise PeerError(self.address, f"{pb.Status.Name(error.status)}: {error.detail}") from None
        except TimeoutError:
            raise PeerError(self.address, f"sent nothing for {self._piece_s:g} s") from None
        except (CancelledError, grpc.aio.UsageError):
            raise PeerError(self.address, "the call was cancelled, or its channel closed") from None
        except grpc.aio.AioRpcError as error:
            raise PeerError(self.address, f"{error.code().name}: {error.details()}") from None

    def close(self) -> None:
        """Ends the call: the peer sends nothing more."""
        if self._call is not None:
            self._loop.call_soon_threadsafe(self._call.cancel)

    async def _read(self) -> bytes:
        if self._call is None:
            self._call = self._begin()
        async with asyncio.timeout(self._piece_s):
            data: object = await self._call.read()
        if not isinstance(data, bytes):  # grpc.aio.EOF
            raise PeerError(self.address, "ended before all was sent")
        return data


class PeerWeights:
    """One expert's weights in one layer, from a peer; read them in the order in which they are sent (w1, w3, w2).

    `checksums` are CRC-32Cs of weights by canonical name; where one is missing, the sender's own is held against what
    came. `on_bytes(count)` is called for every piece and may take its time.
    """

    def __init__(
        self,
        pieces: PieceStream,
        expert: int,
        layer: int,
        facts: ModelFacts,
        checksums: Mapping[str, int],
        on_bytes: Callable[[int], None],
    ) -> None:
        self.received_bytes = 0
        self._pieces = pieces
        self._prefix = f"layers.{layer}.experts.{expert}."
        self._identity = (layer, expert)
        self._facts = facts
        self._checksums = checksums
        self._on_bytes = on_bytes

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """The tensor, in `dtype` or the stored one. Raises PeerError where it is not what it should be."""
        part = name.removeprefix(self._prefix)
        piece = self._next(part, None)
        target = torch.empty(piece.shape, dtype=dtype or piece.dtype, device=device)
        flat, crc = target.view(-1), 0
        while True:
            crc = tensor_checksum(piece.elements, crc)
            elements = piece.elements.view(piece.dtype)
            first = piece.offset // piece.dtype.itemsize
            flat[first : first + len(elements)].copy_(elements)
            if piece.is_last:
                break
            piece = self._next(part, piece)
        for expected in (piece.weight_crc32, self._checksums.get(name, crc)):
            if crc != expected:
                raise self._error(f"STATUS_CORRUPT: {name} has CRC-32C {crc:08x}, it should have {expected:08x}")
        return target

    def _next(self, part: str, before: Piece | None) -> Piece:
        piece = self._pieces.next()
        offset = 0 if before is None else before.stop
        dtype = piece.dtype if before is None else before.dtype
        meant = (*self._identity, part, offset, self._facts.shape(part), dtype)
        found = (piece.layer, piece.expert, piece.part, piece.offset, piece.shape, piece.dtype)
        if found != meant:
            raise self._error(f"STATUS_INVALID: sent (layer, expert, part, offset, shape, dtype) {found}, not {meant}")
        self.received_bytes += len(piece.elements)
        self._on_bytes(len(piece.elements))
        return piece

    def _error(self, detail: str) -> PeerError:
        return PeerError(self._pieces.address, detail)
