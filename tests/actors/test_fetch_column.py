"""A replica loads from another one over real gRPC: the same bits, whatever goes wrong on the way and at either end."""

import asyncio
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from actors.expert.giving import MAX_RECEIVERS
from actors.expert.loading import LayerLoader
from model.experts import ExpertColumn
from model.storage.checkpoint import Checkpoint
from model.tensor_checksum import tensor_checksum
from protos import expert_pb2 as pb
from protos.codec import CodecError
from protos.pieces import PIECE_BYTES, Piece, PieceRefused, encode_no_piece, encode_piece, split_piece
from tests.support import expert_process
from tests.support.columns import (
    COLUMN_BYTES,
    EXPERTS,
    HIDDEN,
    LAYER_BYTES,
    LAYERS,
    MESSAGES,
    WEIGHT_BYTES,
    arguments,
    assert_same_bits,
    begun,
    elsewhere,
    false_donor,
    fetch_of,
    honest,
    nowhere,
    silent_from,
    started,
    until,
    write_model,
)
from tests.support.experts import channel_to, run

LAYER_MESSAGES = 3 * MESSAGES


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    write_model(path)
    return path


async def pieces_of(channel: grpc.aio.Channel, expert: int, first: int, num: int) -> list[Piece]:
    request = pb.FetchColumnRequest(expert_id=expert, first_layer=first, num_layers=num)
    return [split_piece(data) async for data in fetch_of(channel)(request)]


async def refusal_of(channel: grpc.aio.Channel, expert: int, first: int, num: int) -> tuple[str, str]:
    with pytest.raises(PieceRefused) as caught:
        await pieces_of(channel, expert, first, num)
    return pb.Status.Name(caught.value.status), str(caught.value)


def test_a_replica_without_a_checkpoint_gets_everything_from_a_peer(model: Path) -> None:
    async def work() -> None:
        async with started(**arguments(model, expert_ids=[0, 1])) as (_, donor):
            assert (donor["loaded_from_peer_bytes"], donor["loaded_from_disk_bytes"]) == (0, 2 * COLUMN_BYTES)
            async with started(**nowhere(model, sources=[donor["address"]])) as (actor, info):
                assert info["state"] == "ready", info["detail"]
                assert (info["loaded_from_peer_bytes"], info["loaded_from_disk_bytes"]) == (COLUMN_BYTES, 0)
                assert (info["bytes_loaded"], info["bytes_total"]) == (COLUMN_BYTES, COLUMN_BYTES)
                assert info["numerics_domain"] == donor["numerics_domain"]
                assert (info["ready_layers"], info["hidden_size"]) == (LAYERS, HIDDEN)
                assert_same_bits(actor, model)

    run(work())


def test_several_experts_come_from_several_peers_of_which_each_has_some(model: Path) -> None:
    async def work() -> None:
        async with (
            started(**arguments(model, expert_ids=[2], num_layers=2)) as (_, front),
            started(**arguments(model, expert_ids=[3, 2], first_layer=2, num_layers=1)) as (_, back),
            started(**arguments(model, expert_ids=[3], num_layers=2)) as (_, other),
        ):
            sources = [one["address"] for one in (front, back, other)]
            async with started(**nowhere(model, expert_ids=[2, 3], sources=sources)) as (actor, info):
                assert info["state"] == "ready", info["detail"]
                assert info["loaded_from_peer_bytes"] == 2 * COLUMN_BYTES
                assert_same_bits(actor, model, (2, 3))

    run(work())


def test_two_receivers_at_once_and_what_is_sent_is_what_is_stored(model: Path) -> None:
    async def work() -> None:
        async with started(**arguments(model)) as (_, donor):
            sources = [donor["address"]]
            async with (
                begun(**nowhere(model, sources=sources)) as first,
                begun(**nowhere(model, replica_id="expert-1-r2", sources=sources)) as second,
                channel_to(donor["address"]) as channel,
            ):
                pieces = await pieces_of(channel, 1, 0, LAYERS)
                for actor in (first, second):
                    assert (await actor.wait_settled())["loaded_from_peer_bytes"] == COLUMN_BYTES
                    assert_same_bits(actor, model)
        assert max(len(piece.elements) for piece in pieces) == PIECE_BYTES
        assert len(pieces) == LAYERS * LAYER_MESSAGES
        order = list(dict.fromkeys((piece.layer, piece.part) for piece in pieces))
        assert order == [(layer, part) for layer in range(LAYERS) for part in ("w1", "w3", "w2")]
        for layer, part in order:
            found = [piece for piece in pieces if (piece.layer, piece.part) == (layer, part)]
            stored = Checkpoint.open(model).read(f"layers.{layer}.experts.1.{part}")
            together = torch.cat([piece.elements for piece in found])
            assert torch.equal(together, stored.view(-1).view(torch.uint8))
            assert found[-1].weight_crc32 == tensor_checksum(stored)
            assert {(piece.shape, piece.dtype) for piece in found} == {(tuple(stored.shape), stored.dtype)}

    run(work())


def test_what_a_donor_does_not_give(model: Path) -> None:
    async def work() -> None:
        async with (
            started(**arguments(model, num_layers=2)) as (actor, donor),
            channel_to(donor["address"]) as channel,
        ):
            assert await refusal_of(channel, 2, 0, 1) == (
                "STATUS_NOT_HELD",
                "this replica does not hold expert 2 in layer 0",
            )
            status, detail = await refusal_of(channel, 1, 0, 3)
            assert (status, detail) == ("STATUS_NOT_HELD", "this replica does not hold expert 1 in layer 2")
            for expert, first, num in ((EXPERTS, 0, 1), (1, 0, 0), (1, 3, 1), (1, 1, 2**32 - 1), (2**32 - 1, 0, 1)):
                status, detail = await refusal_of(channel, expert, first, num)
                assert status == "STATUS_INVALID", detail
                assert f"expert_id {expert}, layers {first} + {num}: expected an expert below 4" in detail
            async with (
                started(**nowhere(model, num_layers=2, sources=[donor["address"]])) as (_, other),
                channel_to(other["address"]) as to_other,
            ):
                status, detail = await refusal_of(to_other, 1, 0, 1)
                assert (status, detail) == (
                    "STATUS_NOT_HELD",
                    "this replica has no checkpoint of its own to give weights from",
                )
            await actor.drain(1)
            assert (await refusal_of(channel, 1, 0, 1))[0] == "STATUS_DRAINING"

    run(work())


def test_the_ninth_receiver_is_turned_away_and_room_comes_back_when_one_goes(model: Path) -> None:
    async def work() -> None:
        async with (
            started(**arguments(model)) as (actor, donor),
            channel_to(donor["address"]) as channel,
        ):
            assert actor._service is not None
            giver = actor._service.giver
            request = pb.FetchColumnRequest(expert_id=1, first_layer=0, num_layers=LAYERS)
            calls = [fetch_of(channel)(request) for _ in range(MAX_RECEIVERS)]
            for call in calls:  # the first piece is read, and then nothing: the rest waits at the donor
                await call.read()
            assert giver.receivers == MAX_RECEIVERS
            status, detail = await refusal_of(channel, 1, 0, 1)
            assert (status, detail) == ("STATUS_OVERLOADED", "8 replicas are being given weights already")
            for call in calls:
                call.cancel()
            await until(lambda: giver.receivers == 0)
            assert len(await pieces_of(channel, 1, 0, 1)) == LAYER_MESSAGES

    run(work())


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def changed_weight(piece: Piece) -> bytes:
    """Right in itself, but a bit of the weight is another: as if it was flipped before the sender's checksum."""
    elements = piece.elements.clone()
    elements[7] ^= 4
    return encode_piece(replace(piece, elements=elements))


TAMPERED: dict[str, tuple[Callable[[Piece, bytes], bytes], str]] = {
    "a flipped bit of the payload": (lambda _piece, data: flipped(data, 8 * len(data) - 3), "STATUS_CORRUPT"),
    "a bit flipped before": (lambda piece, _data: changed_weight(piece), "STATUS_CORRUPT: layers.1.experts.1.w1 has"),
    "another layer": (lambda piece, _data: encode_piece(replace(piece, layer=0)), "STATUS_INVALID: sent"),
    "another expert": (lambda piece, _data: encode_piece(replace(piece, expert=2)), "STATUS_INVALID: sent"),
    "another part": (lambda piece, _data: encode_piece(replace(piece, part="w3")), "STATUS_INVALID: sent"),
    "another place": (lambda piece, _data: encode_piece(replace(piece, offset=2)), "STATUS_INVALID: sent"),
    "another shape": (lambda piece, _data: encode_piece(replace(piece, shape=(piece.shape[::-1]))), "STATUS_INVALID"),
    "another dtype": (
        lambda piece, _data: encode_piece(replace(piece, dtype=torch.bfloat16)),
        "STATUS_CORRUPT|STATUS_INVALID",
    ),
    "no message": (lambda _piece, _data: b"\xff" * 9, "STATUS_CORRUPT: not a ColumnPiece"),
    "an empty message": (lambda _piece, _data: b"", "UNSPECIFIED|STATUS_INVALID"),
    "a refusal": (lambda _piece, _data: encode_no_piece(pb.STATUS_INTERNAL, "no"), "STATUS_INTERNAL: no"),
}


@pytest.mark.parametrize("what", TAMPERED)
def test_one_wrong_piece_costs_its_layer_and_nothing_else(
    model: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The first piece of the second layer. That layer comes from disk, the others from the peer."""
    change, said = TAMPERED[what]

    async def tamper(number: int, data: bytes) -> bytes:
        return change(split_piece(data), data) if number == LAYER_MESSAGES else data

    async def work() -> None:
        async with (
            started(**arguments(model)) as (_, donor),
            false_donor(donor["address"], tamper) as (address, false),
            started(**arguments(model, sources=[address])) as (actor, info),
        ):
            assert info["state"] == "ready", info["detail"]
            assert info["loaded_from_disk_bytes"] == LAYER_BYTES
            assert info["loaded_from_peer_bytes"] == COLUMN_BYTES - LAYER_BYTES
            assert info["bytes_loaded"] == COLUMN_BYTES
            assert false.calls == LAYERS
            assert_same_bits(actor, model)

    run(work())
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(caplog.text)


def test_a_thousand_flipped_bits_and_none_passes(model: Path) -> None:
    """Anywhere in a message. Either it is found, or it changed nothing that is used."""

    async def work() -> None:
        async with started(**arguments(model)) as (_, donor), channel_to(donor["address"]) as channel:
            request = pb.FetchColumnRequest(expert_id=1, first_layer=1, num_layers=1)
            messages = [data async for data in fetch_of(channel)(request)]
        found, random_bits = 0, random.Random(3)
        for _ in range(1000):
            data = random_bits.choice(messages)
            where = random_bits.choice([random_bits.randrange(8 * 64), random_bits.randrange(8 * len(data))])
            try:
                piece = split_piece(flipped(data, where))
            except (CodecError, PieceRefused):
                found += 1
                continue
            whole = split_piece(data)
            same = torch.equal(piece.elements, whole.elements)
            assert same, where
            assert replace(piece, elements=whole.elements).weight_crc32 == whole.weight_crc32, where
            for name in ("layer", "expert", "part", "dtype", "shape", "offset"):
                assert getattr(piece, name) == getattr(whole, name), where
        assert found > 950

    run(work())


def test_another_checkpoint_of_the_same_shape_is_not_believed(model: Path, tmp_path: Path) -> None:
    """All checksums that the donor sends are right: only the manifest's, which the receiver was given, tell."""
    shutil.copytree(model, tmp_path / "other")
    name = "layers.2.experts.1.w2"
    stored, start, _ = Checkpoint.open(tmp_path / "other").stored(name)
    with stored.path.open("r+b") as file:
        file.seek(stored.start + start)
        file.write(b"\x01\x02")

    async def work() -> None:
        async with (
            started(**elsewhere(model, tmp_path / "other", checksums=None)) as (_, donor),
            started(**arguments(model, sources=[donor["address"]])) as (actor, info),
        ):
            assert info["loaded_from_disk_bytes"] == LAYER_BYTES
            assert_same_bits(actor, model)

    run(work())


def test_a_donor_whose_file_is_damaged_says_so_and_gives_the_rest(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "damaged")

    async def work() -> None:
        async with (
            started(**elsewhere(model, tmp_path / "damaged")) as (_, donor),
            channel_to(donor["address"]) as channel,
        ):
            stored, start, _ = Checkpoint.open(tmp_path / "damaged").stored("layers.0.experts.1.w3")
            with stored.path.open("r+b") as file:
                file.seek(stored.start + start + WEIGHT_BYTES - 1)
                last = file.read(1)[0]
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([last ^ 1]))
            status, detail = await refusal_of(channel, 1, 0, 1)
            assert status == "STATUS_CORRUPT"
            assert "layers.0.experts.1.w3 is damaged: CRC-32C" in detail
            assert len(await pieces_of(channel, 1, 1, 1)) == LAYER_MESSAGES
            os.truncate(stored.path, stored.start + start + 10)
            status, detail = await refusal_of(channel, 1, 0, 1)
            assert status == "STATUS_INTERNAL"
            assert "truncated after it was opened" in detail

    run(work())


@pytest.mark.parametrize("second", ["disk", "peer"])
def test_a_donor_that_is_killed_half_way(model: Path, second: str) -> None:
    """What came from it and was verified stays; the layer under way comes from whoever is next."""

    async def work() -> None:
        async with AsyncExitStack() as stack:
            process, donor = await expert_process.spawn(**arguments(model))
            stack.push_async_callback(expert_process.end, process)
            at_layer_1 = asyncio.Event()

            async def tamper(number: int, data: bytes) -> bytes:
                if number == LAYER_MESSAGES + 1:
                    process.send_signal(signal.SIGKILL)
                    await process.wait()
                    at_layer_1.set()
                    raise ConnectionResetError  # the real connection is gone, and this one goes with it
                return data

            address, _ = await stack.enter_async_context(false_donor(donor["address"], tamper))
            sources, make = [address], arguments
            if second == "peer":
                _, spare = await stack.enter_async_context(started(**arguments(model)))
                sources, make = [address, spare["address"]], nowhere
            actor, info = await stack.enter_async_context(started(**make(model, sources=sources)))
            assert at_layer_1.is_set()
            assert info["state"] == "ready", info["detail"]
            from_disk = COLUMN_BYTES - LAYER_BYTES if second == "disk" else 0
            assert info["loaded_from_disk_bytes"] == from_disk
            assert info["loaded_from_peer_bytes"] == COLUMN_BYTES - from_disk
            assert_same_bits(actor, model)

    run(work())


def test_a_donor_that_is_really_killed_while_it_sends(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing stands between: the connection itself breaks while a piece is waited for.

    The pace leaves it time to; should the machine not, the last layer is not asked for before.
    """
    load, dead = LayerLoader.load, threading.Event()

    def held(loader: LayerLoader, expert: int, layer: int) -> ExpertColumn:
        assert layer < LAYERS - 1 or dead.wait(200)
        return load(loader, expert, layer)

    monkeypatch.setattr(LayerLoader, "load", held)

    async def work() -> None:
        process, donor = await expert_process.spawn(**arguments(model))
        try:
            slow = arguments(model, sources=[donor["address"]], load_bytes_per_s=4 << 20)
            async with begun(**slow) as actor:
                await until(lambda: actor._replica.ready_layers > 0)
                process.kill()
                await process.wait()
                dead.set()
                info = await actor.wait_settled()
                assert info["state"] == "ready", info["detail"]
                assert info["loaded_from_peer_bytes"] + info["loaded_from_disk_bytes"] == COLUMN_BYTES
                assert LAYER_BYTES <= info["loaded_from_peer_bytes"] < COLUMN_BYTES
                assert_same_bits(actor, model)
        finally:
            dead.set()
            await expert_process.end(process)

    run(work())


def test_a_receiver_that_goes_ends_the_call_at_its_donor(model: Path) -> None:
    async def work() -> None:
        tamper, _ = silent_from(2)
        async with (
            started(**arguments(model)) as (actor, donor),
            false_donor(donor["address"], tamper) as (address, false),
        ):
            assert actor._service is not None
            async with begun(**nowhere(model, sources=[address])):
                await until(lambda: false.open > 0)
            giver = actor._service.giver
            await until(lambda: not false.open and not giver.receivers)

    run(work())


def test_nobody_gives_what_is_asked_for(model: Path) -> None:
    async def work() -> None:
        async with started(**arguments(model, expert_ids=[0])) as (_, donor):
            async with started(**nowhere(model, sources=["127.0.0.1:1"])) as (_, info):
                assert info["state"] == "failed"
                assert "expert 1, layer 0: not had from peers (127.0.0.1:1), and there is no usable" in info["detail"]
                assert "/nothing/here" in info["detail"]
            async with started(**nowhere(model)) as (_, info):
                assert info["state"] == "failed"
                assert "/nothing/here" in info["detail"]
            async with started(**nowhere(model, sources=[donor["address"]], model_facts=None)) as (_, info):
                assert info["state"] == "failed"
                assert "/nothing/here" in info["detail"]
            async with started(**arguments(model, sources=[donor["address"], "127.0.0.1:1"])) as (actor, info):
                assert info["loaded_from_disk_bytes"] == COLUMN_BYTES
                assert_same_bits(actor, model)

    run(work())


def test_weights_are_for_those_with_the_token(model: Path) -> None:
    async def work() -> None:
        async with started(**arguments(model)) as (_, donor):
            async with started(**arguments(model, auth_token="another", sources=[donor["address"]])) as (_, info):
                assert (info["loaded_from_peer_bytes"], info["loaded_from_disk_bytes"]) == (0, COLUMN_BYTES)
            async with (
                false_donor(donor["address"], honest) as (address, _),
                started(**nowhere(model, sources=[address])) as (_, info),
            ):
                assert info["loaded_from_peer_bytes"] == COLUMN_BYTES

    run(work())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"load_bytes_per_s": 1000}, "load_bytes_per_s is 1000, expected at least 65536, or None"),
        ({"model_facts": {"hidden_size": 1}}, "model_facts has hidden_size; expected dtype, ffn_size, hidden_size"),
        ({"ffn_size": 0}, "model_facts: ffn_size is 0, expected a whole number"),
        ({"dtype": "float8"}, "model_facts: dtype is 'float8', expected one of float32, float16, bfloat16"),
    ],
)
def test_arguments_that_make_no_sense(model: Path, changes: dict[str, Any], said: str) -> None:
    kwargs = arguments(model)
    for name, value in changes.items():
        target = kwargs if name in kwargs or name == "load_bytes_per_s" else kwargs["model_facts"]
        target[name] = value

    async def work() -> None:
        with pytest.raises(ValueError, match=said):
            async with begun(**kwargs):
                raise AssertionError

    run(work())
