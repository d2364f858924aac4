"""A token sent once and summed where several of its experts live: fewer bytes, the same bits."""

from collections.abc import Iterable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.dispatch.merging import MergedRows, merge
from actors.dispatch.transport import ExpertRows
from model.dispatch import DispatchPlan, WeightedAnswers, combine, dispatch
from model.numerics import same_bits


def plan_of(tokens: int, experts: int, top_k: int, seed: int = 0) -> DispatchPlan:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 6, generator=generator)
    return dispatch(x_TD, torch.randn(tokens, experts, generator=generator), top_k)


def parts_of(plan: DispatchPlan, experts: Iterable[int]) -> list[ExpertRows]:
    """All rows of these experts."""
    return [ExpertRows(expert, plan.rows(expert)) for expert in sorted(experts) if plan.counts[expert]]


def computed(plan: DispatchPlan) -> torch.Tensor:
    """out_ND of experts that each do something else, and now and then give a zero of either sign."""
    out_ND = plan.x_ND.clone()
    for expert in range(len(plan.counts)):
        out_ND[plan.rows(expert)] *= 1.0 / (expert + 3)
    out_ND[out_ND.abs() < 0.05] *= 0.0
    return out_ND


def answered(message: MergedRows, out_ND: torch.Tensor) -> torch.Tensor:
    """What a replica sends back for `message`, in plain Python."""
    rows = [row for part in message.parts for row in range(part.rows.start, part.rows.stop)]
    sums: dict[int, torch.Tensor] = {}
    entries, weights = message.entries.entries_M.tolist(), message.entries.weights_M
    for row, entry, weight in zip(rows, entries, weights, strict=True):
        term = out_ND[row] * float(weight)
        sums[entry] = sums[entry] + term if entry in sums else term
    return torch.stack([sums[entry] for entry in range(len(message.entries.x_UD))])


@settings(max_examples=150, deadline=None)
@given(
    tokens=st.integers(1, 30),
    experts=st.integers(2, 8),
    data=st.data(),
    most=st.integers(1, 40),
    seed=st.integers(0, 99),
)
def test_sums_made_elsewhere_have_the_bits_of_the_combine(
    tokens: int, experts: int, data: st.DataObject, most: int, seed: int
) -> None:
    """Whole experts or parts of them, at up to three hosts."""
    top_k = data.draw(st.integers(1, experts))
    plan = plan_of(tokens, experts, top_k, seed)
    out_ND = computed(plan)
    hosts: list[list[ExpertRows]] = [[], [], []]
    for whole in parts_of(plan, range(experts)):
        cuts = sorted(data.draw(st.lists(st.integers(whole.rows.start, whole.rows.stop), max_size=2)))
        bounds = [whole.rows.start, *cuts, whole.rows.stop]
        order = data.draw(st.permutations(hosts))
        for host, start, stop in zip(order, bounds, bounds[1:], strict=False):
            if start < stop:
                host.append(ExpertRows(whole.expert_id, slice(start, stop)))
    got_ND, weights_TK = torch.full_like(out_ND, torch.nan), plan.weights_TK.clone()
    for host in filter(None, hosts):
        messages = merge(plan, host, most)
        for message in messages:
            for row, entry in _rows_and_entries(message):
                assert torch.equal(message.entries.x_UD[entry], plan.x_ND[row])
            message.unpack(answered(message, out_ND), got_ND, weights_TK)
        if not messages:
            for part in host:
                got_ND[part.rows] = out_ND[part.rows]
    assert same_bits(combine(WeightedAnswers(got_ND, weights_TK), plan), combine(out_ND, plan))


def _rows_and_entries(message: MergedRows) -> list[tuple[int, int]]:
    rows = [row for part in message.parts for row in range(part.rows.start, part.rows.stop)]
    return list(zip(rows, message.entries.entries_M.tolist(), strict=True))


def test_a_host_of_all_experts_gets_every_token_once() -> None:
    plan = plan_of(20, 8, 2)
    (message,) = merge(plan, parts_of(plan, range(8)), 64)
    assert len(message.entries.x_UD) == 20
    assert sum(part.num_rows for part in message.parts) == 40


def test_only_the_first_experts_in_order_are_summed() -> None:
    logits_TE = torch.tensor([[9.0, 8.0, 7.0, 0.0]])  # experts 0, 1, 2
    plan = dispatch(torch.ones(1, 4), logits_TE, 3)
    assert merge(plan, parts_of(plan, {1, 2}), 9) == []  # 1 + 2 first and then 0 would round otherwise
    (message,) = merge(plan, parts_of(plan, {0, 1, 3}), 9)
    assert message.tokens.tolist() == [0]


def test_where_nothing_is_saved_nothing_is_merged() -> None:
    for plan, experts in ((plan_of(10, 8, 1), range(8)), (plan_of(10, 8, 2), range(3, 4))):
        assert merge(plan, parts_of(plan, experts), 64) == []


def test_of_a_split_expert_only_the_rows_that_come_along_are_summed() -> None:
    plan = plan_of(20, 2, 2)  # every token goes to both
    first, second = parts_of(plan, range(2))
    (message,) = merge(plan, [first, ExpertRows(1, slice(second.rows.start, second.rows.start + 5))], 64)
    assert message.tokens.tolist() == list(range(5))
    assert len(message.entries.x_UD) == 20
    assert merge(plan, [ExpertRows(0, slice(0, 5)), ExpertRows(1, slice(30, 40))], 64) == [], "no token twice"


@pytest.mark.parametrize("most", [1, 5, 7, 64])
def test_messages_are_bounded_and_miss_no_row(most: int) -> None:
    plan = plan_of(33, 8, 2)
    messages = merge(plan, parts_of(plan, (0, 1, 2, 5)), most)
    assert all(len(message.entries.x_UD) <= max(most, 2) for message in messages)
    rows = sorted(row for message in messages for row, _ in _rows_and_entries(message))
    assert rows == sorted(row for expert in (0, 1, 2, 5) for row in range(33 * 2)[plan.rows(expert)])
