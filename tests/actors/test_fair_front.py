"""Keys, turns and secrets over a whole cluster in one process: HTTP, gRPC, scheduler and arithmetic together."""

import asyncio
import dataclasses
import logging
from pathlib import Path
from typing import Any

import httpx2
import pytest

from actors.front.api_keys import one_key
from actors.front.http_app import create_app
from actors.front.key_file import Keys
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.held_steps import hold_steps
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

MODEL = "tiny"
TEXT = "/v1/completions"
KEYS = {name: f"key-of-{name}-for-these-tests" for name in ("many", "one", "other")}
CANARY = "canary-8f3a1c-canary"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    write_mixtral(path)
    write_byte_tokenizer(path, 300)
    return path


def guarded(cluster: TinyCluster) -> Any:
    entries = tuple(one_key(name, key) for name, key in KEYS.items())
    return create_app(dataclasses.replace(cluster.front, keys=Keys(None, entries)))


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[name]}"}


def test_who_asks_for_little_is_served_between_those_who_ask_for_much(model_dir: Path) -> None:
    """One place, a full queue: the newcomer's request is taken in another's place, and comes next."""
    done: list[tuple[str, int, int]] = []

    async def work() -> None:
        async with (
            tiny_cluster(model_dir, max_num_seqs=1, max_waiting_requests=6) as cluster,
            serving(guarded(cluster)) as url,
            httpx2.AsyncClient(base_url=url, timeout=200) as client,
        ):

            async def ask(name: str, number: int, **more: Any) -> None:
                body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 40, "ignore_eos": True, **more}
                response = await client.post(TEXT, json=body, headers=bearer(name))
                done.append((name, number, response.status_code))

            await ask("many", -1)  # before anything has ended nobody knows how long a wait would be
            done.clear()
            gate, crowd = hold_steps(cluster.coordinator._engine), []
            for number in range(7):
                crowd.append(asyncio.create_task(ask("many", number)))
                await cluster.until(lambda now, most=number + 1: now.num_running + now.num_waiting == most)
            urgent = asyncio.create_task(ask("one", 1))
            await cluster.until(lambda now: now.displaced_total == 1)
            snapshot = await cluster.snapshot()
            assert snapshot.num_waiting_tenants == 2
            gate.set()
            await asyncio.gather(*crowd, urgent)

    run(work())
    order = [(name, number) for name, number, status in done if status == 200]
    assert ("many", 6, 429) in done, "the last of the longest line"
    assert len(order) == 7
    assert order.index(("one", 1)) <= 2, f"not behind all others: {order}"
    assert [number for name, number in order if name == "many"] == [0, 1, 2, 3, 4, 5]


def test_priorities_order_a_tenants_own_requests(model_dir: Path) -> None:
    done: list[int] = []

    async def work() -> None:
        async with (
            tiny_cluster(model_dir, max_num_seqs=1) as cluster,
            serving(guarded(cluster)) as url,
            httpx2.AsyncClient(base_url=url, timeout=200) as client,
        ):

            async def ask(priority: int) -> None:
                body = {"model": MODEL, "prompt": [5, 6], "max_tokens": 40, "ignore_eos": True, "priority": priority}
                assert (await client.post(TEXT, json=body, headers=bearer("one"))).status_code == 200
                done.append(priority)

            await ask(0)
            done.clear()
            gate, asked = hold_steps(cluster.coordinator._engine), []
            for count, priority in enumerate((99, 5, 0, -5, 1)):
                asked.append(asyncio.create_task(ask(priority)))
                await cluster.until(lambda now, most=count + 1: now.num_running + now.num_waiting == most)
            gate.set()
            await asyncio.gather(*asked)

    run(work())
    assert done == [99, -5, 0, 1, 5], "the first began before the others came"


def test_prompts_and_keys_are_in_no_log(model_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever is asked, well or badly, and whatever breaks; every logger at its most talkative."""
    caplog.set_level(logging.DEBUG)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "grpc", "actors", "cluster", "model"):
        caplog.set_level(logging.DEBUG, logger=name)
    say = [{"role": "user", "content": CANARY}]
    bad: list[tuple[str, Any]] = [
        (TEXT, {"model": MODEL, "prompt": CANARY, "temperature": CANARY}),
        (TEXT, {"model": CANARY, "prompt": CANARY}),
        (TEXT, {"model": MODEL, "prompt": CANARY, "stop": [CANARY] * 9}),
        (TEXT, {"model": MODEL, "prompt": CANARY * 5000}),
        (TEXT, {"model": MODEL, "prompt": CANARY, "user": CANARY, "n": 9999}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [{"role": CANARY, "content": CANARY}]}),
        ("/v1/chat/completions", {"model": MODEL, "messages": say, "tools": [CANARY]}),
        ("/v1/chat/completions", {"model": MODEL, "messages": [CANARY]}),
    ]

    async def work() -> None:
        async with (
            tiny_cluster(model_dir) as cluster,
            serving(guarded(cluster)) as url,
            httpx2.AsyncClient(base_url=url, timeout=200, headers=bearer("one")) as client,
        ):
            for stream in (False, True):
                good = {"model": MODEL, "prompt": CANARY, "max_tokens": 4, "stream": stream}
                assert (await client.post(TEXT, json=good)).status_code == 200
                chat = {"model": MODEL, "messages": say, "max_tokens": 4, "stream": stream}
                assert (await client.post("/v1/chat/completions", json=chat)).status_code == 200
            for path, body in bad:
                assert (await client.post(path, json=body)).status_code in (400, 404)
            broken = b'{"model": "tiny", "prompt": "' + CANARY.encode()
            assert (await client.post(TEXT, content=broken)).status_code == 400
            wrong = {"Authorization": f"Bearer {CANARY}"}
            assert (await client.post(TEXT, json=bad[0][1], headers=wrong)).status_code == 401
            object.__setattr__(cluster.front.tokenizer, "encode", _breaks)
            failed = await client.post(TEXT, json={"model": MODEL, "prompt": CANARY})
            assert failed.status_code == 500
            assert CANARY not in failed.text

    run(work())
    assert "unexpected error" in caplog.text, "something was logged"
    for secret in (CANARY, *KEYS.values()):
        assert secret not in caplog.text


def _breaks(text: str, *, add_bos: bool) -> list[int]:
    raise RuntimeError("a defect")
