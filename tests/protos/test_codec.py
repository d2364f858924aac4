"""Tensors survive the wire bit for bit, and no bytes whatever raise anything but CodecError."""

import random
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protos import codec
from protos.codec import CodecError
from protos.expert_pb2 import (
    DTYPE_FLOAT16,
    STATUS_CORRUPT,
    STATUS_INVALID,
    STATUS_OK,
    ForwardReply,
    ForwardRequest,
    Tensor,
)
from protos.limits import MAX_MESSAGE_BYTES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WORDS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def request(sequence: int = 7, layer: int = 3, expert: int = 2) -> ForwardRequest:
    return ForwardRequest(
        sequence=sequence,
        layer_id=layer,
        expert_ids=[expert],
        expert_rows=[2],
        map_epoch=5,
        deadline_unix_us=1_700_000_000_000_000,
    )


def bits(tensor: torch.Tensor) -> list[int]:
    return [int(word) for word in tensor.contiguous().view(WORDS[tensor.dtype]).flatten().tolist()]


def decode(message: Tensor, *, max_rows: int = 8, width: int = 4, seed: int = 0) -> torch.Tensor:
    return codec.decode_tensor(message, max_rows=max_rows, width=width, dtypes=DTYPES, seed=seed)


def read(data: bytes, *, max_rows: int = 64, width: int = 4) -> tuple[ForwardRequest, torch.Tensor]:
    frame = codec.split_request(data)
    seed = codec.request_seed(frame.header)
    rows = codec.restore(frame.claim, frame.payload, max_rows=max_rows, width=width, dtypes=DTYPES, seed=seed)
    return frame.header, rows


@settings(deadline=None)
@given(st.data(), st.sampled_from(DTYPES), st.integers(1, 5), st.integers(1, 7))
def test_every_bit_pattern_survives(data: st.DataObject, dtype: torch.dtype, rows: int, width: int) -> None:
    size = dtype.itemsize * rows * width
    raw = data.draw(st.binary(min_size=size, max_size=size))
    tensor = torch.frombuffer(bytearray(raw), dtype=dtype).view(rows, width)
    back = decode(codec.encode_tensor(tensor), max_rows=rows, width=width)
    assert back.dtype == dtype
    assert back.shape == (rows, width)
    assert bits(back) == bits(tensor)


def test_nan_payloads_and_negative_zero_survive() -> None:
    words = [0x7FC00001, 0xFFFFFFFF, 0x80000000, 0x00000001]  # two NaNs, -0.0, the smallest subnormal
    raw = bytearray(struct.pack("<4I", *words))
    back = decode(codec.encode_tensor(torch.frombuffer(raw, dtype=torch.float32).view(1, 4)))
    assert [word & 0xFFFFFFFF for word in bits(back)] == words


def test_a_decoded_tensor_may_be_written_to() -> None:
    back = decode(codec.encode_tensor(torch.ones(2, 4)))
    back += 1
    assert back.sum() == 16


def test_a_slice_that_is_not_contiguous_is_sent_as_it_looks() -> None:
    whole = torch.arange(32.0).view(8, 4)
    part = whole.t()[:, ::2]
    assert torch.equal(decode(codec.encode_tensor(part)), part)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(4), torch.zeros(0, 4), torch.zeros(1, 1, 4), torch.zeros(1, 4, dtype=torch.float64)],
)
def test_what_has_no_place_on_the_wire_is_not_sent(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="cannot send a tensor of shape"):
        codec.encode_tensor(tensor)


def broken(**changes: object) -> Tensor:
    message = codec.encode_tensor(torch.ones(2, 4))
    for name, value in changes.items():
        if name == "shape":
            del message.shape[:]
            message.shape.extend(value)  # type: ignore[arg-type]
        else:
            setattr(message, name, value)
    if changes.keys() <= {"dtype", "shape"}:  # said by mistake, not damaged on the way
        message.crc32 = codec.checksum(message.payload, codec._claim_seed(message, 0))
    return message


def damaged(**changes: object) -> Tensor:
    message = broken(**changes)
    message.crc32 ^= 1
    return message


@pytest.mark.parametrize(
    ("message", "status", "said"),
    [
        (broken(dtype=0), STATUS_INVALID, "dtype is DTYPE_UNSPECIFIED"),
        (broken(dtype=99), STATUS_INVALID, "dtype is 99"),
        (broken(dtype=DTYPE_FLOAT16), STATUS_INVALID, "32 bytes, its shape needs 16"),
        (broken(shape=[8]), STATUS_INVALID, "1 dimensions"),
        (broken(shape=[2, 2, 2]), STATUS_INVALID, "3 dimensions"),
        (broken(shape=[0, 4]), STATUS_INVALID, "0 rows, expected 1 to 8"),
        (broken(shape=[9, 4]), STATUS_INVALID, "9 rows, expected 1 to 8"),
        (broken(shape=[2**32 - 1, 4]), STATUS_INVALID, "4294967295 rows"),
        (broken(shape=[4, 2]), STATUS_INVALID, "rows of 2 elements, expected 4"),
        (broken(shape=[3, 4]), STATUS_INVALID, "the payload has 32 bytes, its shape needs 48"),
        (broken(payload=b""), STATUS_CORRUPT, "damaged: CRC-32C"),
        (damaged(shape=[9, 4]), STATUS_CORRUPT, "damaged: CRC-32C"),
        (damaged(dtype=99), STATUS_CORRUPT, "damaged: CRC-32C"),
        (broken(payload=bytes(31) + b"x"), STATUS_CORRUPT, "CRC-32C"),
        (broken(crc32=1), STATUS_CORRUPT, "the message says 00000001"),
    ],
)
def test_a_claim_is_checked_before_it_is_believed(message: Tensor, status: int, said: str) -> None:
    with pytest.raises(CodecError, match=said) as caught:
        decode(message)
    assert caught.value.status == status


def test_only_the_dtypes_asked_for_are_taken() -> None:
    message = codec.encode_tensor(torch.ones(1, 4, dtype=torch.float16))
    with pytest.raises(CodecError, match=r"expected one of torch\.float32"):
        codec.decode_tensor(message, max_rows=1, width=4, dtypes=(torch.float32,))


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_only_codec_errors(data: bytes) -> None:
    for attempt in (read, codec.split_reply):
        try:
            attempt(data)
        except CodecError:
            continue


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6))
def test_mutated_requests_raise_only_codec_errors_and_never_change_meaning(seed: int, flips: int) -> None:
    rng = random.Random(seed)
    header, rows = request(), torch.arange(12.0).view(3, 4)
    data = bytearray(codec.encode_request(header, rows))
    for _ in range(flips):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    try:
        got, back = read(bytes(data))
    except CodecError:
        return
    # Undoing each other, or in a field that means nothing: what is believed is what was said.
    assert got.layer_id == header.layer_id
    assert list(got.expert_ids) == list(header.expert_ids)
    assert got.sequence == header.sequence
    assert torch.equal(back, rows)


def _change(message: ForwardRequest, field: str) -> None:
    if field in ("expert_ids", "expert_rows"):
        getattr(message, field)[0] ^= 1
    elif field in ("entries", "weights"):
        setattr(message.merge, field, b"abcd")
    else:
        setattr(message, field, getattr(message, field) ^ 1)


FIELDS = ["sequence", "layer_id", "expert_ids", "expert_rows", "map_epoch", "deadline_unix_us", "entries", "weights"]


@pytest.mark.parametrize("field", FIELDS)
def test_a_changed_header_is_a_corrupt_message(field: str) -> None:
    message = ForwardRequest.FromString(codec.encode_request(request(), torch.ones(1, 4)))
    _change(message, field)
    with pytest.raises(CodecError) as caught:
        read(message.SerializeToString())
    assert caught.value.status == STATUS_CORRUPT


def test_a_reply_answers_one_request_only() -> None:
    asked = request()
    header = ForwardReply(sequence=7, status=STATUS_OK, compute_us=11)
    data = codec.encode_reply(header, torch.ones(2, 4), asked)
    got, frame = codec.split_reply(data)
    assert (got.sequence, got.status, got.compute_us) == (7, STATUS_OK, 11)
    assert frame is not None
    for other, same in ((asked, True), (request(layer=4), False), (request(expert=3), False)):
        seed = codec.reply_seed(other)
        if same:
            back = codec.restore(frame.claim, frame.payload, max_rows=2, width=4, dtypes=DTYPES, seed=seed)
            assert torch.equal(back, torch.ones(2, 4))
        else:
            with pytest.raises(CodecError, match="CRC-32C"):
                codec.restore(frame.claim, frame.payload, max_rows=2, width=4, dtypes=DTYPES, seed=seed)


@pytest.mark.parametrize("field", ["sequence", "status", "detail", "compute_us", "queue_us", "inflight_tokens"])
def test_a_reply_with_a_changed_header_is_a_corrupt_message(field: str) -> None:
    header = ForwardReply(sequence=7, status=STATUS_OK, detail="a", compute_us=11, queue_us=13, inflight_tokens=17)
    for data in (codec.encode_reply(header, torch.ones(2, 4), request()), codec.encode_refusal(header)):
        message = ForwardReply.FromString(data)
        assert codec.split_reply(data)[0].inflight_tokens == 17
        setattr(message, field, "b" if field == "detail" else getattr(message, field) + 1)
        with pytest.raises(CodecError, match="the header of a reply is damaged") as caught:
            codec.split_reply(message.SerializeToString())
        assert caught.value.status == STATUS_CORRUPT


def test_a_request_without_rows_says_which_it_was() -> None:
    with pytest.raises(CodecError, match="hidden is missing") as caught:
        codec.split_request(request(sequence=41).SerializeToString())
    assert caught.value.sequence == 41


def test_a_reply_without_output_is_an_error_report() -> None:
    got, frame = codec.split_reply(ForwardReply(sequence=3, detail="no").SerializeToString())
    assert (got.sequence, got.detail, frame) == (3, "no", None)


@pytest.mark.parametrize(("width", "dtype"), [(4096, torch.float32), (4096, torch.bfloat16), (1, torch.float16)])
def test_the_largest_message_fits_exactly(width: int, dtype: torch.dtype) -> None:
    rows = codec.max_rows_for(width, dtype)
    assert codec.message_bytes_for(rows, width, dtype) <= MAX_MESSAGE_BYTES
    assert codec.message_bytes_for(rows + 1, width, dtype) > MAX_MESSAGE_BYTES


def test_the_estimate_bounds_a_real_message() -> None:
    full = ForwardRequest(
        sequence=2**64 - 1,
        layer_id=2**32 - 1,
        expert_ids=[2**32 - 1] * 8,
        expert_rows=[2**32 - 1] * 8,
        map_epoch=2**64 - 1,
        deadline_unix_us=2**64 - 1,
    )
    assert len(codec.encode_request(full, torch.zeros(64, 32))) <= codec.message_bytes_for(64, 32, torch.float32)


def test_a_row_that_fits_no_message_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit a message"):
        codec.max_rows_for(MAX_MESSAGE_BYTES, torch.float32)
