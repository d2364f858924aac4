"""The same-node lane: fixed frames beside rows in shared memory. No protobuf, no copy, nothing that can run.

Frames travel over a SEQPACKET socket, one frame a packet; rows lie in two shared regions, fp32 and of one width:
the coordinator writes routed rows to the first, a replica its answers to the second, where the request says. All
numbers of a frame are claims and checked here against the regions they point into. Sockets and mappings are
`actors`' work (the coordinator's end in `dispatch`, the replica's in `expert`); errors are `protos.codec`'s.

Every frame begins with the CRC-32C of its rest, and names that of the rows it speaks of: so rows are never taken for
those of another message, and a replica that was frozen and reads rows whose place was used again knows it.
"""

import struct
from itertools import chain
from typing import NamedTuple, cast

import torch

from protos.checksum import checksum
from protos.codec import CodecError
from protos.expert_pb2 import STATUS_CORRUPT, STATUS_INVALID, Status

VERSION = 3
MAX_SEGMENTS = 64
MAX_DETAIL_BYTES = 512
TICKET_BYTES = 16
MAX_FRAME_BYTES = 2048

_MAGIC = b"OctL"
_HELLO = struct.Struct("<4sH16sIQQ")
_WELCOME = struct.Struct("<4sH")
_CHECKSUM = struct.Struct("<I")
_REQUEST = struct.Struct("<QIIQQQI")
_SEGMENT = struct.Struct("<IQI")
_REPLY = struct.Struct("<QIIIII")
_SEGMENTS = tuple(struct.Struct("<" + "IQI" * count) for count in range(MAX_SEGMENTS + 1))


class Hello(NamedTuple):
    """What a coordinator says first, with the two regions' descriptors: rows of `width` floats, and how many."""

    ticket: bytes
    width: int
    num_rows: int
    num_replies: int

    def pack(self) -> bytes:
        return _HELLO.pack(_MAGIC, VERSION, self.ticket, self.width, self.num_rows, self.num_replies)

    @classmethod
    def unpack(cls, frame: bytes) -> "Hello":
        """Raises CodecError for anything but a hello of this version."""
        if len(frame) != _HELLO.size:
            raise CodecError(STATUS_INVALID, f"a hello has {_HELLO.size} bytes, not {len(frame)}")
        magic, version, ticket, width, num_rows, num_replies = _HELLO.unpack(frame)
        if (magic, version) != (_MAGIC, VERSION):
            raise CodecError(STATUS_INVALID, f"lane version {version} of {magic!r}, this side speaks {VERSION}")
        if not width or not num_rows or not num_replies:
            raise CodecError(STATUS_INVALID, f"empty regions: {num_rows} and {num_replies} rows of {width}")
        return cls(ticket, width, num_rows, num_replies)


def welcome() -> bytes:
    """What a replica answers to a hello that it accepts; it closes the socket on any other."""
    return _WELCOME.pack(_MAGIC, VERSION)


def is_welcome(frame: bytes) -> bool:
    return frame == welcome()


class Segment(NamedTuple):
    """`num_rows` rows for one expert, from row `first_row` of the rows region on."""

    expert_id: int
    first_row: int
    num_rows: int


class LaneRequest(NamedTuple):
    """Rows for the experts of one replica. The answers go, segment by segment, to row `reply_row` and on.

    `rows_crc` is the CRC-32C of the rows, segment by segment.
    """

    sequence: int
    layer_id: int
    map_epoch: int
    deadline_unix_us: int
    reply_row: int
    segments: tuple[Segment, ...]
    rows_crc: int = 0

    @property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)

    def pack(self) -> bytes:
        """Raises ValueError for more segments than a frame has room for."""
        count = len(self.segments)
        if not 1 <= count <= MAX_SEGMENTS:
            raise ValueError(f"{count} segments, a frame holds 1 to {MAX_SEGMENTS}")
        sequence, layer, epoch, deadline, reply_row, segments, crc = self
        head = _REQUEST.pack(sequence, layer, count, epoch, deadline, reply_row, crc)
        return _sealed(head + _SEGMENTS[count].pack(*chain.from_iterable(segments)))

    @classmethod
    def unpack(cls, frame: bytes, *, num_rows: int, num_replies: int) -> "LaneRequest":
        """Raises CodecError unless all rows lie in the regions; with the sequence number, if that can be believed."""
        frame = _unsealed(frame)
        if len(frame) < _REQUEST.size:
            raise CodecError(STATUS_CORRUPT, f"a request of {len(frame)} bytes")
        sequence, layer, count, epoch, deadline, reply_row, crc = _REQUEST.unpack_from(frame)
        if not 1 <= count <= MAX_SEGMENTS or len(frame) != _REQUEST.size + count * _SEGMENT.size:
            raise CodecError(STATUS_CORRUPT, f"{count} segments in a frame of {len(frame)} bytes", sequence)
        if sequence == 0:
            raise CodecError(STATUS_INVALID, "a request's sequence number must not be 0")
        flat = _SEGMENTS[count].unpack_from(frame, _REQUEST.size)
        segments = (Segment(*flat),) if count == 1 else tuple(map(Segment, flat[::3], flat[1::3], flat[2::3]))
        total = 0
        for _, first, rows in segments:
            if rows < 1 or first + rows > num_rows:
                raise CodecError(STATUS_INVALID, f"rows {first} + {rows} of a region of {num_rows}", sequence)
            total += rows
        if reply_row + total > num_replies:
            raise CodecError(STATUS_INVALID, f"answers {reply_row} + {total} of a region of {num_replies}", sequence)
        return cls(sequence, layer, epoch, deadline, reply_row, segments, crc)


class LaneReply(NamedTuple):
    """The answers are in place when `status` is OK; else `detail` says why not. Times in microseconds.

    `rows_crc` is the CRC-32C of the answers, from the first to the last. `inflight_tokens` are everybody's at the
    replica after these.
    """

    sequence: int
    status: Status
    compute_us: int = 0
    queue_us: int = 0
    detail: str = ""
    rows_crc: int = 0
    inflight_tokens: int = 0

    def pack(self) -> bytes:
        sequence, status, compute_us, queue_us, detail, crc, tokens = self
        compute_us, queue_us, tokens = min(compute_us, _MAX_U32), min(queue_us, _MAX_U32), min(tokens, _MAX_U32)
        head = _REPLY.pack(sequence, status, compute_us, queue_us, crc, tokens)
        return _sealed(head + detail.encode(errors="replace")[:MAX_DETAIL_BYTES] if detail else head)

    @classmethod
    def unpack(cls, frame: bytes) -> "LaneReply":
        """Raises CodecError for a frame that is none."""
        frame = _unsealed(frame)
        if not _REPLY.size <= len(frame) <= _REPLY.size + MAX_DETAIL_BYTES:
            raise CodecError(STATUS_CORRUPT, f"a reply of {len(frame)} bytes")
        sequence, status, compute_us, queue_us, crc, tokens = _REPLY.unpack_from(frame)
        if status not in _STATUSES:
            raise CodecError(STATUS_CORRUPT, f"status {status} is unknown", sequence)
        detail = frame[_REPLY.size :].decode(errors="replace") if len(frame) > _REPLY.size else ""
        return cls(sequence, cast(Status, status), compute_us, queue_us, detail, crc, tokens)


_MAX_U32 = 0xFFFFFFFF
_STATUSES = frozenset(Status.values())


def _sealed(content: bytes) -> bytes:
    return _CHECKSUM.pack(checksum(content)) + content


def _unsealed(frame: bytes) -> bytes:
    """A frame's content. Raises CodecError when it is damaged: then nothing in it can be believed."""
    content = frame[_CHECKSUM.size :]
    if len(frame) < _CHECKSUM.size or _CHECKSUM.unpack_from(frame)[0] != checksum(content):
        raise CodecError(STATUS_CORRUPT, f"a frame of {len(frame)} bytes is damaged: its CRC-32C is another")
    return content


def region_bytes(num_rows: int, width: int) -> int:
    """Bytes of a region of `num_rows` rows of `width` fp32 elements."""
    return num_rows * width * torch.float32.itemsize


def as_rows(region: memoryview, width: int) -> torch.Tensor:
    """A shared region as a tensor (rows, width) of fp32 over the same memory; it must be writable."""
    return torch.frombuffer(region, dtype=torch.float32).view(-1, width)
