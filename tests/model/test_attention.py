"""Paged attention against a plain fp64 softmax, and bit for bit against itself under every batching."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import PagedAttention
from model.attention_plan import KEY_SPAN
from model.batch import ForwardBatch, SequenceSlice
from model.config import ModelConfig
from model.kv_cache import KVCache, block_bytes, default_kv_dtype
from model.numerics import RowClass, same_bits

BLOCK = 32


def config(*, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, window: int | None = None) -> ModelConfig:
    return ModelConfig(
        num_layers=1,
        hidden_size=heads * head_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_size=8,
        num_experts=1,
        top_k=1,
        vocab_size=8,
        max_context=8192,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        sliding_window=window,
        tied_embeddings=False,
        bos_token_id=None,
        eos_token_ids=(),
    )


class Sheet:
    """Sequences with random queries, keys and values, written to scattered blocks of a NaN-filled cache."""

    def __init__(self, config: ModelConfig, lengths: Sequence[int], seed: int = 0, scale: float = 2.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.config = config
        self.attention = PagedAttention(config, "cpu")
        per_sequence = [-(-length // BLOCK) for length in lengths]
        order = torch.randperm(sum(per_sequence) + 3, generator=generator).tolist()
        self.tables = [tuple(order.pop() for _ in range(count)) for count in per_sequence]
        self.kv = KVCache(config, sum(per_sequence) + 3, BLOCK)
        self.kv.kv(0).fill_(torch.nan)
        self.q, self.k, self.v = [], [], []
        for length, table in zip(lengths, self.tables, strict=True):
            shapes = [(length, heads, config.head_dim) for heads in (config.num_heads, config.num_kv_heads)]
            self.q.append(torch.randn(shapes[0], generator=generator) * scale)
            self.k.append(torch.randn(shapes[1], generator=generator))
            self.v.append(torch.randn(shapes[1], generator=generator))
            plan = self.attention.plan(ForwardBatch.build([[0] * length], [0], [table]), BLOCK)
            self.kv.write(0, plan.slots_T, torch.cat((self.k[-1], self.v[-1]), dim=1), plan.cleared)

    def run(self, slices: Sequence[tuple[int, int, int]]) -> Tensor:
        """Answers for `(sequence, first position, count)` in one call."""
        batch = ForwardBatch.build(
            [[0] * count for _, _, count in slices],
            [start for _, start, _ in slices],
            [self.tables[index] for index, _, _ in slices],
        )
        q_THd = torch.cat([self.q[index][start : start + count] for index, start, count in slices])
        return self.attention.run(q_THd, self.kv.kv(0), self.attention.plan(batch, BLOCK))

    def expected(self, index: int) -> Tensor:
        """Plain softmax attention of one whole sequence, in fp64."""
        config = self.config
        repeat = config.num_heads // config.num_kv_heads
        q, k, v = (tensor[index].double().transpose(0, 1) for tensor in (self.q, self.k, self.v))
        scores = q @ k.repeat_interleave(repeat, 0).transpose(1, 2) * config.head_dim**-0.5
        at = torch.arange(scores.shape[-1])
        hidden = at[None, :] > at[:, None]
        if config.sliding_window is not None:
            hidden |= at[None, :] <= at[:, None] - config.sliding_window
        mixed = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ v.repeat_interleave(repeat, 0)
        return mixed.transpose(0, 1).flatten(1)


SHAPES = [
    config(),
    config(heads=4, kv_heads=4),
    config(heads=4, kv_heads=1, head_dim=18),
    config(heads=6, kv_heads=2, head_dim=8),
    config(window=1),
    config(window=50),
    config(window=128, head_dim=18),
    config(window=300),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: f"{c.num_heads}-{c.num_kv_heads}-{c.sliding_window}")
def test_a_whole_prefill_equals_plain_softmax(shape: ModelConfig) -> None:
    sheet = Sheet(shape, [400])
    torch.testing.assert_close(sheet.run([(0, 0, 400)]).double(), sheet.expected(0), rtol=0, atol=5e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda c: f"{c.num_heads}-{c.num_kv_heads}-{c.sliding_window}")
def test_chunks_and_decode_equal_the_whole_bit_for_bit(shape: ModelConfig) -> None:
    sheet = Sheet(shape, [400], seed=1)
    whole = sheet.run([(0, 0, 400)])
    for chunk in (7, 33, 128, 129):
        parts = [sheet.run([(0, at, min(chunk, 400 - at))]) for at in range(0, 400, chunk)]
        assert same_bits(torch.cat(parts), whole), chunk
    for at in (0, 1, 31, 32, 127, 128, 255, 256, 399):
        assert same_bits(sheet.run([(0, at, 1)]), whole[at : at + 1]), at


@pytest.mark.parametrize("window", [None, 700])
def test_contexts_of_several_spans(window: int | None) -> None:
    length = KEY_SPAN * 8 + 300
    sheet = Sheet(config(window=window, heads=2, kv_heads=1, head_dim=8), [length, 200], seed=2)
    whole = sheet.run([(0, 0, length)])
    torch.testing.assert_close(whole.double(), sheet.expected(0), rtol=0, atol=5e-6)
    for at in (2047, 2048, 2049, 2747, 4095, 4096, length - 1):
        assert same_bits(sheet.run([(0, at, 1)]), whole[at : at + 1]), at
        assert same_bits(sheet.run([(1, 199, 1), (0, at, 1)])[1:], whole[at : at + 1]), at
    late = sheet.run([(1, 0, 200), (0, 4000, 333)])
    assert same_bits(late[200:], whole[4000:4333])


@pytest.mark.parametrize("window", [None, 90])
def test_many_decodes_of_different_lengths_at_once(window: int | None) -> None:
    lengths = [1 + (37 * index) % 600 for index in range(70)]
    sheet = Sheet(config(window=window), lengths, seed=3)
    together = sheet.run([(index, length - 1, 1) for index, length in enumerate(lengths)])
    for index, length in enumerate(lengths):
        alone = sheet.run([(index, length - 1, 1)])
        assert same_bits(alone, together[index : index + 1]), (index, length)


LENGTHS = [300, 170, 128, 40, 1]


@cache
def mixed(window: int | None) -> tuple[Sheet, list[Tensor]]:
    """Sequences of `LENGTHS`, and each one's answers in a prefill of its own."""
    sheet = Sheet(config(window=window), LENGTHS, seed=4)
    return sheet, [sheet.run([(index, 0, length)]) for index, length in enumerate(LENGTHS)]


@settings(max_examples=40, deadline=None)
@given(data=st.data(), window=st.sampled_from([None, 60]))
def test_any_mixture_of_prefills_and_decodes_gives_the_same_bits(data: st.DataObject, window: int | None) -> None:
    chosen = data.draw(st.lists(st.sampled_from(range(len(LENGTHS))), min_size=1, unique=True))
    slices = []
    for index in chosen:
        start = data.draw(st.integers(0, LENGTHS[index] - 1))
        slices.append((index, start, data.draw(st.integers(1, LENGTHS[index] - start))))
    sheet, whole = mixed(window)
    out, row = sheet.run(slices), 0
    for index, start, count in slices:
        assert same_bits(out[row : row + count], whole[index][start : start + count])
        row += count


def test_another_sequences_nan_stays_its_own() -> None:
    sheet = Sheet(config(), [200, 200], seed=5)
    clean = sheet.run([(0, 150, 50), (1, 199, 1)])
    for block in sheet.tables[1]:
        sheet.kv.kv(0)[block] = torch.nan
    dirty = sheet.run([(0, 150, 50), (1, 199, 1)])
    assert same_bits(dirty[:50], clean[:50])
    assert bool(dirty[50:].isnan().all())


def test_extreme_scores_neither_overflow_nor_vanish() -> None:
    sheet = Sheet(config(), [300], seed=6, scale=200.0)
    torch.testing.assert_close(sheet.run([(0, 0, 300)]).double(), sheet.expected(0), rtol=0, atol=2e-4)


def test_small_row_classes_still_give_exact_attention() -> None:
    """On a machine where hardly any row counts agree, queries are cut into more and smaller calls."""
    sheet = Sheet(config(), [300], seed=7)
    expected = sheet.expected(0)
    one = RowClass((1,))
    sheet.attention.shape = replace(
        sheet.attention.shape, token_class=RowClass((2,)), key_class=RowClass((KEY_SPAN,)), batch_class=one
    )
    whole = sheet.run([(0, 0, 300)])
    torch.testing.assert_close(whole.double(), expected, rtol=0, atol=5e-6)
    assert same_bits(sheet.run([(0, 299, 1)]), whole[299:])


def test_a_short_block_table_and_a_wrong_block_size_are_refused() -> None:
    attention = PagedAttention(config(), "cpu")
    batch = ForwardBatch.build([[1] * 40], [0], [[0]])
    with pytest.raises(ValueError, match="context of 40 needs more than 1 blocks of 32"):
        attention.plan(batch, 32)
    with pytest.raises(ValueError, match="must divide 128, got 48"):
        attention.plan(batch, 48)


def test_the_cache_stores_keys_and_values_where_it_is_told() -> None:
    shape = config()
    kv = KVCache(shape, num_blocks=3, block_size=4, dtype=torch.bfloat16)
    k, v = torch.randn(2, 2, 16), torch.randn(2, 2, 16)
    kv.write(0, torch.tensor([9, 2]), torch.cat((k, v), dim=1))
    assert torch.equal(kv.k(0)[2, 1], k[0].to(torch.bfloat16))
    assert torch.equal(kv.v(0)[0, 2], v[1].to(torch.bfloat16))
    kv.write(0, torch.tensor([8]), torch.cat((k, v), dim=1)[:1], cleared=torch.tensor([9, 10]))
    assert torch.equal(kv.k(0)[2, 0], k[0].to(torch.bfloat16))
    assert not kv.kv(0)[2, 1:3].any()
    assert kv.k(0).shape == kv.v(0).shape == (3, 4, 2, 16)
    assert kv.nbytes == 3 * block_bytes(shape, 4, torch.bfloat16) == 3 * 4 * 2 * 2 * 16 * 2
    assert kv.num_layers == 1
    assert (default_kv_dtype("cpu"), default_kv_dtype("cuda")) == (torch.float32, torch.bfloat16)
    with pytest.raises(ValueError, match="at least one block"):
        KVCache(shape, 0, 4)


def test_a_half_precision_cache_is_close() -> None:
    sheet = Sheet(config(), [200], seed=8, scale=0.5)
    exact = sheet.run([(0, 0, 200)])
    half = KVCache(sheet.config, sheet.kv.num_blocks, BLOCK, torch.bfloat16)
    half.kv(0).copy_(sheet.kv.kv(0))
    sheet.kv = half
    torch.testing.assert_close(sheet.run([(0, 0, 200)]), exact, rtol=0, atol=3e-2)


def test_a_batch_checks_what_it_is_built_from() -> None:
    with pytest.raises(ValueError, match="num_tokens must be between 1 and context_len"):
        SequenceSlice(0, 5, (0,))
    with pytest.raises(ValueError, match="at least one sequence"):
        ForwardBatch.build([], [], [])
    with pytest.raises(ValueError, match=r"logits_rows must lie in 0..1, got \[2\]"):
        ForwardBatch.build([[1, 2]], [0], [[0]], [2])
    batch = ForwardBatch.build([[5, 6, 7], [9]], [0, 4], [[0], [3]])
    assert batch.positions_T.tolist() == [0, 1, 2, 4]
    assert (batch.logits_rows, batch.num_tokens, batch.sequences[1].start) == ((2, 3), 4, 4)
