"""A frame is plain protobuf: what protobuf reads, `split` reads to the same end, and the other way round."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import frames
from protos.expert_pb2 import DTYPE_FLOAT32, ForwardRequest, Tensor

HIDDEN = ForwardRequest.HIDDEN_FIELD_NUMBER

headers = st.builds(
    ForwardRequest,
    sequence=st.integers(0, 2**64 - 1),
    layer_id=st.integers(0, 2**32 - 1),
    map_epoch=st.integers(0, 2**64 - 1),
    deadline_unix_us=st.integers(0, 2**64 - 1),
)
claims = st.builds(
    Tensor,
    dtype=st.integers(0, 3),
    shape=st.lists(st.integers(0, 2**32 - 1), max_size=4),
    crc32=st.integers(0, 99),
)


def split(data: bytes) -> tuple[ForwardRequest, Tensor, bytes] | None:
    """Without the short cut for small messages."""
    frame = frames.split(data, ForwardRequest, HIDDEN, small_bytes=0)
    return None if frame is None else (frame.header, frame.claim, bytes(frame.payload))


def by_protobuf(data: bytes) -> tuple[ForwardRequest, Tensor, bytes] | None:
    header = ForwardRequest.FromString(data)
    if not header.HasField("hidden"):
        return None
    claim, payload = Tensor(), header.hidden.payload
    claim.CopyFrom(header.hidden)
    claim.ClearField("payload")
    header.ClearField("hidden")
    return header, claim, payload


def verdict(read: object, data: bytes) -> object:
    try:
        return read(data)  # type: ignore[operator]
    except DecodeError:
        return "malformed"


@settings(deadline=None)
@given(headers, claims, st.binary(max_size=400))
def test_protobuf_reads_a_frame(header: ForwardRequest, claim: Tensor, payload: bytes) -> None:
    data = frames.join(header, HIDDEN, claim, memoryview(payload))
    assert by_protobuf(data) == (header, claim, payload)
    assert split(data) == (header, claim, payload)


@settings(deadline=None)
@given(headers, claims, st.binary(max_size=400))
def test_split_reads_what_protobuf_writes(header: ForwardRequest, claim: Tensor, payload: bytes) -> None:
    message = ForwardRequest()
    message.CopyFrom(header)
    message.hidden.CopyFrom(claim)
    message.hidden.payload = payload
    assert split(message.SerializeToString()) == (header, claim, payload)


@settings(max_examples=500, deadline=None)
@given(st.data())
def test_split_and_protobuf_agree_on_damaged_messages(data: st.DataObject) -> None:
    header, claim = data.draw(headers), data.draw(claims)
    payload = data.draw(st.binary(max_size=40))
    message = bytearray(frames.join(header, HIDDEN, claim, memoryview(payload)))
    for _ in range(data.draw(st.integers(0, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(message[: data.draw(st.integers(0, len(message)))])
    tail = data.draw(st.binary(max_size=12))
    for damaged in (bytes(message), cut, bytes(message) + tail, tail + bytes(message)):
        assert verdict(split, damaged) == verdict(by_protobuf, damaged)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_split_and_protobuf_agree_on_random_bytes(data: bytes) -> None:
    assert verdict(split, data) == verdict(by_protobuf, data)


def test_a_tensor_given_twice_is_merged_as_protobuf_merges() -> None:
    one = frames.join(ForwardRequest(sequence=1), HIDDEN, Tensor(dtype=DTYPE_FLOAT32), memoryview(b"first"))
    two = frames.join(ForwardRequest(layer_id=2), HIDDEN, Tensor(shape=[3]), memoryview(b"second"))
    assert split(one + two) == by_protobuf(one + two)


def test_a_large_payload_is_a_view_of_what_was_received() -> None:
    payload = memoryview(bytes(frames.SMALL_BYTES))
    data = frames.join(ForwardRequest(sequence=1), HIDDEN, Tensor(dtype=DTYPE_FLOAT32), payload)
    frame = frames.split(data, ForwardRequest, HIDDEN)
    assert frame is not None
    assert frame.payload.obj is data


def test_endless_small_fields_end_the_fast_path_early() -> None:
    many = b"\x08\x01" * 100_000  # sequence = 1, a hundred thousand times
    assert split(many) is None


def test_an_endless_varint_is_malformed() -> None:
    with pytest.raises(DecodeError):
        split(b"\x08" + b"\xff" * 20)
