"""Decoders of what other processes send: gRPC messages, frames of weights, lane frames, published maps, Submits."""

from pathlib import Path

import torch
from google.protobuf.message import DecodeError

from actors.coordinator.submit_check import InvalidSubmit, SubmitLimits, check_submit
from actors.expert.merge import unpack_merge
from actors.map_wire import MapRefused, map_from_wire
from protos import frames
from protos.checksum import checksum
from protos.codec import (
    CodecError,
    check_undamaged,
    encode_refusal,
    encode_reply,
    encode_request,
    reply_seed,
    request_seed,
    restore,
    split_reply,
    split_request,
)
from protos.coordinator_pb2 import (
    Cancel,
    GenerateReply,
    GenerateRequest,
    PublishMapRequest,
    Replica,
    Sampling,
    SequenceOutput,
    Submit,
)
from protos.expert_pb2 import STATUS_OK, STATUS_OVERLOADED, ColumnPiece, ForwardReply, ForwardRequest, Merge
from protos.lane import Hello, LaneReply, LaneRequest, Segment
from protos.outputs import is_last
from protos.pieces import Piece, PieceRefused, encode_no_piece, encode_piece, split_piece
from tests.fuzz.target import MIB, Target

WIDTH = 8
MAX_ROWS = 4096
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMITS = SubmitLimits(vocab_size=300, max_model_len=512, request_timeout_s=60.0)
REGION_ROWS, REGION_REPLIES = 64, 32


def _forward(rows: int, merge: Merge | None = None) -> bytes:
    header = ForwardRequest(
        sequence=7, layer_id=1, expert_ids=[0, 3], expert_rows=[1, rows - 1], map_epoch=2, deadline_unix_us=2**50
    )
    if merge is not None:
        header.merge.CopyFrom(merge)
    return encode_request(header, torch.arange(rows * WIDTH, dtype=torch.float32).view(rows, WIDTH))


def forward_request(_: Path) -> Target:
    """A message to an expert, up to the rows that would be computed."""

    def decode(data: bytes) -> object:
        frame = split_request(data)
        check_undamaged(frame)
        hidden = restore(
            frame.claim,
            frame.payload,
            max_rows=MAX_ROWS,
            width=WIDTH,
            dtypes=DTYPES,
            seed=request_seed(frame.header),
        )
        assert hidden.shape[1] == WIDTH
        assert hidden.nbytes == len(frame.payload)
        merged = unpack_merge(frame.header, len(hidden))
        if merged is not None:
            assert int(merged.entries_M.max()) < len(hidden)
        return hidden

    def repair(data: bytes) -> bytes:
        try:
            request = ForwardRequest.FromString(data)
        except DecodeError:
            return data
        claim, payload = request.hidden, request.hidden.payload
        seed = checksum(_shape_bytes(claim.dtype, list(claim.shape)), request_seed(request))
        request.hidden.crc32 = checksum(payload, seed)
        return request.SerializeToString()

    entries = torch.tensor([0, 1], dtype=torch.int32).numpy().tobytes()
    weights = torch.tensor([0.5, 0.5]).numpy().tobytes()
    return Target(
        name="forward_request",
        decode=decode,
        errors=(CodecError,),
        seeds=(_forward(2), _forward(3, None), _forward(2, Merge(entries=entries, weights=weights)), _forward(3000)),
        repair=repair,
        quick=1500,
        share=2,
    )


def _shape_bytes(dtype: int, shape: list[int]) -> bytes:
    return b"".join(number.to_bytes(4, "little") for number in (dtype & 0xFFFFFFFF, *shape))


def forward_reply(_: Path) -> Target:
    """An expert's answer."""
    asked = ForwardRequest.FromString(_forward(2))
    header = ForwardReply(sequence=7, status=STATUS_OK, compute_us=5, queue_us=6, inflight_tokens=7)

    def decode(data: bytes) -> object:
        reply, frame = split_reply(data)
        if frame is not None:
            seed = reply_seed(asked)
            restore(frame.claim, frame.payload, max_rows=MAX_ROWS, width=WIDTH, dtypes=DTYPES, seed=seed)
        return reply

    return Target(
        name="forward_reply",
        decode=decode,
        errors=(CodecError,),
        seeds=(
            encode_refusal(ForwardReply(sequence=7, status=STATUS_OVERLOADED, detail="full")),
            ForwardReply(sequence=7, status=STATUS_OVERLOADED, detail="é" * 100).SerializeToString(),
            encode_reply(header, torch.ones(2, WIDTH), asked),
            encode_reply(header, torch.ones(3000, WIDTH), asked),
        ),
        quick=1500,
    )


def frame(_: Path) -> Target:
    """The fast path that takes large messages apart by itself; protobuf is its judge."""

    def decode(data: bytes) -> object:
        split = frames.split(data, ForwardRequest, ForwardRequest.HIDDEN_FIELD_NUMBER, small_bytes=0)
        whole = ForwardRequest.FromString(data)
        assert (split is None) == (not whole.HasField("hidden"))
        if split is not None:
            assert bytes(split.payload) == whole.hidden.payload
        return split

    return Target(
        name="frame", decode=decode, errors=(DecodeError,), seeds=(_forward(2), _forward(40)), quick=2000, share=2
    )


def weight_piece(_: Path) -> Target:
    """A piece of a weight from another replica."""
    elements = torch.arange(64, dtype=torch.uint8)
    piece = Piece(1, 2, "w3", torch.float16, (16, 4), 64, elements, 0xABCDEF)

    def decode(data: bytes) -> object:
        try:
            taken = split_piece(data)
        except PieceRefused as refusal:  # as good an answer as a piece
            return refusal
        assert taken.stop <= taken.weight_bytes
        return taken

    def repair(data: bytes) -> bytes:
        try:
            message = ColumnPiece.FromString(data)
        except DecodeError:
            return data
        from protos.pieces import _seed  # the tests' own checksum would be the same lines again

        message.piece.crc32 = checksum(message.piece.payload, _seed(message, message.piece))
        return message.SerializeToString()

    return Target(
        name="weight_piece",
        decode=decode,
        errors=(CodecError,),
        seeds=(encode_piece(piece), encode_no_piece(STATUS_OVERLOADED, "not now")),
        repair=repair,
        quick=1500,
    )


def _resealed(data: bytes) -> bytes:
    content = data[4:]
    return checksum(content).to_bytes(4, "little") + content


def lane_request(_: Path) -> Target:
    """A frame that says where in shared memory rows lie."""

    def decode(data: bytes) -> object:
        request = LaneRequest.unpack(data, num_rows=REGION_ROWS, num_replies=REGION_REPLIES)
        assert request.sequence
        assert all(0 <= one.first_row <= one.first_row + one.num_rows <= REGION_ROWS for one in request.segments)
        assert request.reply_row + request.num_rows <= REGION_REPLIES
        return request

    one = LaneRequest(9, 1, 2, 2**50, 0, (Segment(3, 5, 2),), 77)
    return Target(
        name="lane_request",
        decode=decode,
        errors=(CodecError,),
        seeds=(one.pack(), one._replace(segments=tuple(Segment(i, i, 1) for i in range(16))).pack()),
        repair=_resealed,
        base_bytes=64 << 10,
        quick=3000,
        share=4,
    )


def lane_reply(_: Path) -> Target:
    """A frame that says how rows were answered."""
    return Target(
        name="lane_reply",
        decode=LaneReply.unpack,
        errors=(CodecError,),
        seeds=(LaneReply(9, STATUS_OK, 5, 6, "", 7, 8).pack(), LaneReply(9, STATUS_OVERLOADED, detail="é full").pack()),
        repair=_resealed,
        base_bytes=64 << 10,
        quick=3000,
        share=4,
    )


def lane_hello(_: Path) -> Target:
    """The first frame of a lane."""
    return Target(
        name="lane_hello",
        decode=Hello.unpack,
        errors=(CodecError,),
        seeds=(Hello(b"t" * 16, 64, 32, 32).pack(),),
        base_bytes=64 << 10,
        quick=3000,
        share=2,
    )


def _submit() -> Submit:
    return Submit(
        request_id=1,
        prompt_token_ids=[5, 6, 7],
        max_tokens=4,
        stop_token_ids=[9],
        logprobs=2,
        min_tokens=1,
        generated_token_ids=[8],
        sampling=Sampling(temperature=0.5, top_p=0.5, top_k=3, seed=2**63, repetition_penalty=1.5),
    )


def submit(_: Path) -> Target:
    """What an ingress or a client asks of a coordinator."""

    def decode(data: bytes) -> object:
        request = GenerateRequest.FromString(data)
        checked = check_submit(request.submit, LIMITS, now_s=0.0, now_unix_s=0.0)
        assert max((*checked.prompt_ids, *checked.stop_token_ids, *checked.generated_ids)) < LIMITS.vocab_size
        assert len(checked.prompt_ids) + checked.max_tokens <= LIMITS.max_model_len
        return checked

    return Target(
        name="submit",
        decode=decode,
        errors=(DecodeError, InvalidSubmit),
        seeds=(GenerateRequest(submit=_submit()).SerializeToString(),),
        quick=3000,
        share=3,
    )


def generate_reply(_: Path) -> Target:
    """What a coordinator tells an ingress."""

    def decode(data: bytes) -> object:
        reply = GenerateReply.FromString(data)
        return [is_last(output) for output in reply.outputs]

    output = SequenceOutput(request_id=1, token_ids=[5, 6], error="é", routed_experts=[b"\0\1"], finish_reason=2)
    cancel = GenerateRequest(cancel=Cancel(request_id=4)).SerializeToString()
    return Target(
        name="generate_reply",
        decode=decode,
        errors=(DecodeError,),
        seeds=(GenerateReply(outputs=[output, output]).SerializeToString(), cancel),
        quick=2000,
    )


def expert_map(_: Path) -> Target:
    """A map that is published to a coordinator: its sizes are claims."""
    replicas = [
        Replica(replica_id=f"r{i}", expert_ids=[i], num_layers=2, address=f"127.0.0.1:{i + 1}", node_id="n")
        for i in range(4)
    ]
    message = PublishMapRequest(map_epoch=3, num_layers=2, num_experts=4, replicas=replicas)

    def decode(data: bytes) -> object:
        return map_from_wire(PublishMapRequest.FromString(data))

    return Target(
        name="expert_map",
        decode=decode,
        errors=(DecodeError, MapRefused),
        seeds=(message.SerializeToString(),),
        base_bytes=512 * MIB,  # a map of 2^20 places is allowed
        max_s=20.0,
        quick=800,
    )
