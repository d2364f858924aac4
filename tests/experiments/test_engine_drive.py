"""The measuring functions on a real coordinator with real experts over real gRPC, in this process, without Ray."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.front.coordinator_client import CoordinatorLost
from experiments.engine_bench import drive
from experiments.engine_bench.drive import LoopClock, Target
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.shares import CpuTimes
from experiments.engine_bench.timing import decode_tok_s, prefill_tok_s
from tests.support.checkpoints import EOS_ID, write_mixtral
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

pytestmark = pytest.mark.anyio

LAYERS, EXPERTS, TOP_K = 2, 2, 2
LONG = 96
"""Tokens: the counters are read over the wire while these are made, and not after, however late a reading comes."""
PROMPTS = [[1, 10 + index, 20, 30, 40 + index] for index in range(4)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("drive")
    write_mixtral(path, layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
async def cluster(checkpoint: Path) -> AsyncIterator[TinyCluster]:
    # Two prompts a step, so that some begin before others.
    async with tiny_cluster(checkpoint, max_num_batched_tokens=64, max_model_len=128) as running:
        yield running


async def test_prefill_gives_one_token_each_and_shares_of_the_whole_run(cluster: TinyCluster) -> None:
    sample = await drive.prefill(Target(client=cluster.client, parallel=2), PROMPTS)
    assert [len(ids) for ids in sample.run.tokens] == [1] * len(PROMPTS)
    assert prefill_tok_s(20, sample.run) > 0
    assert sample.shares is not None
    assert sum(sample.shares.shares.values()) == pytest.approx(1.0)
    assert sample.load == ((20, 20),) * LAYERS, "every prompt token goes to both experts in each layer"


async def test_decode_goes_on_past_the_end_of_sequence_and_counts_what_passed(cluster: TinyCluster) -> None:
    sample = await drive.decode(Target(client=cluster.client, parallel=2), PROMPTS, LONG)
    assert [len(ids) for ids in sample.run.tokens] == [LONG] * len(PROMPTS)
    assert decode_tok_s(sample.run) > 0
    shares = sample.shares
    assert shares is not None
    assert 1 <= shares.steps <= LONG
    assert shares.messages_per_token == pytest.approx(LAYERS * EXPERTS / len(PROMPTS), rel=0.2)
    assert shares.bytes_per_token > 2 * LAYERS * TOP_K * 64 * 4, "rows of 64 fp32 go and come"
    assert shares.shares["attention"] > 0
    assert shares.shares["sampling"] > 0
    assert shares.expert_compute_ms > 0


async def test_the_tokens_are_those_of_each_prompt_alone(cluster: TinyCluster) -> None:
    target = Target(client=cluster.client)
    together = (await drive.decode(target, PROMPTS, 8)).run.tokens
    alone = [(await drive.decode(target, [prompt], 8)).run.tokens[0] for prompt in PROMPTS]
    assert list(together) == alone
    assert any(EOS_ID in ids for ids in together) or all(len(ids) == 8 for ids in together)


async def test_cpu_times_are_read_at_both_ends(cluster: TinyCluster) -> None:
    readings = iter([CpuTimes(1.0, 2.0), CpuTimes(4.0, 4.0)])
    sample = await drive.prefill(Target(client=cluster.client, read_cpu=lambda: next(readings)), PROMPTS)
    assert sample.shares is not None
    assert sample.shares.expert_cpu_ms == pytest.approx(3000 / sample.shares.steps)
    assert sample.shares.coordinator_cpu_ms == pytest.approx(2000 / sample.shares.steps)


async def test_a_refusal_ends_the_measurement_and_leaves_nothing_running(cluster: TinyCluster) -> None:
    too_long = [*PROMPTS, [1] * 120]
    with pytest.raises(BenchError, match=r"the cluster ended a sequence early: .*max_tokens"):
        await drive.decode(Target(client=cluster.client), too_long, 24)
    idle = await cluster.until(lambda now: now.num_running == now.num_waiting == 0)
    assert idle.state == "ready"


async def test_a_coordinator_that_is_gone_is_no_measurement(checkpoint: Path) -> None:
    async with tiny_cluster(checkpoint) as running:
        target = Target(client=running.client)
        await drive.prefill(target, PROMPTS)
        await running.coordinator.stop()
        with pytest.raises(CoordinatorLost):
            await drive.prefill(target, PROMPTS)


async def test_one_turn_of_the_loop_has_one_time() -> None:
    readings = iter([1.0, 2.0])
    clock = LoopClock(lambda: next(readings))
    woken = asyncio.Event()
    seen: list[float] = []

    async def reader() -> None:
        await woken.wait()
        seen.append(clock.now())

    tasks = [asyncio.create_task(reader()) for _ in range(3)]
    await asyncio.sleep(0)
    woken.set()
    await asyncio.gather(*tasks)
    assert seen == [1.0, 1.0, 1.0]
    assert clock.now() == 2.0
