"""Lane frames: what goes in comes out, and no frame whatever points outside the regions or raises another error."""

import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos.checksum import checksum
from protos.codec import CodecError
from protos.expert_pb2 import (
    STATUS_CORRUPT,
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OK,
    Status,
)
from protos.lane import (
    MAX_DETAIL_BYTES,
    MAX_FRAME_BYTES,
    MAX_SEGMENTS,
    TICKET_BYTES,
    Hello,
    LaneReply,
    LaneRequest,
    Segment,
    as_rows,
    is_welcome,
    region_bytes,
    welcome,
)

ROWS, REPLIES = 100, 50
U64 = st.integers(0, 2**64 - 1)
U32 = st.integers(0, 2**32 - 1)

HELLO = Hello(b"t" * TICKET_BYTES, 8, ROWS, REPLIES)
REQUEST = LaneRequest(7, 3, 5, 1_700_000_000_000_000, 40, (Segment(2, 90, 4), Segment(5, 0, 6)))


def unpack(frame: bytes) -> LaneRequest:
    return LaneRequest.unpack(frame, num_rows=ROWS, num_replies=REPLIES)


def sealed(content: bytes) -> bytes:
    return struct.pack("<I", checksum(content)) + content


def within_the_regions(request: LaneRequest) -> bool:
    rows = all(one.num_rows >= 1 and one.first_row + one.num_rows <= ROWS for one in request.segments)
    return rows and request.reply_row + request.num_rows <= REPLIES and request.sequence > 0


# ---- round trips ------------------------------------------------------------------------------------------


@given(st.binary(min_size=TICKET_BYTES, max_size=TICKET_BYTES), st.integers(1, 2**32 - 1), U64, U64)
def test_a_hello_comes_out_as_it_went_in(ticket: bytes, width: int, num_rows: int, num_replies: int) -> None:
    hello = Hello(ticket, width, max(1, num_rows), max(1, num_replies))
    assert Hello.unpack(hello.pack()) == hello


def test_a_welcome_is_one_and_nothing_else_is() -> None:
    assert is_welcome(welcome())
    assert not is_welcome(b"")
    assert not is_welcome(welcome() + b"\0")
    assert not is_welcome(HELLO.pack())
    assert not is_welcome(bytes([welcome()[0] ^ 1]) + welcome()[1:])


@st.composite
def requests(draw: st.DrawFn) -> LaneRequest:
    counts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=10))
    segments = tuple(Segment(draw(U32), draw(st.integers(0, ROWS - count)), count) for count in counts)
    reply_row = draw(st.integers(0, REPLIES - sum(counts)))
    sequence = draw(st.integers(1, 2**64 - 1))
    return LaneRequest(sequence, draw(U32), draw(U64), draw(U64), reply_row, segments, draw(U32))


@given(requests())
def test_a_request_comes_out_as_it_went_in(request: LaneRequest) -> None:
    assert unpack(request.pack()) == request
    assert request.num_rows == sum(one.num_rows for one in request.segments)


def test_a_frame_holds_as_many_segments_as_it_says_and_no_more() -> None:
    most = REQUEST._replace(reply_row=0, segments=(Segment(0, 0, 1),) * MAX_SEGMENTS)
    frame = most.pack()
    assert len(frame) <= MAX_FRAME_BYTES
    assert LaneRequest.unpack(frame, num_rows=1, num_replies=MAX_SEGMENTS) == most
    for segments in ((), (Segment(0, 0, 1),) * (MAX_SEGMENTS + 1)):
        with pytest.raises(ValueError, match=f"{len(segments)} segments"):
            REQUEST._replace(segments=segments).pack()


@given(U64, st.sampled_from(Status.values()), U32, U32, st.text(max_size=100), U32, U32)
def test_a_reply_comes_out_as_it_went_in(
    sequence: int, status: Status, compute: int, queue: int, detail: str, rows_crc: int, tokens: int
) -> None:
    reply = LaneReply(sequence, status, compute, queue, detail, rows_crc, tokens)
    assert LaneReply.unpack(reply.pack()) == reply


def test_a_reply_packs_whatever_happened() -> None:
    long = LaneReply(1, STATUS_INTERNAL, 2**40, 2**41, "é" * MAX_DETAIL_BYTES, 0, 2**42)
    back = LaneReply.unpack(long.pack())
    assert (back.compute_us, back.queue_us, back.inflight_tokens) == (2**32 - 1, 2**32 - 1, 2**32 - 1)
    assert back.detail == "é" * (MAX_DETAIL_BYTES // 2)
    assert len(long.pack()) <= MAX_FRAME_BYTES
    assert LaneReply.unpack(LaneReply(1, STATUS_INTERNAL, detail="a\udcffb").pack()).detail == "a?b"
    cut = LaneReply.unpack(LaneReply(1, STATUS_INTERNAL, detail="x" + "é" * MAX_DETAIL_BYTES).pack())
    assert cut.detail.endswith("\N{REPLACEMENT CHARACTER}")  # in the middle of a letter


# ---- malformed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        HELLO.pack()[:-1],
        HELLO.pack() + b"\0",
        b"OctX" + HELLO.pack()[4:],
        HELLO.pack()[:4] + b"\x01\x00" + HELLO.pack()[6:],
        HELLO._replace(width=0).pack(),
        HELLO._replace(num_rows=0).pack(),
        HELLO._replace(num_replies=0).pack(),
    ],
)
def test_anything_but_a_hello_is_refused(frame: bytes) -> None:
    with pytest.raises(CodecError) as caught:
        Hello.unpack(frame)
    assert caught.value.status == STATUS_INVALID


FRAME = REQUEST.pack()
BODY = FRAME[4:]
HEAD = len(BODY) - 2 * 16


@pytest.mark.parametrize(
    ("frame", "status", "sequence", "said"),
    [
        (b"", STATUS_CORRUPT, 0, "0 bytes is damaged"),
        (FRAME[:-1], STATUS_CORRUPT, 0, "is damaged"),
        (FRAME + b"\0", STATUS_CORRUPT, 0, "is damaged"),
        (sealed(b""), STATUS_CORRUPT, 0, "a request of 0 bytes"),
        (sealed(BODY[: HEAD - 1]), STATUS_CORRUPT, 0, f"{HEAD - 1} bytes"),
        (sealed(BODY[:HEAD]), STATUS_CORRUPT, 7, "2 segments"),
        (sealed(BODY + b"\0"), STATUS_CORRUPT, 7, "2 segments"),
        (sealed(BODY[:12] + struct.pack("<I", 0) + BODY[16:HEAD]), STATUS_CORRUPT, 7, "0 segments"),
        (sealed(BODY[:12] + struct.pack("<I", 65) + BODY[16:HEAD] + bytes(65 * 16)), STATUS_CORRUPT, 7, "65 segments"),
        (sealed(BODY[:12] + b"\xff\xff\xff\xff" + BODY[16:]), STATUS_CORRUPT, 7, "4294967295 segments"),
        (REQUEST._replace(sequence=0).pack(), STATUS_INVALID, 0, "must not be 0"),
        (REQUEST._replace(segments=(Segment(0, 0, 0),)).pack(), STATUS_INVALID, 7, "rows 0 + 0"),
        (REQUEST._replace(segments=(Segment(0, ROWS, 1),)).pack(), STATUS_INVALID, 7, f"region of {ROWS}"),
        (REQUEST._replace(segments=(Segment(0, ROWS - 3, 4),)).pack(), STATUS_INVALID, 7, f"region of {ROWS}"),
        (REQUEST._replace(segments=(Segment(0, 2**64 - 1, 2),)).pack(), STATUS_INVALID, 7, f"region of {ROWS}"),
        (REQUEST._replace(segments=(Segment(0, 0, 2**32 - 1),)).pack(), STATUS_INVALID, 7, f"region of {ROWS}"),
        (REQUEST._replace(reply_row=REPLIES - 9).pack(), STATUS_INVALID, 7, f"answers {REPLIES - 9} + 10"),
        (REQUEST._replace(reply_row=2**64 - 1).pack(), STATUS_INVALID, 7, "answers"),
        (REQUEST._replace(segments=(Segment(0, 0, ROWS),) * 2).pack(), STATUS_INVALID, 7, "answers 40 + 200"),
    ],
)
def test_a_request_that_is_wrong_is_refused(frame: bytes, status: Status, sequence: int, said: str) -> None:
    with pytest.raises(CodecError, match=said.replace("+", r"\+")) as caught:
        unpack(frame)
    assert (caught.value.status, caught.value.sequence) == (status, sequence)


@pytest.mark.parametrize(
    ("frame", "sequence", "said"),
    [
        (b"", 0, "a frame of 0 bytes is damaged"),
        (LaneReply(7, STATUS_OK).pack()[:-1], 0, "is damaged"),
        (sealed(LaneReply(7, STATUS_OK).pack()[4:-1]), 0, "a reply of 27 bytes"),
        (sealed(LaneReply(7, STATUS_OK).pack()[4:] + b"x" * (MAX_DETAIL_BYTES + 1)), 0, "a reply of 541 bytes"),
        (sealed(struct.pack("<QIIIII", 7, 11, 0, 0, 0, 0)), 7, "status 11 is unknown"),
        (sealed(struct.pack("<QIIIII", 7, 2**32 - 1, 0, 0, 0, 0)), 7, "status 4294967295 is unknown"),
    ],
)
def test_a_reply_that_is_none_is_refused(frame: bytes, sequence: int, said: str) -> None:
    with pytest.raises(CodecError, match=said) as caught:
        LaneReply.unpack(frame)
    assert (caught.value.status, caught.value.sequence) == (STATUS_CORRUPT, sequence)


def read(unpack_one: Callable[[bytes], object], frame: bytes) -> object:
    """What came out, or the CodecError; nothing else may be raised."""
    try:
        return unpack_one(frame)
    except CodecError as error:
        return error


@given(st.one_of(st.binary(max_size=200), st.binary(min_size=HEAD + 16, max_size=HEAD + 16), st.binary(max_size=1200)))
def test_random_bytes_raise_nothing_but_codec_errors(content: bytes) -> None:
    for unpack_one in (unpack, Hello.unpack, LaneReply.unpack):
        for frame in (content, sealed(content)):
            found = read(unpack_one, frame)
            if isinstance(found, LaneRequest):
                assert within_the_regions(found)
            elif isinstance(found, CodecError):
                assert found.status in (STATUS_CORRUPT, STATUS_INVALID)


@given(requests(), st.data())
def test_numbers_under_a_good_checksum_never_point_outside_the_regions(
    request: LaneRequest, data: st.DataObject
) -> None:
    content = bytearray(request.pack()[4:])
    for bit in data.draw(st.lists(st.integers(0, 8 * len(content) - 1), min_size=1, max_size=3)):
        content[bit // 8] ^= 1 << bit % 8
    found = read(unpack, sealed(bytes(content)))
    if isinstance(found, LaneRequest):
        assert within_the_regions(found)
    else:
        assert isinstance(found, CodecError)
        assert found.sequence == int.from_bytes(content[:8], "little")


def test_every_flipped_bit_of_a_frame_is_found() -> None:
    reply = LaneReply(9, STATUS_INTERNAL, 11, 13, "a detail", 17, 19)
    for frame, unpack_one in ((REQUEST.pack(), unpack), (reply.pack(), LaneReply.unpack)):
        for bit in range(8 * len(frame)):
            damaged = bytearray(frame)
            damaged[bit // 8] ^= 1 << bit % 8
            found = read(unpack_one, bytes(damaged))
            assert isinstance(found, CodecError), bit
            assert (found.status, found.sequence) == (STATUS_CORRUPT, 0)


# ---- rows -------------------------------------------------------------------------------------------------


def test_a_region_is_rows_over_the_same_memory() -> None:
    memory = bytearray(region_bytes(3, 2))
    rows = as_rows(memoryview(memory), 2)
    assert (rows.shape, rows.dtype) == ((3, 2), torch.float32)
    rows[2, 1] = 1.5
    assert memory[-4:] == struct.pack("<f", 1.5)
