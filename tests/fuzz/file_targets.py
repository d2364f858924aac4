"""Decoders of files: checkpoints, their configurations and tokenizers, GGUF, traces, settings of a cluster."""

import io
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import sentencepiece
import torch

from actors.ingress import parse_args
from cluster.config import ClusterConfig, ConfigError, from_environment
from cluster.routing_trace import TraceError, read_trace, write_trace
from model.config import ModelConfigError
from model.storage.config_reader import read_config
from model.storage.manifest import MANIFEST_NAME, Manifest
from model.storage.safetensors_header import CheckpointError, read_header
from model.storage.strict_json import JSONError, parse_object
from model.storage.weight_files import index_name, open_weights, shard_name
from model.text.chat_template import ChatTemplate, ChatTemplateError
from model.text.tokenizer import TokenizerError, load_tokenizer
from model.upcycling.gguf_metadata import GgufError
from model.upcycling.gguf_source import GgufSource
from tests.fuzz.target import MIB, Decode, Target
from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer
from tests.support.traces import trace

_JSON_WORDS = (b"null", b"true", b"[", b"]", b"{", b"}", b'"', b",", b":", b"\\ud800", b"1e999", b"NaN", b"-1")


def _file(path: Path, read: Decode | Any) -> Decode:
    """Decodes what is in `path` when the input is."""

    def decode(data: bytes) -> object:
        path.write_bytes(data)
        return read()

    return decode


def strict_json(_: Path) -> Target:
    """JSON as checkpoints are read."""
    return Target(
        name="strict_json",
        decode=parse_object,
        errors=(JSONError,),
        seeds=(b'{"a": {"b": [1, 2.5, "x", null, true]}, "c": "\\u00e9"}',),
        words=_JSON_WORDS,
        is_json=True,
        quick=2000,
        share=2,
    )


def safetensors_header(scratch: Path) -> Target:
    """The header of a weights file."""
    path = scratch / "model.safetensors"
    tensors = {"a.weight": torch.ones(3, 4), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.ones(0, 3)}
    seeds = (safetensors.torch.save(tensors, {"format": "pt"}), safetensors.torch.save({"x": torch.ones(1)}))
    return Target(
        name="safetensors_header",
        decode=_file(path, lambda: read_header(path)),
        errors=(CheckpointError,),
        seeds=seeds,
        words=(*_JSON_WORDS, b'"F32"', b'"BF16"', b"data_offsets", b"__metadata__", b"\x08\0\0\0\0\0\0\0"),
        repair=_length_of_header,
        quick=1200,
        share=2,
    )


def _length_of_header(data: bytes) -> bytes:
    """The first eight bytes say how long the JSON is."""
    end = data.rfind(b"}") + 1
    return max(0, end - 8).to_bytes(8, "little") + data[8:] if end > 8 else data


def weights_index(scratch: Path) -> Target:
    """The index of a sharded checkpoint."""
    shards = [shard_name(number, 2) for number in (1, 2)]
    for shard, name in zip(shards, ("a", "b"), strict=True):
        safetensors.torch.save_file({name: torch.ones(2)}, scratch / shard)
    good = json.dumps({"metadata": {"total_size": 16}, "weight_map": {"a": shards[0], "b": shards[1]}}).encode()
    return Target(
        name="weights_index",
        decode=_file(scratch / index_name(), lambda: open_weights(scratch)),
        errors=(CheckpointError,),
        seeds=(good,),
        words=(*_JSON_WORDS, b"../", b"/etc/passwd", b"\0"),
        is_json=True,
        quick=600,
    )


def manifest(scratch: Path) -> Target:
    """The checksums beside a checkpoint."""
    entry = {"file": "m", "dtype": "float32", "shape": [2, 3], "bytes": 24, "checksums": ["0000abcd", "00000001"]}
    content = {
        "version": 1,
        "algorithm": "crc32c",
        "files": {"m": {"bytes": 99, "mtime_ns": 5}},
        "tensors": {"a": entry, "b": entry},
    }
    path = scratch / MANIFEST_NAME
    return Target(
        name="manifest",
        decode=_file(path, lambda: Manifest.read(path)),
        errors=(CheckpointError,),
        seeds=(json.dumps(content).encode(),),
        words=_JSON_WORDS,
        is_json=True,
        quick=1000,
    )


def model_config(scratch: Path) -> Target:
    """config.json, as Hugging Face has it."""
    write_mixtral(scratch / "made")
    good = (scratch / "made/config.json").read_bytes()
    llama = json.loads(good) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0}
        | {"high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    }
    for name in ("num_local_experts", "num_experts_per_tok", "sliding_window"):
        llama.pop(name, None)
    path = scratch / "config.json"
    return Target(
        name="model_config",
        decode=_file(path, lambda: read_config(scratch)),
        errors=(ModelConfigError,),
        seeds=(good, json.dumps(llama).encode()),
        words=(*_JSON_WORDS, b'"yarn"', b'"linear"', b'"rope_scaling"', b'"factor"'),
        is_json=True,
        quick=1200,
    )


def mistral_params(scratch: Path) -> Target:
    """params.json, as Mistral has it."""
    params = {"dim": 64, "n_layers": 2, "head_dim": 16, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2}
    more = {"norm_eps": 1e-5, "vocab_size": 300, "rope_theta": 1e6, "max_seq_len": 512}
    moe = {"moe": {"num_experts_per_tok": 2, "num_experts": 4}}
    path = scratch / "params.json"
    return Target(
        name="mistral_params",
        decode=_file(path, lambda: read_config(scratch)),
        errors=(ModelConfigError,),
        seeds=(json.dumps(params | more | moe).encode(), json.dumps(params | more).encode()),
        words=_JSON_WORDS,
        is_json=True,
        quick=1000,
    )


def gguf_file(scratch: Path) -> Target:
    """A GGUF file that is to be upcycled."""
    path = scratch / "model.gguf"
    return Target(
        name="gguf_file",
        decode=_file(path, lambda: _open_gguf(path)),
        errors=(GgufError, ModelConfigError),
        seeds=(_tiny_gguf(scratch / "made.gguf"),),
        words=(b"GGUF", b"\x09\0\0\0", b"\x08\0\0\0", b"llama.block_count", b"\xff" * 8, b"\0\0\0\x80\0\0\0\0"),
        base_bytes=16 * MIB,
        per_byte=256,
        quick=250,
        share=0.4,
    )


def _open_gguf(path: Path) -> object:
    source = GgufSource.open(path)
    return source.read("embed")


def _tiny_gguf(path: Path, *, rope_factors: bool = False) -> bytes:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {
        "block_count": 1,
        "context_length": 64,
        "embedding_length": 8,
        "feed_forward_length": 8,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "attention.key_length": 4,
    }.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_uint32("tokenizer.ggml.bos_token_id", 1)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    shapes = {"attn_q": (8, 8), "attn_k": (4, 8), "attn_v": (4, 8), "attn_output": (8, 8), "ffn_gate": (8, 8)}
    shapes |= {"ffn_down": (8, 8), "ffn_up": (8, 8)}
    tensors: dict[str, tuple[int, ...]] = {f"blk.0.{name}.weight": shape for name, shape in shapes.items()}
    tensors |= {"blk.0.attn_norm.weight": (8,), "blk.0.ffn_norm.weight": (8,), "output_norm.weight": (8,)}
    tensors |= {"token_embd.weight": (3, 8), "output.weight": (3, 8)}
    if rope_factors:
        tensors["rope_freqs.weight"] = (2,)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def trace_file(_: Path) -> Target:
    """A recorded routing trace."""
    seeds = []
    for num_tokens in (4, 40):
        file = io.BytesIO()
        write_trace(trace(num_tokens=num_tokens), file)
        seeds.append(file.getvalue())
    return Target(
        name="trace_file",
        decode=lambda data: read_trace(io.BytesIO(data)),
        errors=(TraceError,),
        seeds=tuple(seeds),
        words=(b"PK\x03\x04", b"PK\x01\x02", b"experts.npy", b"\x93NUMPY\x01\0"),
        base_bytes=8 * MIB,
        per_byte=2048,  # zip's best
        quick=500,
    )


def _special_files(scratch: Path) -> dict[str, bytes]:
    write_byte_tokenizer(scratch, 300)
    return {name: (scratch / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}


def _use(scratch: Path) -> object:
    tokenizer = load_tokenizer(scratch)
    ids = tokenizer.encode("hello é", add_bos=True)
    return tokenizer.decode(ids[:20])


def tokenizer_json(scratch: Path) -> Target:
    """tokenizer.json, read by the `tokenizers` library and used."""
    good = _special_files(scratch)["tokenizer.json"]
    return Target(
        name="tokenizer_json",
        decode=_file(scratch / "tokenizer.json", lambda: _use(scratch)),
        errors=(TokenizerError,),
        seeds=(good,),
        words=(*_JSON_WORDS, b'"BPE"', b'"ByteLevel"', b'"Regex"', b'"(a+)+$"'),
        is_json=True,
        base_bytes=16 * MIB,
        quick=120,
        share=0.15,
    )


def tokenizer_config(scratch: Path) -> Target:
    """tokenizer_config.json with the chat template in it."""
    good = json.loads(_special_files(scratch)["tokenizer_config.json"])
    more = good | {"added_tokens_decoder": {"3": {"content": "<|im_start|>", "special": True}}, "legacy": False}
    path = scratch / "tokenizer_config.json"

    def read() -> object:
        return ChatTemplate.load(scratch, load_tokenizer(scratch)).available

    return Target(
        name="tokenizer_config",
        decode=_file(path, read),
        errors=(TokenizerError, ChatTemplateError),
        seeds=(json.dumps(good).encode(), json.dumps(more).encode()),
        words=(*_JSON_WORDS, b'"added_tokens_decoder"', b'"chat_template"', "²".encode()),
        is_json=True,
        base_bytes=16 * MIB,
        quick=120,
        share=0.15,
    )


def sentencepiece_model(scratch: Path) -> Target:
    """tokenizer.model, read by the sentencepiece library and used."""
    file = io.BytesIO()
    words = [f"{a}{b}{c}" for a in "hello" for b in "world" for c in "again"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 4),
        model_writer=file,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    path = scratch / "tokenizer.model"
    return Target(
        name="sentencepiece_model",
        decode=_file(path, lambda: _use(scratch)),
        errors=(TokenizerError,),
        seeds=(file.getvalue(),),
        quick=150,
        share=0.3,
    )


def cluster_args(_: Path) -> Target:
    """`args:` of a Serve config."""
    good = {"model": "m", "replicas": 2, "kernel": "fp16", "request_timeout_s": 5.5, "bind_host": "node"}
    more = {"model": "m", "auth_token": "0123456789abcdef", "balance": "on", "speculation": "prompt_lookup"}

    def decode(data: bytes) -> object:
        try:
            args = parse_object(data)
        except JSONError as error:
            raise ConfigError(str(error)) from None
        return parse_args(args)

    return Target(
        name="cluster_args",
        decode=decode,
        errors=(ConfigError,),
        seeds=(json.dumps(good).encode(), json.dumps(more).encode()),
        words=(*_JSON_WORDS, b'"tls_ca"', b'"speculation"', b'"prompt_lookup"'),
        is_json=True,
        quick=1000,
    )


def cluster_environment(_: Path) -> Target:
    """`OCTAVO_*` variables: a name and a text."""
    base = ClusterConfig(model="m")
    names = ("REPLICAS", "KERNEL", "REQUEST_TIMEOUT_S", "EXPERT_NUM_GPUS", "ENABLE_RETURN_ROUTED_EXPERTS", "TLS_CERT")

    def decode(data: bytes) -> object:
        name, _, text = data.decode("latin-1").partition("=")
        return from_environment(base, {f"OCTAVO_{name}": text})

    return Target(
        name="cluster_environment",
        decode=decode,
        errors=(ConfigError,),
        seeds=(b"REPLICAS=3", b"KERNEL=fp16", b"REQUEST_TIMEOUT_S=5.5", b"TLS_CERT="),
        words=(*(name.encode() for name in names), b"=", b"nan", b"inf", b"1_0", b"true", b" 5", b"1e9"),
        quick=1500,
    )
