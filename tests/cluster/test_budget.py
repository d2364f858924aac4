"""Memory is added up before anything starts."""

import pytest

from cluster.budget import (
    CPU_KV_BYTES,
    LOAD_SLICE_BYTES,
    PROCESS_BASE_BYTES,
    ActorNeed,
    BudgetError,
    PackedAs,
    choose_kv_bytes,
    gigabytes,
    memory_budget,
    num_kv_blocks,
    packed_bytes,
)

BASE = PROCESS_BASE_BYTES + LOAD_SLICE_BYTES
GIB = 1 << 30


def test_an_actor_on_the_cpu_holds_weights_cache_and_the_tensor_being_read() -> None:
    need = ActorNeed(name="coordinator-0", weight_bytes=1000, largest_tensor_bytes=100, kv_bytes=10)
    assert need.host_bytes == BASE + 1110


def test_an_actor_on_a_gpu_holds_only_the_tensor_being_read() -> None:
    need = ActorNeed(name="expert-0-r0", weight_bytes=1000, largest_tensor_bytes=100, kv_bytes=10, on_gpu=True)
    assert need.host_bytes == BASE + 100


def test_what_fits_fits_to_the_byte() -> None:
    needs = [ActorNeed(name=f"expert-{e}-r0", weight_bytes=500) for e in range(8)]
    budget = memory_budget("n0", needs, 8 * (BASE + 500))
    assert (budget.fits, budget.reason) == (True, None)
    assert budget.required_bytes == budget.available_bytes
    assert not memory_budget("n0", needs, 8 * (BASE + 500) - 1).fits


def test_what_does_not_fit_is_said_in_one_line() -> None:
    needs = [ActorNeed(name="expert-0-r0", weight_bytes=11_300_000_000), ActorNeed(name="small", weight_bytes=1)]
    budget = memory_budget("n0", needs, 4_000_000_000)
    assert budget.reason == (
        "n0 has 4.0 GB of memory available, but its 2 actors need 12.0 GB (the largest, expert-0-r0: 11.7 GB)"
    )


def test_a_node_without_actors_fits() -> None:
    assert memory_budget("n0", [], 0).fits


@pytest.mark.parametrize(
    ("stored", "element", "kernel", "packed"),
    [(100, 2, "fp32", 200), (100, 4, "fp16", 50), (100, 2, "bf16", 100), (100, 4, "fp32", 100), (100, 2, "int8", 50)],
)
def test_packing_changes_the_size(stored: int, element: int, kernel: PackedAs, packed: int) -> None:
    assert packed_bytes(stored, element, kernel) == packed


def test_half_an_element_is_refused() -> None:
    with pytest.raises(ValueError, match="stored_bytes is 3"):
        packed_bytes(3, 2, "fp32")


@pytest.mark.parametrize(
    ("requested", "free", "on_gpu", "chosen"),
    [
        (None, 10 * GIB, False, CPU_KV_BYTES),
        (None, GIB, False, GIB // 2),
        (None, 10 * GIB, True, 8 * GIB),
        (123, 200, False, 123),
        (200, 200, True, 200),
    ],
)
def test_the_cache_gets_what_was_asked_for_or_a_share(
    requested: int | None, free: int, on_gpu: bool, chosen: int
) -> None:
    assert choose_kv_bytes(requested, free, on_gpu=on_gpu) == chosen


def test_a_cache_beyond_what_is_free_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"kv_cache_bytes is 2000000000 \(2.0 GB\), but only 500 MB are free"):
        choose_kv_bytes(2_000_000_000, 500_000_000, on_gpu=False)


@pytest.mark.parametrize(("kv_bytes", "blocks"), [(1000, 10), (1099, 10), (100, 1), (1_000_000, 4 * 16)])
def test_blocks_fill_the_bytes_but_not_beyond_what_can_be_used(kv_bytes: int, blocks: int) -> None:
    assert num_kv_blocks(kv_bytes, 100, block_size=32, max_num_seqs=4, max_model_len=500) == blocks


def test_a_cache_of_less_than_a_block_is_refused() -> None:
    with pytest.raises(BudgetError, match="kv_cache_bytes is 99, but one block of 32 tokens takes 100"):
        num_kv_blocks(99, 100, block_size=32, max_num_seqs=4, max_model_len=500)
    with pytest.raises(ValueError, match="block_bytes is 0"):
        num_kv_blocks(99, 0, block_size=32, max_num_seqs=4, max_model_len=500)


@pytest.mark.parametrize(("size", "text"), [(350_000_000, "350 MB"), (1_500_000_000, "1.5 GB"), (0, "0 MB")])
def test_sizes_for_people(size: int, text: str) -> None:
    assert gigabytes(size) == text
