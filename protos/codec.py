"""The only code that turns tensors into bytes and bytes into tensors. No pickle, nothing that can run.

Shapes, lengths and dtypes of a message are claims: they are checked against its real size and the receiver's
limits before a tensor is made. The CRC-32C of a payload is begun from the message's own identity (its sequence
number, layer, expert, ...; see `request_seed` and `reply_seed`), so a bit flipped in those fields is found
like one in the payload: rows never reach the wrong expert. Which errors are worth another try is the caller's
to know from the status.

M rows of one message, D hidden size. Elements are little-endian.
"""

import struct
import sys
from collections.abc import Sequence

import torch
from google.protobuf.message import DecodeError

from protos import frames
from protos.checksum import checksum, rows_checksum
from protos.expert_pb2 import (
    DTYPE_BFLOAT16,
    DTYPE_FLOAT16,
    DTYPE_FLOAT32,
    STATUS_CORRUPT,
    STATUS_INVALID,
    DType,
    ForwardReply,
    ForwardRequest,
    Status,
    Tensor,
)
from protos.limits import MAX_MESSAGE_BYTES

if sys.byteorder != "little":
    raise ImportError("protos.codec needs a little-endian machine")

_OVERHEAD_BYTES = 1024  # all that is in a message beside the payload; the text of an error is far shorter

_TO_WIRE = {torch.float32: DTYPE_FLOAT32, torch.bfloat16: DTYPE_BFLOAT16, torch.float16: DTYPE_FLOAT16}
_FROM_WIRE = {wire: dtype for dtype, wire in _TO_WIRE.items()}


class CodecError(ValueError):
    """A message that cannot be believed. `status` says whether a retry may help (CORRUPT) or not (INVALID).

    `sequence` is the number of the message it was, 0 where that could not be read.
    """

    def __init__(self, status: Status, detail: str, sequence: int = 0) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.sequence = sequence


def dtype_to_wire(dtype: torch.dtype) -> DType:
    """What the dtype is called in a message. Raises KeyError for one without a name there."""
    return _TO_WIRE[dtype]


def dtype_from_wire(wire: DType) -> torch.dtype | None:
    """The dtype that a message means, None for one that this side does not know."""
    return _FROM_WIRE.get(wire)


def message_bytes_for(rows: int, width: int, dtype: torch.dtype) -> int:
    """Bytes that a message with a (rows, width) tensor can have at most."""
    return rows * width * dtype.itemsize + _OVERHEAD_BYTES


def max_rows_for(width: int, dtype: torch.dtype) -> int:
    """Rows of `width` elements that fit one message. Raises ValueError when not even one does."""
    rows = (MAX_MESSAGE_BYTES - _OVERHEAD_BYTES) // (width * dtype.itemsize)
    if rows < 1:
        raise ValueError(f"a row of {width} elements does not fit a message of {MAX_MESSAGE_BYTES} bytes")
    return rows


def encode_tensor(tensor_MD: torch.Tensor, *, seed: int = 0) -> Tensor:
    """A message with a copy of the tensor's elements, bit for bit. Raises ValueError for a dtype without a name."""
    claim, payload = describe(tensor_MD, seed=seed)
    claim.payload = bytes(payload)
    return claim


def decode_tensor(
    message: Tensor, *, max_rows: int, width: int, dtypes: Sequence[torch.dtype], seed: int = 0
) -> torch.Tensor:
    """The (rows, width) CPU tensor in `message`, bit for bit; 1 <= rows <= max_rows. Raises CodecError."""
    return restore(message, message.payload, max_rows=max_rows, width=width, dtypes=dtypes, seed=seed)


def describe(tensor_MD: torch.Tensor, *, seed: int = 0) -> tuple[Tensor, memoryview]:
    """What a message says about a tensor, and a view of its bytes: copied only if on a device or not contiguous.

    Raises ValueError for a tensor that is not 2-d, is empty, or whose dtype has no name on the wire.
    """
    if tensor_MD.dim() != 2 or tensor_MD.numel() == 0 or tensor_MD.dtype not in _TO_WIRE:
        raise ValueError(f"cannot send a tensor of shape {tuple(tensor_MD.shape)} and {tensor_MD.dtype}")
    host_MD = tensor_MD.detach().to("cpu").contiguous()
    elements = host_MD.view(torch.uint8)
    claim = Tensor(dtype=_TO_WIRE[host_MD.dtype], shape=host_MD.shape)
    claim.crc32 = rows_checksum(elements, _claim_seed(claim, seed))
    return claim, elements.numpy().data.cast("B")


def restore(
    claim: Tensor,
    payload: bytes | memoryview,
    *,
    max_rows: int,
    width: int,
    dtypes: Sequence[torch.dtype],
    seed: int = 0,
) -> torch.Tensor:
    """`decode_tensor` for a payload that lies beside its claim. Raises CodecError."""
    view = memoryview(payload)
    try:
        dtype, rows = _check_claim(claim, view.nbytes, max_rows, width, dtypes)
    except CodecError:
        _refuse_damage(claim, view, seed)  # is it the sender who is wrong, or a bit on the way?
        raise
    elements = torch.frombuffer(bytearray(view), dtype=torch.uint8)  # torch wants writable memory
    found = rows_checksum(elements, _claim_seed(claim, seed))  # of the copy, which is what will be used
    if found != claim.crc32:
        raise CodecError(STATUS_CORRUPT, f"CRC-32C is {found:08x}, the message says {claim.crc32:08x}")
    return elements.view(dtype).view(rows, width)


def encode_request(header: ForwardRequest, hidden_MD: torch.Tensor) -> bytes:
    """Serialises a request: `header` with everything but `hidden`."""
    claim, payload = describe(hidden_MD, seed=request_seed(header))
    return frames.join(header, ForwardRequest.HIDDEN_FIELD_NUMBER, claim, payload)


def encode_reply(header: ForwardReply, output_MD: torch.Tensor, request: ForwardRequest) -> bytes:
    """Serialises a reply: `header` with everything but `output`; `request` is what it answers."""
    claim, payload = describe(output_MD, seed=reply_seed(request))
    header.header_crc32 = _header_crc(header)
    return frames.join(header, ForwardReply.OUTPUT_FIELD_NUMBER, claim, payload)


def encode_refusal(header: ForwardReply) -> bytes:
    """Serialises a reply that has no output."""
    header.header_crc32 = _header_crc(header)
    return header.SerializeToString()


def split_request(data: bytes) -> frames.Frame[ForwardRequest]:
    """The parts of a serialised request; the tensor is not yet checked. Raises CodecError."""
    try:
        frame = frames.split(data, ForwardRequest, ForwardRequest.HIDDEN_FIELD_NUMBER)
    except DecodeError:
        raise CodecError(STATUS_CORRUPT, "not a ForwardRequest") from None
    if frame is None:
        raise CodecError(STATUS_INVALID, "hidden is missing", ForwardRequest.FromString(data).sequence)
    return frame


def check_undamaged(frame: frames.Frame[ForwardRequest]) -> None:
    """For who is about to refuse a request because of what its header says. Raises CodecError when it is damaged."""
    _refuse_damage(frame.claim, frame.payload, request_seed(frame.header), frame.header.sequence)


def split_reply(data: bytes) -> tuple[ForwardReply, frames.Frame[ForwardReply] | None]:
    """A reply without its output, and its parts if it has one, not yet checked. Raises CodecError.

    The header is checked: a reply that is damaged there may be anybody's.
    """
    try:
        frame = frames.split(data, ForwardReply, ForwardReply.OUTPUT_FIELD_NUMBER)
        header = ForwardReply.FromString(data) if frame is None else frame.header
    except DecodeError:
        raise CodecError(STATUS_CORRUPT, "not a ForwardReply") from None
    if header.header_crc32 not in (0, _header_crc(header)):
        raise CodecError(STATUS_CORRUPT, "the header of a reply is damaged: its CRC-32C is another")
    return header, frame


def request_seed(header: ForwardRequest) -> int:
    """Where the CRC-32C of `hidden` begins: that of all that says whose rows these are, and what becomes of them."""
    numbers = (header.sequence, header.layer_id, header.map_epoch, header.deadline_unix_us)
    seed = _experts_seed(header, checksum(struct.pack("<QIQQ", *numbers)))
    return checksum(header.merge.weights, checksum(header.merge.entries, seed))


def reply_seed(request: ForwardRequest) -> int:
    """Where the CRC-32C of `output` begins: that of what was asked, as the replier understood it."""
    return _experts_seed(request, checksum(struct.pack("<QI", request.sequence, request.layer_id)))


def _header_crc(header: ForwardReply) -> int:
    numbers = (header.sequence, header.status, header.compute_us, header.queue_us, header.inflight_tokens)
    return checksum(header.detail.encode(), checksum(struct.pack("<QqIII", *numbers)))


def _experts_seed(header: ForwardRequest, seed: int) -> int:
    flat = (*header.expert_ids, *header.expert_rows)
    return checksum(struct.pack(f"<{len(flat)}I", *flat), seed)


def _claim_seed(claim: Tensor, seed: int) -> int:
    return checksum(struct.pack(f"<{1 + len(claim.shape)}I", claim.dtype & 0xFFFFFFFF, *claim.shape), seed)


def _refuse_damage(claim: Tensor, payload: memoryview, seed: int, sequence: int = 0) -> None:
    found = checksum(bytes(payload), _claim_seed(claim, seed))
    if found != claim.crc32:
        raise CodecError(
            STATUS_CORRUPT, f"damaged: CRC-32C is {found:08x}, the message says {claim.crc32:08x}", sequence
        )


def _check_claim(
    claim: Tensor, payload_bytes: int, max_rows: int, width: int, dtypes: Sequence[torch.dtype]
) -> tuple[torch.dtype, int]:
    dtype = _FROM_WIRE.get(claim.dtype)
    if dtype is None or dtype not in dtypes:
        name = DType.Name(claim.dtype) if claim.dtype in DType.values() else str(claim.dtype)
        allowed = ", ".join(str(dtype) for dtype in dtypes)
        raise CodecError(STATUS_INVALID, f"dtype is {name}, expected one of {allowed}")
    if len(claim.shape) != 2:
        raise CodecError(STATUS_INVALID, f"the shape has {len(claim.shape)} dimensions, expected 2")
    rows, columns = claim.shape
    if not 1 <= rows <= max_rows:
        raise CodecError(STATUS_INVALID, f"{rows} rows, expected 1 to {max_rows}")
    if columns != width:
        raise CodecError(STATUS_INVALID, f"rows of {columns} elements, expected {width}")
    claimed = rows * columns * dtype.itemsize
    if payload_bytes != claimed:
        raise CodecError(STATUS_INVALID, f"the payload has {payload_bytes} bytes, its shape needs {claimed}")
    return dtype, rows
