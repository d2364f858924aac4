"""Dispatch sorts rows by expert and token, combine undoes it in a fixed order; nothing is lost or mixed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.dispatch import combine, dispatch
from model.numerics import same_bits


def random_tokens(tokens: int, experts: int, width: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, width, generator=generator),
        torch.randn(tokens, experts, generator=generator),
    )


def test_a_worked_example() -> None:
    x_TD = torch.tensor([[1.0], [2.0], [3.0]])
    logits_TE = torch.tensor([[0.0, 5.0, 4.0], [3.0, 2.0, 1.0], [1.0, 0.0, 9.0]])
    plan = dispatch(x_TD, logits_TE, 2)  # token 0 to experts 1, 2; token 1 to 0, 1; token 2 to 0, 2
    assert plan.counts == (2, 2, 2)
    assert plan.x_ND.tolist() == [[2.0], [3.0], [1.0], [2.0], [1.0], [3.0]]
    assert plan.slots_TK.tolist() == [[2, 4], [0, 3], [1, 5]]
    assert [plan.rows(expert) for expert in range(3)] == [slice(0, 2), slice(2, 4), slice(4, 6)]
    weights = torch.softmax(torch.tensor([[5.0, 4.0], [3.0, 2.0], [1.0, 9.0]]), dim=-1)
    assert torch.equal(plan.weights_TK, weights)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), data=st.data(), seed=st.integers(0, 99))
def test_dispatch_then_combine_equals_the_dense_sum(tokens: int, experts: int, data: st.DataObject, seed: int) -> None:
    top_k = data.draw(st.integers(1, experts))
    x_TD, logits_TE = random_tokens(tokens, experts, seed=seed)
    plan = dispatch(x_TD, logits_TE, top_k)
    assert len(plan.x_ND) == sum(plan.counts) == tokens * top_k
    assert sorted(plan.slots_TK.flatten().tolist()) == list(range(tokens * top_k))
    assert bool((plan.slots_TK.diff(dim=1) > 0).all())
    out_ND = plan.x_ND.clone()
    for expert in range(experts):
        out_ND[plan.rows(expert)] *= expert + 1
    probabilities_TE = torch.softmax(logits_TE, dim=-1)
    top = torch.topk(probabilities_TE, top_k)
    scale_T = ((top.indices + 1) * top.values / top.values.sum(-1, keepdim=True)).sum(-1)
    torch.testing.assert_close(combine(out_ND, plan), x_TD * scale_T[:, None])


def test_a_token_is_routed_the_same_in_any_company() -> None:
    x_TD, logits_TE = random_tokens(300, 8)
    out_TD = combine(dispatch(x_TD, logits_TE, 3).x_ND, dispatch(x_TD, logits_TE, 3))
    for part in (slice(0, 1), slice(5, 7), slice(100, 133)):
        plan = dispatch(x_TD[part], logits_TE[part], 3)
        assert same_bits(combine(plan.x_ND, plan), out_TD[part])


def test_top_1_weighs_exactly_one() -> None:
    _, logits_TE = random_tokens(50, 8)
    assert torch.equal(dispatch(torch.randn(50, 2), logits_TE * 10, 1).weights_TK, torch.ones(50, 1))


def test_equal_logits_prefer_the_lower_expert() -> None:
    plan = dispatch(torch.ones(4, 2), torch.zeros(4, 5), 2)
    assert plan.counts == (4, 4, 0, 0, 0)


def test_rows_are_sorted_by_expert_then_token() -> None:
    x_TD = torch.arange(64.0)[:, None]
    _, logits_TE = random_tokens(64, 4)
    plan = dispatch(x_TD, logits_TE, 2)
    for expert in range(4):
        tokens = plan.x_ND[plan.rows(expert), 0]
        assert bool((tokens.diff() > 0).all())


def test_one_expert_gets_the_tokens_themselves() -> None:
    x_TD = torch.randn(5, 3)
    plan = dispatch(x_TD, torch.zeros(5, 1), 1)
    assert plan.x_ND is x_TD
    assert plan.counts == (5,)
    assert torch.equal(combine(x_TD * 2, plan), x_TD * 2)


def test_one_tokens_nan_stays_its_own() -> None:
    x_TD, logits_TE = random_tokens(6, 4)
    clean = dispatch(x_TD, logits_TE, 2)
    x_TD[2], logits_TE[2] = torch.nan, torch.nan
    plan = dispatch(x_TD, logits_TE, 2)
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert same_bits(combine(plan.x_ND, plan)[keep], combine(clean.x_ND, clean)[keep])
    assert bool(combine(plan.x_ND, plan)[2].isnan().all())


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_must_lie_within_the_experts(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"between 1 and the number of experts \(4\), got {top_k}"):
        dispatch(torch.ones(2, 2), torch.ones(2, 4), top_k)


def test_an_answer_of_another_shape_is_refused() -> None:
    plan = dispatch(torch.ones(2, 3), torch.ones(2, 4), 2)
    with pytest.raises(ValueError, match=r"shape \(3, 3\), expected \(4, 3\)"):
        combine(torch.ones(3, 3), plan)


def test_rows_of_an_unknown_expert_are_refused() -> None:
    plan = dispatch(torch.ones(2, 3), torch.ones(2, 4), 2)
    with pytest.raises(IndexError, match="expert 4 is not one of the plan's 4"):
        plan.rows(4)
