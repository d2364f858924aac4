"""How fused attention may be called is found by experiment: on torch's own, and on ones made to misbehave."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from model.attention_plan import KEY_SPAN
from model.attention_probe import calibrate_attention
from model.config import ModelConfig
from model.fused_attention import Attend
from model.kernels import KernelError
from model.numerics import same_bits
from tests.model.test_attention import config

CPU = torch.device("cpu")


def plain(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
    """Attention of which no bit depends on company: element by element, in fp64, rounded once."""
    scores = (q.double().unsqueeze(-2) * k.double().unsqueeze(-3)).sum(-1) * scale + attn_mask
    weights = torch.softmax(scores, -1)
    return (weights.unsqueeze(-1) * v.double().unsqueeze(-3)).sum(-2).float()


def wrong_where(is_wrong: Any) -> Attend:
    """`plain`, off by one part in a million where `is_wrong(sequences, rows, keys)`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
        out = plain(q, k, v, attn_mask=attn_mask, scale=scale)
        return out * 1.000001 if is_wrong(len(q), q.shape[2], k.shape[2]) else out

    return attend


SMALL = config(heads=2, kv_heads=1, head_dim=8)


def test_numbers_that_disagree_are_left_out() -> None:
    everywhere = calibrate_attention(SMALL, CPU, plain)
    assert everywhere.token_class.buckets[0] == 1
    assert everywhere.key_class.buckets[0] == 32
    assert everywhere.batch_class.buckets[:4] == (1, 2, 3, 4)

    few_rows = calibrate_attention(SMALL, CPU, wrong_where(lambda n, rows, keys: rows < 8))
    assert few_rows.token_class.buckets[0] == 4
    some_keys = calibrate_attention(SMALL, CPU, wrong_where(lambda n, rows, keys: keys == 96))
    assert set(everywhere.key_class.buckets) - set(some_keys.key_class.buckets) == {96}
    rest_of_a_span = calibrate_attention(SMALL, CPU, wrong_where(lambda n, rows, keys: keys == KEY_SPAN + 128))
    assert set(everywhere.key_class.buckets) - set(rest_of_a_span.key_class.buckets) == {128}
    some_batches = calibrate_attention(SMALL, CPU, wrong_where(lambda n, rows, keys: n == 3))
    assert set(everywhere.batch_class.buckets) - set(some_batches.batch_class.buckets) == {3}


def test_a_single_key_count_remains_where_nothing_else_agrees() -> None:
    shape = calibrate_attention(SMALL, CPU, wrong_where(lambda n, rows, keys: keys % KEY_SPAN))
    assert shape.key_class.buckets == (KEY_SPAN,)
    assert [shape.key_length(keys) for keys in (1, 512, 513)] == [512, 512, 1024]


def test_attention_that_rounds_by_what_is_masked_is_refused() -> None:
    with pytest.raises(KernelError, match="rounds by what is masked"):
        calibrate_attention(SMALL, CPU, wrong_where(lambda n, rows, keys: keys > KEY_SPAN))


@pytest.mark.parametrize(
    "model", [config(), config(heads=9, kv_heads=3, head_dim=64), config(heads=4, kv_heads=4, head_dim=18)]
)
def test_all_allowed_numbers_agree_with_each_other(model: ModelConfig) -> None:
    """The probe checks one number at a time; here they vary together."""
    shape = calibrate_attention(model, CPU)
    generator = torch.Generator().manual_seed(9)
    heads, kv_heads, width = shape.heads_per_kv, shape.num_kv_heads, shape.head_dim
    lengths = [*shape.key_class.buckets, KEY_SPAN + shape.key_class.buckets[0]]
    k, v = torch.randn(2, 1, kv_heads, max(lengths), width, generator=generator)
    q = torch.randn(1, kv_heads, heads, width, generator=generator)
    for seen in (lengths[0] - 1, 200, 500):
        answers = []
        for keys in [keys for keys in lengths if keys >= seen]:
            for tokens in shape.token_class.buckets:
                for sequences in (1, shape.batch_class.buckets[-1]):
                    mask = torch.zeros(1, 1, 1, keys).masked_fill_(torch.arange(keys) >= seen, -torch.inf)
                    found = scaled_dot_product_attention(
                        q.repeat(sequences, 1, tokens, 1),
                        k[:, :, :keys].repeat(sequences, 1, 1, 1),
                        v[:, :, :keys].repeat(sequences, 1, 1, 1),
                        attn_mask=mask,
                        scale=0.3,
                    )
                    answers += [found[:, :, at : at + heads] for at in range(0, heads * tokens, heads)]
        assert all(same_bits(answer, answers[0][:1].expand_as(answer)) for answer in answers), seen
