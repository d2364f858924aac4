"""The life of an expert actor: binds, loads, serves, takes a further column, drains, stops; and fails with a reason."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from actors.channels import ChannelError
from actors.expert.actor import ExpertActor
from actors.expert.service import SERVICE
from model.storage.checkpoint import Checkpoint, Expert
from protos import expert_pb2 as pb
from tests.support.checkpoints import write_mixtral
from tests.support.experts import TOKEN, channel_to, run

Changes = dict[str, Any]
Started = tuple[ExpertActor, grpc.aio.Channel]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtral")
    write_mixtral(path, hidden=32, ffn=48, layers=3, experts=4, dtype=torch.float16)
    return path


def arguments(model: Path, changes: Changes | None = None) -> dict[str, Any]:
    return {
        "replica_id": "expert-1-r0",
        "expert_ids": [1],
        "first_layer": 0,
        "num_layers": 3,
        "model": str(model),
        "kernel": "fp32",
        "device": "cpu",
        "auth_token": TOKEN,
        "node_id": "node-7",
        **(changes or {}),
    }


@asynccontextmanager
async def started(model: Path, changes: Changes | None = None) -> AsyncIterator[Started]:
    actor = ExpertActor(**arguments(model, changes))
    address = await actor.start()
    try:
        async with channel_to(address) as channel:
            yield actor, channel
    finally:
        await actor.stop()


async def health(channel: grpc.aio.Channel) -> int:
    stub: Any = health_pb2_grpc.HealthStub(channel)
    return int((await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status)


def test_it_loads_exactly_its_own_weights_and_says_so(model: Path) -> None:
    async def work() -> None:
        kinds = health_pb2.HealthCheckResponse
        async with started(model) as (actor, channel):
            info = await actor.wait_settled()
            owned = Checkpoint.open(model).owned_bytes(Expert(1))
            assert info["state"] == "ready"
            assert (info["bytes_loaded"], info["bytes_total"]) == (owned, owned)
            assert info["load_s"] > 0
            assert (info["replica_id"], info["expert_ids"], info["node_id"]) == ("expert-1-r0", [1], "node-7")
            assert (info["first_layer"], info["num_layers"], info["hidden_size"]) == (0, 3, 32)
            assert (info["kernel"], info["threads"]) == ("fp32", 1)
            assert info["address"].startswith("127.0.0.1:")
            assert info["weight_bytes"] >= 3 * 3 * 32 * 48 * 4
            while await health(channel) != kinds.SERVING:  # set in the same breath as the state
                pass

    run(work())


def test_the_port_is_there_before_the_weights_and_is_not_healthy(model: Path) -> None:
    async def work() -> None:
        actor = ExpertActor(**arguments(model))
        try:
            address = await actor.start()
            assert (await actor.info())["state"] == "loading"
            async with channel_to(address) as channel:
                loading = (await actor.info())["state"] == "loading"
                found = await health(channel)
                assert found == health_pb2.HealthCheckResponse.NOT_SERVING or not loading
            assert await actor.start() == address
        finally:
            await actor.stop()

    run(work())


def test_auto_takes_the_kernel_of_the_checkpoint(model: Path) -> None:
    async def work() -> None:
        async with started(model, {"kernel": "auto", "expert_ids": [0, 3], "num_layers": 2}) as (actor, _):
            info = await actor.wait_settled()
            assert info["expert_ids"] == [0, 3]
            assert info["kernel"] == "fp16"
            assert info["num_layers"] == 2

    run(work())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "/nothing/here"}, "/nothing/here"),
        ({"expert_ids": [4]}, "expert 4 does not exist: the model has 4"),
        ({"num_layers": 4}, r"layers 0\.\.3 are not within 0\.\.2"),
        ({"kernel": "magic"}, "magic"),
    ],
)
def test_what_cannot_be_loaded_shows_in_info(model: Path, changes: dict[str, Any], said: str) -> None:
    async def work() -> None:
        async with started(model, changes) as (actor, channel):
            info = await actor.wait_settled()
            assert info["state"] == "failed"
            with pytest.raises(AssertionError, match=said):
                raise AssertionError(info["detail"])
            assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING

    run(work())


def test_a_further_column_is_loaded_while_serving(model: Path) -> None:
    async def work() -> None:
        async with started(model) as (actor, channel):
            await actor.wait_settled()
            load: Any = channel.unary_unary(
                f"/{SERVICE}/LoadColumn", pb.LoadColumnRequest.SerializeToString, pb.LoadColumnReply.FromString
            )
            reply = await load(pb.LoadColumnRequest(expert_id=2, first_layer=0, num_layers=3))
            assert reply.status == pb.STATUS_OK
            assert reply.weight_bytes > 0
            assert (await actor.info())["expert_ids"] == [1, 2]
            again = await load(pb.LoadColumnRequest(expert_id=2, first_layer=0, num_layers=3))
            assert (again.status, again.weight_bytes) == (pb.STATUS_OK, 0)
            part = await load(pb.LoadColumnRequest(expert_id=3, first_layer=1, num_layers=1))
            assert part.status == pb.STATUS_OK
            assert (await actor.info())["expert_ids"] == [1, 2]  # 3 is not held in all layers
            wrong = await load(pb.LoadColumnRequest(expert_id=0, first_layer=2, num_layers=2))
            assert wrong.status == pb.STATUS_INVALID
            assert "layers 2..3" in wrong.detail

    run(work())


def test_drain_takes_it_out_of_service(model: Path) -> None:
    async def work() -> None:
        async with started(model) as (actor, channel):
            await actor.wait_settled()
            assert await actor.drain(1) == 0
            assert (await actor.info())["state"] == "draining"
            assert await health(channel) == health_pb2.HealthCheckResponse.NOT_SERVING

    run(work())


def test_stop_frees_the_port_and_before_start_is_nothing(model: Path) -> None:
    async def work() -> None:
        never = ExpertActor(**arguments(model))
        assert await never.drain(1) == 0
        await never.stop()
        async with started(model) as (actor, _):
            port = int((await actor.info())["address"].split(":")[1])
            with pytest.raises(ChannelError, match="cannot listen"):
                await ExpertActor(**arguments(model, {"port": port})).start()
        async with started(model, {"port": port}) as (actor, _):
            assert (await actor.wait_settled())["state"] == "ready"

    run(work())


def test_stop_while_loading_ends_the_loading(model: Path) -> None:
    async def work() -> None:
        actor = ExpertActor(**arguments(model))
        await actor.start()
        await actor.stop()
        assert not [task for task in asyncio.all_tasks() if "_load_all" in repr(task)]

    run(work())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"replica_id": ""}, "replica_id"),
        ({"expert_ids": []}, "expert_ids"),
        ({"expert_ids": [1, 1]}, "expert_ids"),
        ({"expert_ids": [-1]}, "expert_ids"),
        ({"first_layer": -1}, "first_layer"),
        ({"num_layers": 0}, "num_layers"),
        ({"max_queue_tokens": 0}, "max_queue_tokens"),
        ({"threads": 0}, "threads"),
    ],
)
def test_arguments_that_make_no_sense(model: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ExpertActor(**arguments(model, changes))
