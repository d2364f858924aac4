"""What is asked for on the command line, as cells and variants."""

import pytest

from cluster.config import ClusterConfig, ConfigError
from experiments.engine_bench.cells import Cell, Variant, cells, parse_batches, variants
from experiments.engine_bench.failures import BenchError


def test_batches_may_be_given_in_two_ways_and_each_counts_once() -> None:
    assert parse_batches([], None) == (1, 16, 32)
    assert parse_batches([4], " 1, 16 ,") == (4, 1, 16)
    assert [cell.batch for cell in cells((4, 1, 4), 8, 2)] == [4, 1]
    with pytest.raises(BenchError, match="--batches is '1,x'"):
        parse_batches([], "1,x")


@pytest.mark.parametrize(("field", "value"), [("batch", 0), ("prompt_len", 0), ("output_len", 1)])
def test_a_cell_that_shows_nothing_is_refused(field: str, value: int) -> None:
    with pytest.raises(BenchError, match=f"{field} is {value}"):
        Cell(**{"batch": 1, "prompt_len": 1, "output_len": 2, field: value})


def test_kv_blocks_hold_every_sequence_whole() -> None:
    assert Cell(batch=3, prompt_len=31, output_len=2).kv_blocks(32) == 6
    assert Cell(batch=3, prompt_len=30, output_len=2).kv_blocks(32) == 3


def test_one_variant_is_simply_octavo() -> None:
    assert variants(["grpc"], ["fp16"], [2], [4]) == {
        "octavo": Variant(transport="grpc", kernel="fp16", replicas=2, experts_per_actor=4)
    }


def test_several_are_called_by_what_differs() -> None:
    named = variants(["auto", "grpc", "auto"], ["auto"], [1], [1, 8])
    assert list(named) == [
        "octavo transport=auto experts_per_actor=1",
        "octavo transport=auto experts_per_actor=8",
        "octavo transport=grpc experts_per_actor=1",
        "octavo transport=grpc experts_per_actor=8",
    ]
    assert named["octavo transport=grpc experts_per_actor=8"] == Variant(transport="grpc", experts_per_actor=8)


def test_a_variant_changes_the_configuration_and_nothing_else() -> None:
    base = ClusterConfig(model="here", max_num_seqs=7)
    changed = Variant(kernel="fp32", replicas=2).config(base, "bench-1")
    assert changed == ClusterConfig(model="here", max_num_seqs=7, kernel="fp32", replicas=2, namespace="bench-1")
    with pytest.raises(ConfigError, match="transport is 'pigeon'"):
        Variant(transport="pigeon").config(base, "bench-1")
