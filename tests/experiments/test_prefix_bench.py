"""What `octavo bench prefix` measures, on a real coordinator with real experts in this process, without Ray."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.scheduler import SchedulerConfig
from experiments.bench_cli import app
from experiments.engine_bench.failures import BenchError
from experiments.prefix_bench import Round, ask, planning_us, run_round, summary
from tests.support.checkpoints import write_mixtral
from tests.support.tiny_cluster import TinyCluster, tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

pytestmark = pytest.mark.anyio

BEGINNING = [1, *range(20, 115)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("prefix")
    write_mixtral(path)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
async def cluster(checkpoint: Path) -> AsyncIterator[TinyCluster]:
    async with tiny_cluster(checkpoint) as running:
        yield running


async def test_a_round_finds_the_beginning_and_compares_every_answer(cluster: TinyCluster) -> None:
    one = await run_round(cluster.client, BEGINNING, ([5, 6], [7, 8, 9]), 4, "a salt")
    assert (one.repeated_cached, one.whole_cached, one.same) == (96, 96, True)
    assert min(one.first_s, one.repeated_s, one.whole_s, one.stranger_s) > 0
    with pytest.raises(BenchError, match="what nobody had asked for was found"):
        await run_round(cluster.client, BEGINNING, ([5, 6], [7, 8, 9]), 4, "a salt")


async def test_an_answer_is_its_tokens_and_their_logprobs(cluster: TinyCluster) -> None:
    one = await ask(cluster.client, BEGINNING, 5, "mine")
    assert (len(one.tokens), len(one.logprobs), one.num_cached) == (5, 5, 0)
    again = await ask(cluster.client, BEGINNING, 5, "mine")
    assert (again.tokens, again.logprobs, again.num_cached) == (one.tokens, one.logprobs, 64)


def made(first_s: float, repeated_s: float, *, same: bool = True) -> Round:
    return Round(
        first_s=first_s, repeated_s=repeated_s, whole_s=2 * repeated_s, stranger_s=3 * first_s,
        repeated_cached=96, whole_cached=96, same=same,
    )  # fmt: skip


def test_ratios_are_to_both_whole_prefills_of_a_round_and_medians_over_rounds() -> None:
    rounds = [made(1.0, 0.1), made(2.0, 0.1), made(4.0, 4.0)]
    assert [one.repeated_ratio for one in rounds] == pytest.approx([0.05, 0.025, 0.5])
    told = summary(rounds, 104)
    assert told["repeated_ratio"] == pytest.approx(0.05)
    assert told["whole_ratio"] == pytest.approx(0.1)
    assert (told["first_ms"], told["same_bits"]) == (2000.0, True)
    assert summary([*rounds, made(1.0, 0.1, same=False)], 104)["same_bits"] is False


def test_planning_is_timed_with_and_without_the_cache() -> None:
    limits = SchedulerConfig(
        max_num_seqs=4,
        max_num_batched_tokens=64,
        block_size=32,
        max_waiting_requests=4,
        max_waiting_tokens=1000,
        max_model_len=1000,
    )
    cost = planning_us(limits, 200, repeats=3)
    assert cost["cache_on"] > 0
    assert cost["cache_off"] > 0
    assert cost["hashing"] == pytest.approx(cost["cache_on"] - cost["cache_off"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prefix-len", "100000"], "tokens a sequence, but the model's context is"),
        (["--kernel", "int3"], "kernel is 'int3'"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    checkpoint: Path, arguments: list[str], said: str
) -> None:
    done = CliRunner().invoke(app, ["prefix", str(checkpoint), *arguments])
    assert done.exit_code == 1
    assert said in done.output or said in str(done.exception)
