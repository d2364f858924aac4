"""A model that runs in this process, driven step by step as an engine would: paged, chunked, batched.

The KV cache is filled with NaN and blocks are dealt out of order, so that reading anything that was not
written shows.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.kv_cache import KVCache, default_kv_dtype
from model.storage.checkpoint import Checkpoint
from model.transformer import load_local, run_local

BLOCK_SIZE = 32


class PagedModel:
    """A loaded model with one KV cache; sequences are named by the caller and own blocks until released."""

    def __init__(
        self,
        path: Path,
        *,
        kernel: str | None = None,
        num_blocks: int = 256,
        seed: int = 0,
        device: str = "cpu",
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        self.checkpoint = Checkpoint.open(path)
        self.config = self.checkpoint.config
        self.backbone, self.experts = load_local(self.checkpoint, kernel, device)
        self.kv = KVCache(self.config, num_blocks, BLOCK_SIZE, kv_dtype or default_kv_dtype(device), device)
        for layer in range(self.config.num_layers):
            self.kv.kv(layer).fill_(torch.nan)
        generator = torch.Generator().manual_seed(seed)
        self._free = torch.randperm(num_blocks, generator=generator).tolist()
        self._tables: dict[str, list[int]] = {}
        self._lengths: dict[str, int] = {}

    def step(self, tokens: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """Append tokens to several sequences in one forward; per sequence the logits of all its new tokens."""
        starts = [self._lengths.get(name, 0) for name in tokens]
        for name, ids in tokens.items():
            table = self._tables.setdefault(name, [])
            self._lengths[name] = self._lengths.get(name, 0) + len(ids)
            while len(table) * BLOCK_SIZE < self._lengths[name]:
                table.append(self._free.pop())
        total = sum(len(ids) for ids in tokens.values())
        batch = ForwardBatch.build(list(tokens.values()), starts, [self._tables[name] for name in tokens], range(total))
        logits_RV = run_local(self.backbone, batch, self.kv, self.experts)
        ends = accumulate(len(ids) for ids in tokens.values())
        return {name: logits_RV[end - len(ids) : end] for (name, ids), end in zip(tokens.items(), ends, strict=True)}

    def release(self, name: str) -> None:
        """Forget a sequence; its blocks keep their contents and go to others."""
        self._free += self._tables.pop(name)
        del self._lengths[name]

    def score(self, ids: Sequence[int], chunk: int | None = None, name: str = "scored") -> Tensor:
        """Logits of every position of `ids`, read in chunks, alone in the batch."""
        size = chunk or len(ids)
        parts = [self.step({name: ids[at : at + size]})[name] for at in range(0, len(ids), size)]
        self.release(name)
        return torch.cat(parts)

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> list[int]:
        """The most likely tokens after a prompt, one decode step each."""
        output: list[int] = []
        ids: Sequence[int] = prompt
        for _ in range(num_tokens):
            output.append(int(self.step({"greedy": ids})["greedy"][-1].argmax()))
            ids = output[-1:]
        self.release("greedy")
        return output


def random_ids(count: int, *, vocab: int = 300, seed: int = 0) -> list[int]:
    """Random token ids without the special ones."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(3, vocab, (count,), generator=generator).tolist()
    return ids
