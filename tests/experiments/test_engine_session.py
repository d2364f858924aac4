"""What the command refuses before anything starts, and how it configures the clusters it would start."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from cluster.config import ConfigError
from experiments.bench_engine_cli import engine
from experiments.engine_bench.cells import cells, variants
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.peers.registry import PEERS
from experiments.engine_bench.session import Plan, check_memory, cluster_configs, prompt_maker
from model.kv_cache import block_bytes
from model.storage.checkpoint import Checkpoint
from model.text.tokenizer import load_tokenizer
from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("session")
    write_mixtral(path, experts=4, dtype=torch.float16)
    write_byte_tokenizer(path)
    return Checkpoint.open(path)


def plan(checkpoint: Checkpoint, **changes: Any) -> Plan:
    return replace(
        Plan(
            model=checkpoint.path,
            cells=cells((1, 3), 30, 10),
            variants=variants(["auto"], ["auto"], [1], [1]),
            peers=(),
            peer_python=sys.executable,
            peer_env={},
            repeats=1,
            seed=0,
            max_num_batched_tokens=512,
            cache_dir=checkpoint.path,
        ),
        **changes,
    )


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer(add_completion=False)
    app.command()(engine)
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stderr.strip()


def test_every_variant_has_a_namespace_and_room_for_the_largest_cell(checkpoint: Checkpoint) -> None:
    two = variants(["auto"], ["fp32", "fp16"], [1], [2])
    configs = cluster_configs(plan(checkpoint, variants=two), checkpoint)
    assert list(configs) == list(two)
    assert len({config.namespace for config in configs.values()}) == 2
    assert [config.kernel for config in configs.values()] == ["fp32", "fp16"]
    assert not any(config.prefix_caching for config in configs.values()), "repeated prompts are to be computed again"
    one_block = block_bytes(checkpoint.config, 32, torch.float32)
    assert {config.kv_cache_bytes for config in configs.values()} == {(3 * 2 + 1) * one_block}


def test_a_large_batch_widens_what_a_step_may_take(checkpoint: Checkpoint) -> None:
    (config,) = cluster_configs(plan(checkpoint, cells=cells((600,), 4, 2)), checkpoint).values()
    assert (config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting_requests) == (600, 600, 600)
    assert config.max_queue_wait_s >= 3600  # all of a cell are submitted at once: the last may wait for all others


def test_what_the_model_cannot_do_is_refused(checkpoint: Checkpoint) -> None:
    with pytest.raises(BenchError, match="520 tokens a sequence, but the model's context is 512"):
        cluster_configs(plan(checkpoint, cells=cells((1,), 510, 10)), checkpoint)
    with pytest.raises(ConfigError, match="experts_per_actor is 3"):
        cluster_configs(plan(checkpoint, variants=variants(["auto"], ["auto"], [1], [3])), checkpoint)


def test_more_contestants_than_memory_holds_are_refused(checkpoint: Checkpoint) -> None:
    few = plan(checkpoint)
    check_memory(few, checkpoint, cluster_configs(few, checkpoint), [PEERS["transformers"]])
    many = plan(checkpoint, variants=variants(["auto", "grpc"], ["fp32", "fp16"], range(1, 65), [1]), kernel_speed=True)
    with pytest.raises(BenchError, match=r"need .* GB \(octavo transport=auto .*the kernel alone .*fewer variants"):
        check_memory(many, checkpoint, cluster_configs(many, checkpoint), [PEERS["llama.cpp"]])


def test_prompts_come_from_the_model_s_own_tokenizer(checkpoint: Checkpoint) -> None:
    make = prompt_maker(checkpoint)
    first = make(3, 20, 0)
    assert make(3, 20, 0) is first
    assert {prompt[0] for prompt in first} == {load_tokenizer(checkpoint.path).bos_id}


def test_a_model_without_a_tokenizer_has_prompts_too(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    prompts = prompt_maker(Checkpoint.open(tmp_path))(3, 20, 0)
    assert all(0 <= token < 300 for prompt in prompts for token in prompt)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--peer", "vllm"], "octavo: --peer is 'vllm', but must be one of transformers, llama.cpp"),
        (["--batches", "1,two"], "octavo: --batches is '1,two', but must be whole numbers with commas between them"),
        (["--batch", "0"], "octavo: batch is 0, but must be at least 1"),
        (["--synthetic", "mixtral"], "octavo: MODEL and --synthetic exclude each other"),
        (["--prompt-len", "600"], "octavo: 664 tokens a sequence, but the model's context is 512"),
    ],
)
def test_a_refusal_is_one_line(checkpoint: Checkpoint, arguments: list[str], line: str) -> None:
    assert run(str(checkpoint.path), *arguments) == (1, line)


def test_the_help_explains_every_option() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(engine)
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).stdout
    for option in ("--batch", "--batches", "--peer", "--peer-python", "--transport", "--synthetic", "--json-out"):
        assert option in shown
