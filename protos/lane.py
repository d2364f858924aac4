"""The same-node lane: fixed frames beside rows in shared memory. No protobuf, no copy, nothing that can run.

Frames travel over a SEQPACKET socket, one frame a packet; rows lie in two shared regions, fp32 and of one width:
the coordinator writes routed rows to the first, a replica its answers to the second, where the request says. All
numbers of a frame are claims and checked here against the regions they point into. Sockets and mappings are
`actors`' work (the coordinator's end in `dispatch`, the replica's in `expert`); errors are `protos.codec`'s.

Rows carry no checksum: they do not travel. A replica that reads rows after their place was used again answers
under a sequence number that nobody waits for.
"""

import struct
from typing import NamedTuple, cast

import torch

from protos.codec import CodecError
from protos.expert_pb2 import STATUS_CORRUPT, STATUS_INVALID, Status

VERSION = 1
MAX_SEGMENTS = 64
MAX_DETAIL_BYTES = 512
TICKET_BYTES = 16
MAX_FRAME_BYTES = 2048

_MAGIC = b"OctL"
_HELLO = struct.Struct("<4sH16sIQQ")
_WELCOME = struct.Struct("<4sH")
_REQUEST = struct.Struct("<QIIQQQ")
_SEGMENT = struct.Struct("<IQI")
_REPLY = struct.Struct("<QIII")
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
    """Rows for the experts of one replica. The answers go, segment by segment, to row `reply_row` and on."""

    sequence: int
    layer_id: int
    map_epoch: int
    deadline_unix_us: int
    reply_row: int
    segments: tuple[Segment, ...]

    @property
    def num_rows(self) -> int:
        return sum(segment.num_rows for segment in self.segments)

    def pack(self) -> bytes:
        """Raises ValueError for more segments than a frame has room for."""
        count = len(self.segments)
        if not 1 <= count <= MAX_SEGMENTS:
            raise ValueError(f"{count} segments, a frame holds 1 to {MAX_SEGMENTS}")
        head = _REQUEST.pack(self.sequence, self.layer_id, count, self.map_epoch, self.deadline_unix_us, self.reply_row)
        flat = [value for one in self.segments for value in (one.expert_id, one.first_row, one.num_rows)]
        return head + _SEGMENTS[count].pack(*flat)

    @classmethod
    def unpack(cls, frame: bytes, *, num_rows: int, num_replies: int) -> "LaneRequest":
        """Raises CodecError, with the sequence number where it could be read, unless all rows lie in the regions."""
        if len(frame) < _REQUEST.size:
            raise CodecError(STATUS_CORRUPT, f"a request of {len(frame)} bytes")
        sequence, layer, count, epoch, deadline, reply_row = _REQUEST.unpack_from(frame)
        if not 1 <= count <= MAX_SEGMENTS or len(frame) != _REQUEST.size + count * _SEGMENT.size:
            raise CodecError(STATUS_CORRUPT, f"{count} segments in a frame of {len(frame)} bytes", sequence)
        if sequence == 0:
            raise CodecError(STATUS_INVALID, "a request's sequence number must not be 0")
        flat = _SEGMENTS[count].unpack_from(frame, _REQUEST.size)
        segments = tuple([Segment(*flat[at : at + 3]) for at in range(0, 3 * count, 3)])
        total = 0
        for segment in segments:
            if segment.num_rows < 1 or segment.first_row + segment.num_rows > num_rows:
                said = f"rows {segment.first_row} + {segment.num_rows} of a region of {num_rows}"
                raise CodecError(STATUS_INVALID, said, sequence)
            total += segment.num_rows
        if reply_row + total > num_replies:
            raise CodecError(STATUS_INVALID, f"answers {reply_row} + {total} of a region of {num_replies}", sequence)
        return cls(sequence, layer, epoch, deadline, reply_row, segments)


class LaneReply(NamedTuple):
    """The answers are in place when `status` is OK; else `detail` says why not. Times in microseconds."""

    sequence: int
    status: Status
    compute_us: int = 0
    queue_us: int = 0
    detail: str = ""

    def pack(self) -> bytes:
        detail = self.detail.encode(errors="replace")[:MAX_DETAIL_BYTES]
        compute_us, queue_us = min(self.compute_us, _MAX_U32), min(self.queue_us, _MAX_U32)
        return _REPLY.pack(self.sequence, self.status, compute_us, queue_us) + detail

    @classmethod
    def unpack(cls, frame: bytes) -> "LaneReply":
        """Raises CodecError for a frame that is none."""
        if not _REPLY.size <= len(frame) <= _REPLY.size + MAX_DETAIL_BYTES:
            raise CodecError(STATUS_CORRUPT, f"a reply of {len(frame)} bytes")
        sequence, status, compute_us, queue_us = _REPLY.unpack_from(frame)
        if status not in Status.values():
            raise CodecError(STATUS_CORRUPT, f"status {status} is unknown", sequence)
        detail = frame[_REPLY.size :].decode(errors="replace")
        return cls(sequence, cast(Status, status), compute_us, queue_us, detail)


_MAX_U32 = 0xFFFFFFFF


def region_bytes(num_rows: int, width: int) -> int:
    """Bytes of a region of `num_rows` rows of `width` fp32 elements."""
    return num_rows * width * torch.float32.itemsize


def as_rows(region: memoryview, width: int) -> torch.Tensor:
    """A shared region as a tensor (rows, width) of fp32 over the same memory; it must be writable."""
    return torch.frombuffer(region, dtype=torch.float32).view(-1, width)
