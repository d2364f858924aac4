"""Asking a coordinator for room, over real gRPC: what it says is what it does, and a front door goes by it."""

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest

import actors.front.coordinator_client as client_module
from actors.channels import WireCredentials
from actors.coordinator.service import MAX_QUESTIONS, MAX_ROOM
from actors.front.coordinator_client import CoordinatorClient, CoordinatorLost
from actors.front.http_app import create_app
from actors.front.overload import Wanted
from protos.coordinator_pb2 import RoomQuestion, RoomRequest
from tests.support.checkpoints import write_mixtral
from tests.support.engines import GatedExperts, TinyModel
from tests.support.front import MODEL, make_front, run
from tests.support.served import CLOSED, CREDENTIALS, raw_stream, served, submit

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A front door goes without a word that comes late; here each is waited for."""
    monkeypatch.setattr(client_module, "ROOM_TIMEOUT_S", 120.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    path: Path = tmp_path_factory.mktemp("room")
    write_mixtral(path, layers=1, experts=2)
    return TinyModel.load(path)


async def test_a_coordinator_tells_what_it_would_queue(model: TinyModel) -> None:
    experts = GatedExperts(model.experts)
    settings: dict[str, Any] = {"max_waiting_requests": 3, "max_num_seqs": 1, "experts": experts}
    async with served(model, **settings) as one, raw_stream(one.address) as stream:

        async def room(most: int, *tenants: str) -> list[tuple[int, bool]]:
            questions = [RoomQuestion(tenant=tenant, num_tokens=20, most=most) for tenant in tenants]
            reply = await stream.stub.AskRoom(RoomRequest(questions=questions))
            return [(one.num_requests, one.retry_after_ms >= 1000) for one in reply.rooms]

        assert await room(9, "a", "b") == [(3, False), (3, False)]
        assert await room(2, "a") == [(2, False)]
        assert await room(1 << 31, "a") == [(3, False)]
        assert MAX_ROOM >= 3
        experts.gate.clear()  # no place becomes free meanwhile
        await stream.send(*(submit(name, [5] * 20, 450, tenant="a") for name in range(1, 9)))
        while one.service.refused_total == 0:
            await stream.read()
        assert await room(9, "a", "b") == [(0, True), (1, False)], "b would be let in in a's place"
        assert one.engine.counters.displaced == 0, "but is not by asking"


async def test_who_takes_no_requests_tells_of_no_room(model: TinyModel) -> None:
    async with served(model) as one:
        client = CoordinatorClient(one.address, CREDENTIALS)
        request = RoomRequest(questions=[RoomQuestion(tenant="", num_tokens=1, most=1)])
        assert [room.num_requests for room in (await client.room(request)).rooms] == [1]
        too_many = RoomRequest(questions=[RoomQuestion()] * (MAX_QUESTIONS + 1))
        with pytest.raises(CoordinatorLost, match=f"more than {MAX_QUESTIONS} questions"):
            await client.room(too_many)
        one.service.close(CLOSED)
        with pytest.raises(CoordinatorLost, match="no requests are taken"):
            await client.room(request)
        await client.close()
        stranger = CoordinatorClient(one.address, WireCredentials("not-the-token-of-this-cluster"))
        with pytest.raises(CoordinatorLost):
            await stranger.room(request)
        await stranger.close()


def test_a_front_door_takes_as_many_as_there_is_room_for(model: TinyModel, tmp_path: Path) -> None:
    """A crowd at a coordinator with two places: everybody is answered in the end, nobody waits for a refusal's sake."""

    async def work() -> None:
        async with served(model, max_waiting_requests=2, max_num_seqs=2) as one:
            front = make_front(tmp_path, CoordinatorClient(one.address, CREDENTIALS))
            answers: Counter[int] = Counter()
            transport = httpx2.ASGITransport(app=create_app(front))
            async with httpx2.AsyncClient(transport=transport, base_url="http://octavo", timeout=120) as client:

                async def ask() -> None:
                    body = {"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 3, "ignore_eos": True}
                    while (status := (await client.post("/v1/completions", json=body)).status_code) == 429:
                        answers[status] += 1
                        await asyncio.sleep(0.01)
                    answers[status] += 1

                await asyncio.gather(*(ask() for _ in range(40)))
            assert answers[200] == 40
            assert set(answers) <= {200, 429}
            asked_in_vain = one.service.refused_total
            assert answers[429] > asked_in_vain, f"{answers[429]} refusals, {asked_in_vain} of them the coordinator's"
            one.service.close(CLOSED)
            with pytest.raises(CoordinatorLost):
                await front.coordinators.room([Wanted("", 1)])
            await front.close()

    run(work())
