"""Hundreds of clients leave, at every moment of a request: no KV block, queue place, stream or task is left behind."""

import asyncio
from pathlib import Path
from typing import Any

import httpx2
import pytest

from actors.front.http_app import create_app
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.leavers import MOMENTS, leave_all
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

BODY: dict[str, Any] = {"model": "tiny", "prompt": "The quick brown fox " * 4, "max_tokens": 80, "ignore_eos": True}
CHECKED = {**BODY, "max_tokens": 12, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("leavers")
    write_mixtral(path)
    write_byte_tokenizer(path, 300)
    return path


async def answer(url: str) -> list[int]:
    async with httpx2.AsyncClient(timeout=200) as client:
        reply = await client.post(f"{url}/v1/completions", json=CHECKED)
        ids: list[int] = reply.json()["choices"][0]["token_ids"]
        return ids


async def num_tasks() -> int:
    """Once those that only end have ended."""
    for _ in range(50):
        await asyncio.sleep(0)
    return len(asyncio.all_tasks())


async def until_tasks(number: int) -> None:
    for _ in range(6000):
        if await num_tasks() <= number:
            return
        await asyncio.sleep(0.01)
    raise AssertionError([task.get_coro() for task in asyncio.all_tasks()])


def everything_is_free(cluster: TinyCluster) -> None:
    engine, service = cluster.coordinator._engine, cluster.coordinator._service
    assert engine is not None
    assert service is not None
    engine.scheduler.check_integrity()
    assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_blocks
    assert (engine.scheduler.num_running, engine.scheduler.num_waiting, len(engine.live)) == (0, 0, 0)
    assert not service._routes
    assert [dict(stream.live) for stream in service._streams] == [{}], "one stream, with no request"
    assert cluster.client.inflight_tokens == 0
    assert not cluster.client._open


@pytest.mark.timeout(300)
def test_hundreds_of_clients_leave_at_any_moment_and_nothing_is_left(model_dir: Path) -> None:
    async def work() -> None:
        async with (
            tiny_cluster(model_dir, max_num_seqs=8, max_waiting_requests=48) as cluster,
            serving(create_app(cluster.front)) as url,
        ):
            expected = await answer(url)
            await until_tasks(await num_tasks())
            before = await num_tasks()
            left = await leave_all(url, BODY, count=300, at_once=48)
            assert all(left[moment] > 20 for moment in MOMENTS), left
            await cluster.until(lambda now: now.num_running == now.num_waiting == 0)
            # What a step still reads is given back when the step ends.
            await cluster.until(lambda now: now.kv_blocks_free == now.kv_blocks_total)
            await until_tasks(before)
            everything_is_free(cluster)
            assert await answer(url) == expected
            await cluster.until(lambda _: cluster.front.metrics.inflight._value.get() == 0)

    run(work(), timeout_s=280)
