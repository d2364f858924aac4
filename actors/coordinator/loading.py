"""Brings a coordinator's share of a checkpoint into memory: the backbone, and a KV cache that fits beside it.

Runs in a thread while the event loop answers probes; reports progress as it goes. What is then done with the
model is the engine's business.
"""

import logging
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from cluster.block_allocator import blocks_for
from cluster.budget import BudgetError, choose_kv_bytes, gigabytes, num_kv_blocks
from cluster.config import ClusterConfig
from cluster.scheduler import SchedulerConfig
from model.config import ModelConfig
from model.grammar.spec import GrammarError
from model.grammar.vocabulary import Vocabulary
from model.kernels import default_kernel
from model.kv_cache import KVCache, block_bytes, default_kv_dtype
from model.memory import collapse_into_huge_pages, release_freed_memory
from model.storage.checkpoint import COORDINATOR, Checkpoint
from model.text.tokenizer import TokenizerError, load_tokenizer
from model.transformer import Backbone

LOG = logging.getLogger(__name__)


@dataclass(slots=True)
class LoadProgress:
    """How far loading is, in bytes of the checkpoint; `load_s` stands still when it has ended."""

    loaded_bytes: int = 0
    total_bytes: int = 0
    load_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """What an engine is made of. `kernel` is what was asked of the registry. Without a `vocabulary` no answer can
    follow a grammar.
    """

    config: ModelConfig
    weights_id: str
    kernel: str
    backbone: Backbone
    kv: KVCache
    eos_token_ids: frozenset[int]
    vocabulary: Vocabulary | None
    scheduler_config: SchedulerConfig


def load_model(
    config: ClusterConfig, progress: LoadProgress, checksums: Mapping[str, int] | None = None
) -> LoadedModel:
    """Loads everything that the coordinator owns, held to `checksums`. Blocks; call it in a thread.

    Raises ModelConfigError, CheckpointError, ConfigError, BudgetError, KernelError or OSError.
    """
    began_s = time.monotonic()
    torch.set_num_threads(num_threads(config))
    checkpoint = Checkpoint.open(Path(config.model)).expecting(checksums or {})
    model = checkpoint.config
    config.check_model(model.num_experts, model.max_context)
    progress.total_bytes = checkpoint.owned_bytes(COORDINATOR)

    def note(name: str, _nbytes: int) -> None:
        progress.loaded_bytes += checkpoint.nbytes(name)
        progress.load_s = time.monotonic() - began_s

    device = choose_device(config.device)
    kernel = default_kernel(checkpoint.dtype, device) if config.kernel == "auto" else config.kernel
    backbone = Backbone.load(checkpoint, kernel, device, note)
    if device.type == "cpu":
        release_freed_memory()
        LOG.info("%d MiB in huge pages", collapse_into_huge_pages() >> 20)
    kv = make_kv_cache(config, model, device)
    eos = eos_token_ids(model, Path(config.model))
    vocabulary = vocabulary_of(Path(config.model), model, eos)
    progress.load_s = time.monotonic() - began_s
    return LoadedModel(
        config=model,
        weights_id=checkpoint.weights_id,
        kernel=kernel,
        backbone=backbone,
        kv=kv,
        eos_token_ids=eos,
        vocabulary=vocabulary,
        scheduler_config=SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            block_size=config.block_size,
            max_waiting_requests=config.max_waiting_requests,
            max_waiting_tokens=config.max_waiting_tokens,
            max_model_len=config.context_limit(model.max_context),
            max_queue_wait_s=config.max_queue_wait_s,
            prompt_lookup=config.prompt_lookup,
            prefix_caching=config.prefix_caching,
        ),
    )


def make_kv_cache(config: ClusterConfig, model: ModelConfig, device: torch.device) -> KVCache:
    """As many blocks as were asked for or as the device has room for. Raises BudgetError naming what is too little."""
    on_gpu = device.type == "cuda"
    free_bytes = _free_on_gpu(config, device) if on_gpu else psutil.virtual_memory().available
    dtype = default_kv_dtype(device)
    one_block = block_bytes(model, config.block_size, dtype)
    num_blocks = num_kv_blocks(
        choose_kv_bytes(config.kv_cache_bytes, free_bytes, on_gpu=on_gpu),
        one_block,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.context_limit(model.max_context),
    )
    capacity = num_blocks * config.block_size
    if config.max_model_len is not None and capacity < config.max_model_len:
        needed = blocks_for(config.max_model_len, config.block_size) * one_block
        raise BudgetError(
            f"max_model_len is {config.max_model_len}, but the KV cache holds {capacity} tokens; "
            f"kv_cache_bytes must be at least {needed}"
        )
    LOG.info(
        "KV cache: %d blocks of %d tokens = %d tokens, %s",
        num_blocks,
        config.block_size,
        capacity,
        gigabytes(num_blocks * one_block),
    )
    return KVCache(model, num_blocks, config.block_size, dtype, device)


def _free_on_gpu(config: ClusterConfig, device: torch.device) -> int:
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    return gpu_room(free_bytes, total_bytes, torch.cuda.memory_allocated(device), config.expert_num_gpus)


def gpu_room(free_bytes: int, total_bytes: int, held_bytes: int, share: float | None) -> int:
    """What a coordinator that holds so much may still take of a GPU: of one it shares with experts, its own part.

    The experts may not have loaded yet: what is free now is also theirs.

    >>> gpu_room(70, 80, 5, None), gpu_room(70, 80, 5, 0.25), gpu_room(10, 80, 5, 0.25)
    (70, 15, 10)
    """
    if share is None or not 0 < share < 1:
        return free_bytes
    return max(0, min(free_bytes, int(share * total_bytes) - held_bytes))


def eos_token_ids(model: ModelConfig, path: Path) -> frozenset[int]:
    """All ids that end a generation: the configuration's, and the tokenizer's where there is one."""
    try:
        return frozenset(model.eos_token_ids) | frozenset(load_tokenizer(path).eos_ids)
    except TokenizerError as error:
        LOG.info("end-of-sequence ids are the configuration's alone: %s", error)
        return frozenset(model.eos_token_ids)


def vocabulary_of(path: Path, model: ModelConfig, eos: frozenset[int]) -> Vocabulary | None:
    """The model's tokens as grammars see them; None where they are not known, or none of them ends a text.

    Takes about a second for 50,000 tokens, which is why it is not left to the first grammar.
    """
    try:
        tokenizer = load_tokenizer(path)
        vocabulary = Vocabulary.of(model.vocab_size, tokenizer.token_bytes, tokenizer.is_special, eos)
    except (TokenizerError, GrammarError) as error:
        LOG.info("answers cannot follow grammars: %s", error)
        return None
    assert vocabulary.ll_tokenizer.vocab_size == model.vocab_size, "the library knows other tokens"
    return vocabulary


def choose_device(wanted: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def num_threads(config: ClusterConfig) -> int:
    """Compute threads of a coordinator: as configured, else one per core."""
    return config.coordinator_threads or len(os.sched_getaffinity(0))
