"""How much memory actors will need, before any of them is started; and how many KV blocks fit.

Estimates from sizes alone. Measuring a machine, and reading a checkpoint's sizes, is done elsewhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cluster.block_allocator import blocks_for

PROCESS_BASE_BYTES = 350_000_000
"""Resident memory of an actor with torch and gRPC before it loads anything; measured 294 MB, rounded up."""

LOAD_SLICE_BYTES = 8 << 20
"""Conversion buffer while a tensor is read."""

CPU_KV_BYTES = 1 << 30
GPU_KV_SHARE = 0.8

PackedAs = Literal["fp32", "fp16", "bf16", "int8", "fp8"]

_ELEMENT_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1}


class BudgetError(ValueError):
    """Something does not fit into memory. One line that says what, how much, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorNeed:
    """What one actor holds, in bytes. `largest_tensor_bytes` is on top of the weights while they are loaded.

    With `on_gpu` weights and KV cache are in device memory, and the host keeps the process and the tensor
    being read.
    """

    name: str
    weight_bytes: int
    largest_tensor_bytes: int = 0
    kv_bytes: int = 0
    on_gpu: bool = False

    @property
    def host_bytes(self) -> int:
        """Peak of resident host memory."""
        passing = PROCESS_BASE_BYTES + self.largest_tensor_bytes + LOAD_SLICE_BYTES
        return passing if self.on_gpu else passing + self.weight_bytes + self.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """The actors of one node against its free memory. `reason` is None when they fit, else one line."""

    node: str
    needs: tuple[ActorNeed, ...]
    available_bytes: int
    required_bytes: int
    reason: str | None

    @property
    def fits(self) -> bool:
        """True where all actors can be started."""
        return self.reason is None


def memory_budget(node: str, needs: Sequence[ActorNeed], available_bytes: int) -> MemoryBudget:
    """Add up what the actors of `node` need, and compare it with what is available there."""
    required = sum(need.host_bytes for need in needs)
    reason = None
    if required > available_bytes:
        largest = max(needs, key=lambda need: need.host_bytes)
        reason = (
            f"{node} has {gigabytes(available_bytes)} of memory available, but its {len(needs)} actors need "
            f"{gigabytes(required)} (the largest, {largest.name}: {gigabytes(largest.host_bytes)})"
        )
    return MemoryBudget(
        node=node,
        needs=tuple(needs),
        available_bytes=available_bytes,
        required_bytes=required,
        reason=reason,
    )


def packed_bytes(stored_bytes: int, stored_element_bytes: int, kernel: PackedAs) -> int:
    """Memory of weights that take `stored_bytes` in a checkpoint, once packed for `kernel`.

    Scales, one for a row of weights, are left out: under 1 %.
    """
    if stored_bytes % stored_element_bytes:
        raise ValueError(f"stored_bytes is {stored_bytes}, not a multiple of {stored_element_bytes}")
    return stored_bytes // stored_element_bytes * _ELEMENT_BYTES[kernel]


def choose_kv_bytes(requested: int | None, free_bytes: int, *, on_gpu: bool) -> int:
    """Bytes for the KV cache: what was asked for, else 1 GiB (at most half of what is free), on GPUs 80 % of it.

    `free_bytes` is what the device has left once the weights are there. Raises BudgetError when it is too
    little.
    """
    if requested is not None:
        if requested > free_bytes:
            raise BudgetError(
                f"kv_cache_bytes is {requested} ({gigabytes(requested)}), but only {gigabytes(free_bytes)} are free"
            )
        return requested
    return int(free_bytes * GPU_KV_SHARE) if on_gpu else min(CPU_KV_BYTES, free_bytes // 2)


def num_kv_blocks(kv_bytes: int, block_bytes: int, *, block_size: int, max_num_seqs: int, max_model_len: int) -> int:
    """KV blocks of `block_bytes` that fit into `kv_bytes`, and no more than all sequences at full length use.

    Raises BudgetError when not even one fits.
    """
    if block_bytes < 1:
        raise ValueError(f"block_bytes is {block_bytes}, but must be at least 1")
    fitting = kv_bytes // block_bytes
    if fitting < 1:
        raise BudgetError(f"kv_cache_bytes is {kv_bytes}, but one block of {block_size} tokens takes {block_bytes}")
    return min(fitting, max_num_seqs * blocks_for(max_model_len, block_size))


def gigabytes(num_bytes: int) -> str:
    """`num_bytes` for people: 1.5 GB, 350 MB."""
    if num_bytes >= 1_000_000_000:
        return f"{num_bytes / 1e9:.1f} GB"
    return f"{num_bytes / 1e6:.0f} MB"
