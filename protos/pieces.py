"""Weights on the wire: pieces of stored tensors, each with a checksum begun from what it is a piece of.

What a piece says of itself is a claim like any other: it is checked against the piece's real size and against a limit
before anybody makes memory for the tensor. Whether it is the piece that was asked for, and whether all pieces together
are the weight that they should be, is the receiver's to know; this file makes and reads single messages.
"""

import math
import struct
from dataclasses import dataclass

import torch
from google.protobuf.message import DecodeError

from protos import frames
from protos.checksum import checksum, rows_checksum
from protos.codec import CodecError, dtype_from_wire, dtype_to_wire
from protos.expert_pb2 import (
    STATUS_CORRUPT,
    STATUS_INVALID,
    STATUS_OK,
    ColumnPiece,
    Status,
    Tensor,
)
from protos.weight_parts import PARTS

PIECE_BYTES = 1 << 20
"""The most bytes of a weight in one message."""

MAX_WEIGHT_ELEMENTS = 1 << 34
"""The largest weight that anybody may claim to have."""

_NAMES = {part: name for name, part in PARTS.items()}
_TENSOR = ColumnPiece.PIECE_FIELD_NUMBER


class PieceRefused(Exception):
    """The sender gives no (more) pieces; `status` and the message say why."""

    def __init__(self, status: Status, detail: str) -> None:
        super().__init__(detail)
        self.status = status


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Bytes `offset` .. of weight `part` (w1, w2, w3) of an expert in a layer.

    `shape` and `dtype` are the whole weight's. `elements` is flat, uint8 and in CPU memory. `weight_crc32` comes with
    the last piece: CRC-32C of all bytes of the weight.
    """

    layer: int
    expert: int
    part: str
    dtype: torch.dtype
    shape: tuple[int, int]
    offset: int
    elements: torch.Tensor
    weight_crc32: int = 0

    @property
    def weight_bytes(self) -> int:
        """Bytes of the whole weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def stop(self) -> int:
        """Where the next piece begins."""
        return self.offset + len(self.elements)

    @property
    def is_last(self) -> bool:
        return self.stop == self.weight_bytes


def encode_piece(piece: Piece) -> bytes:
    """Serialises a piece; its bytes are copied once."""
    header = ColumnPiece(
        status=STATUS_OK,
        layer_id=piece.layer,
        expert_id=piece.expert,
        part=PARTS[piece.part],
        offset=piece.offset,
        weight_crc32=piece.weight_crc32,
    )
    claim = Tensor(dtype=dtype_to_wire(piece.dtype), shape=piece.shape)
    claim.crc32 = rows_checksum(piece.elements, _seed(header, claim))
    return frames.join(header, _TENSOR, claim, piece.elements.numpy().data)


def encode_no_piece(status: Status, detail: str) -> bytes:
    """Serialises the message that says why there is nothing (more) to be had."""
    return ColumnPiece(status=status, detail=detail).SerializeToString()


def split_piece(data: bytes) -> Piece:
    """The piece in a message, with its bytes checked. Raises CodecError, and PieceRefused where there is none."""
    try:
        frame = frames.split(data, ColumnPiece, _TENSOR)
        header = ColumnPiece.FromString(data) if frame is None else frame.header
    except DecodeError:
        raise CodecError(STATUS_CORRUPT, "not a ColumnPiece") from None
    if frame is None:
        if header.status == STATUS_OK:
            raise CodecError(STATUS_INVALID, "piece is missing")
        raise PieceRefused(header.status, header.detail)
    if not frame.payload:
        raise CodecError(STATUS_INVALID, "the piece is empty")
    elements = torch.frombuffer(bytearray(frame.payload), dtype=torch.uint8)  # torch wants writable memory
    found = rows_checksum(elements, _seed(header, frame.claim))
    if found != frame.claim.crc32:  # before all else: who is wrong, the sender or a bit on the way?
        raise CodecError(STATUS_CORRUPT, f"CRC-32C is {found:08x}, the piece says {frame.claim.crc32:08x}")
    return _checked(header, frame.claim, elements)


def _checked(header: ColumnPiece, claim: Tensor, elements: torch.Tensor) -> Piece:
    dtype = dtype_from_wire(claim.dtype)
    if header.status != STATUS_OK or dtype is None or header.part not in _NAMES:
        raise CodecError(STATUS_INVALID, f"status {header.status}, dtype {claim.dtype}, part {header.part}")
    if len(claim.shape) != 2 or not 0 < math.prod(claim.shape) <= MAX_WEIGHT_ELEMENTS:
        raise CodecError(STATUS_INVALID, f"shape is {list(claim.shape)}, expected 2 of at most 2^34 elements")
    piece = Piece(
        header.layer_id,
        header.expert_id,
        _NAMES[header.part],
        dtype,
        (claim.shape[0], claim.shape[1]),
        header.offset,
        elements,
        header.weight_crc32,
    )
    if not 0 < len(elements) <= PIECE_BYTES or piece.stop > piece.weight_bytes:
        raise CodecError(
            STATUS_INVALID,
            f"{len(elements)} bytes from {piece.offset} on, expected 1 to {PIECE_BYTES} within {piece.weight_bytes}",
        )
    if piece.offset % dtype.itemsize or len(elements) % dtype.itemsize:
        raise CodecError(STATUS_INVALID, f"{len(elements)} bytes from {piece.offset} on are no whole {dtype}")
    return piece


def _seed(header: ColumnPiece, claim: Tensor) -> int:
    numbers = (header.offset, header.status, header.part, header.layer_id, header.expert_id, header.weight_crc32)
    shape = (claim.dtype & 0xFFFFFFFF, *claim.shape)
    return checksum(struct.pack(f"<QiiIII{len(shape)}I", *numbers, *shape))
