"""The GGUF file that llama.cpp reads holds the checkpoint's own numbers, in llama.cpp's layout."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.peers.gguf_export import cached_gguf, pairs_side_by_side, write_gguf
from model.storage.checkpoint import Checkpoint
from tests.support.checkpoints import write_mixtral
from tests.support.gguf_files import interleave

LAYERS, EXPERTS, HEADS, KV_HEADS = 2, 4, 4, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("tiny")
    write_mixtral(path, layers=LAYERS, experts=EXPERTS, heads=HEADS, kv_heads=KV_HEADS, dtype=torch.float16)
    return Checkpoint.open(path)


@pytest.fixture(scope="module")
def reader(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> gguf.GGUFReader:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(checkpoint, path)
    return gguf.GGUFReader(path)


def value(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()


def test_the_keys_describe_the_model(reader: gguf.GGUFReader, checkpoint: Checkpoint) -> None:
    config = checkpoint.config
    expected = {
        "general.architecture": "llama",
        "llama.vocab_size": config.vocab_size,
        "llama.block_count": LAYERS,
        "llama.context_length": config.max_context,
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.ffn_size,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.key_length": config.head_dim,
        "llama.rope.dimension_count": config.head_dim,
        "llama.expert_count": EXPERTS,
        "llama.expert_used_count": config.top_k,
        "tokenizer.ggml.model": "no_vocab",
    }
    assert {key: value(reader, key) for key in expected} == expected
    assert value(reader, "llama.rope.freq_base") == pytest.approx(config.rope_theta)
    assert value(reader, "llama.attention.layer_norm_rms_epsilon") == pytest.approx(config.norm_eps)


def test_every_tensor_is_there_bit_for_bit(reader: gguf.GGUFReader, checkpoint: Checkpoint) -> None:
    stored = {tensor.name: tensor.data for tensor in reader.tensors}

    def ours(name: str, dtype: torch.dtype = torch.float16) -> Any:
        return checkpoint.read(name, dtype).numpy()

    expected = {
        "token_embd.weight": ours("embed"),
        "output_norm.weight": ours("norm", torch.float32),
        "output.weight": ours("lm_head"),
    }
    for layer in range(LAYERS):
        block, name = f"blk.{layer}", f"layers.{layer}"
        expected |= {
            f"{block}.attn_norm.weight": ours(f"{name}.attn_norm", torch.float32),
            f"{block}.ffn_norm.weight": ours(f"{name}.ffn_norm", torch.float32),
            f"{block}.attn_q.weight": interleave(ours(f"{name}.wq"), HEADS),
            f"{block}.attn_k.weight": interleave(ours(f"{name}.wk"), KV_HEADS),
            f"{block}.attn_v.weight": ours(f"{name}.wv"),
            f"{block}.attn_output.weight": ours(f"{name}.wo"),
            f"{block}.ffn_gate_inp.weight": ours(f"{name}.gate", torch.float32),
        }
        for part, theirs in (("w1", "ffn_gate_exps"), ("w2", "ffn_down_exps"), ("w3", "ffn_up_exps")):
            columns = [ours(f"{name}.experts.{expert}.{part}") for expert in range(EXPERTS)]
            expected[f"{block}.{theirs}.weight"] = np.stack(columns)
    assert set(stored) == set(expected)
    for name, array in expected.items():
        assert stored[name].dtype == array.dtype, name
        assert np.array_equal(stored[name], array), name


def test_rows_of_a_head_become_pairs() -> None:
    rows = np.arange(8).reshape(8, 1)
    assert pairs_side_by_side(rows, 2).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_the_cache_is_filled_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    said: list[str] = []
    path = cached_gguf(checkpoint, tmp_path / "gguf", said.append)
    before = path.stat().st_mtime_ns
    assert cached_gguf(checkpoint, tmp_path / "gguf", said.append) == path
    assert (len(said), path.stat().st_mtime_ns) == (1, before)
    assert list((tmp_path / "gguf").iterdir()) == [path]
    assert checkpoint.weights_id[:12] in path.name


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "tied", tied=True)
    write_gguf(Checkpoint.open(tmp_path / "tied"), tmp_path / "tied.gguf")
    names = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "tied.gguf").tensors}
    assert "token_embd.weight" in names
    assert "output.weight" not in names


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 16}, "no sliding window"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rotary scaling 'linear'"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    write_mixtral(tmp_path / "odd", **changes)
    with pytest.raises(BenchError, match=reason):
        cached_gguf(Checkpoint.open(tmp_path / "odd"), tmp_path / "gguf", lambda text: None)
    assert not list((tmp_path / "gguf").iterdir())


def test_weights_beyond_fp16_are_refused(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "big")
    (shard,) = (tmp_path / "big").glob("*.safetensors")
    from safetensors.torch import load_file, save_file

    tensors = load_file(shard)
    tensors["model.embed_tokens.weight"][3, 3] = 1e6
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(BenchError, match="fp16 cannot hold token_embd"):
        write_gguf(Checkpoint.open(tmp_path / "big"), tmp_path / "big.gguf")


def test_llama_cpp_says_what_transformers_says(tmp_path: Path) -> None:
    """Where the optional peer is installed."""
    pytest.importorskip("llama_cpp")
    from experiments.engine_bench.peers.llama_cpp_peer import LlamaCppPeer
    from experiments.engine_bench.peers.transformers_peer import TransformersPeer

    write_mixtral(tmp_path / "tiny", hidden=128, ffn=256, dtype=torch.float16)
    write_gguf(Checkpoint.open(tmp_path / "tiny"), tmp_path / "tiny.gguf")
    prompts = [[1, *range(20 + 9 * index, 27 + 9 * index)] for index in range(3)]
    request = {"prompts": prompts, "output_len": 5}
    theirs = LlamaCppPeer(str(tmp_path / "tiny.gguf"), 1).handle(request)
    oracle = TransformersPeer(str(tmp_path / "tiny"), torch.get_num_threads()).handle(request)
    assert [ids[:2] for ids in theirs["tokens"]] == [ids[:2] for ids in oracle["tokens"]]
    assert all(times == sorted(times) and len(times) == 5 for times in theirs["arrivals_s"])
