"""Sums made at the replica have the bits that the coordinator's `combine` would have given; a bad merge is refused."""

import asyncio
import struct
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.expert.desk import Desk
from actors.expert.merge import Merged, unpack_merge
from actors.expert.replica import ExpertReplica
from model.dispatch import DispatchPlan, combine, dispatch
from protos import expert_pb2 as pb
from protos.codec import CodecError
from protos.expert_pb2 import REPLICA_STATE_READY
from tests.support.experts import FAR_FUTURE_US, FakeColumn, answer

WIDTH, EXPERTS = 3, 4


def desk(error: Exception | None = None) -> Desk:
    async def make() -> Desk:  # a replica belongs to an event loop
        replica = ExpertReplica("r", tuple(range(EXPERTS)), range(2), hidden_size=WIDTH)
        for expert in range(EXPERTS):
            replica.add(expert, FakeColumn(expert, error=error))
        replica.settle(REPLICA_STATE_READY)
        return Desk(replica, max_queue_tokens=1024)

    return asyncio.run(make())


def request(counts: Sequence[int], entries: Sequence[int], weights: Sequence[float]) -> pb.ForwardRequest:
    merge = pb.Merge(
        entries=struct.pack(f"<{len(entries)}i", *entries), weights=struct.pack(f"<{len(weights)}f", *weights)
    )
    return pb.ForwardRequest(sequence=1, expert_ids=range(len(counts)), expert_rows=counts, merge=merge)


def merged(plan: DispatchPlan) -> tuple[pb.ForwardRequest, Merged]:
    """The merge of a whole plan: every expert is at one replica."""
    tokens_N, weights_N = torch.empty(plan.num_rows, dtype=torch.int64), torch.empty(plan.num_rows)
    for token, (slots, weights) in enumerate(zip(plan.slots_TK.tolist(), plan.weights_TK.tolist(), strict=True)):
        for slot, weight in zip(slots, weights, strict=True):
            tokens_N[slot], weights_N[slot] = token, weight
    asked = request(plan.counts, tokens_N.tolist(), weights_N.tolist())
    made = unpack_merge(asked, len(plan.x_TD))
    assert made is not None
    return asked, made


def bits(tensor: torch.Tensor) -> list[int]:
    words: list[int] = tensor.contiguous().view(torch.int32).flatten().tolist()
    return words


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, EXPERTS), st.integers(0, 2**31), st.sampled_from([1.0, 1e-3, 1e4]))
def test_the_sum_has_the_bits_of_combine(tokens: int, top_k: int, seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, WIDTH, generator=generator) * scale
    x_TD[torch.rand(x_TD.shape, generator=generator) < 0.2] = -0.0
    plan = dispatch(x_TD, torch.randn(tokens, EXPERTS, generator=generator), top_k)
    rows = torch.cat([answer(expert, 0, plan.x_ND[plan.rows(expert)]) for expert in range(EXPERTS)])
    asked, made = merged(plan)
    at, out_TD = desk(), torch.empty_like(x_TD)
    experts = [expert for expert in range(EXPERTS) if plan.counts[expert]]
    counts = [plan.counts[expert] for expert in experts]
    work = at.admit(0, experts, counts, map_epoch=0, deadline_unix_us=FAR_FUTURE_US)
    assert made.compute(at, work, x_TD, out_TD).status == pb.STATUS_OK
    assert bits(out_TD) == bits(combine(rows, plan))
    assert len(asked.expert_rows) == EXPERTS


def test_a_negative_zero_stays_one() -> None:
    made = unpack_merge(request([1, 1], [0, 0], [1.0, 1.0]), 1)
    assert made is not None
    at, out = desk(), torch.empty(1, WIDTH)
    work = at.admit(0, [0, 1], [1, 1], map_epoch=0, deadline_unix_us=FAR_FUTURE_US)
    assert made.compute(at, work, torch.full((1, WIDTH), -0.0), out).status == pb.STATUS_OK
    x = torch.full((1, WIDTH), -0.0)
    assert bits(out) == bits(answer(0, 0, x) + answer(1, 0, x))


def test_a_failing_kernel_is_an_outcome() -> None:
    made = unpack_merge(request([1], [0], [1.0]), 1)
    assert made is not None
    at = desk(error=ArithmeticError("no"))
    work = at.admit(0, [0], [1], map_epoch=0, deadline_unix_us=FAR_FUTURE_US)
    outcome = made.compute(at, work, torch.ones(1, WIDTH), torch.empty(1, WIDTH))
    assert (outcome.status, outcome.detail) == (pb.STATUS_INTERNAL, "ArithmeticError: no")


def test_without_a_merge_rows_are_rows() -> None:
    plain = pb.ForwardRequest(expert_rows=[2, 1])
    assert unpack_merge(plain, 3) is None
    with pytest.raises(CodecError, match="2 rows of hidden for 3 routed rows"):
        unpack_merge(plain, 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"entries": [0, 1]}, "8 and 12 bytes"),
        ({"entries": [0, 1, 0, 1]}, "16 and 12 bytes"),
        ({"entries": []}, "0 and 12 bytes"),
        ({"weights": [1.0]}, "12 and 4 bytes"),
        ({"weights": [1.0] * 9}, "12 and 36 bytes"),
        ({"entries": [0, 2, 1]}, "not one of 2"),
        ({"entries": [0, -1, 1]}, "not one of 2"),
        ({"entries": [0, -(2**31), 1]}, "not one of 2"),
        ({"entries": [1, 1, 0]}, "to one expert twice"),
        ({"counts": [1, 1, 1], "entries": [1, 1, 1]}, "some of 2 entries without a row"),
    ],
)
def test_a_merge_that_does_not_fit_its_rows_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(CodecError, match=said) as caught:
        unpack_merge(request(**{"counts": [2, 1], "entries": [0, 1, 0], "weights": [0.5] * 3, **fields}), 2)
    assert caught.value.status == pb.STATUS_INVALID


def test_an_entry_that_is_cut_in_the_middle_is_refused() -> None:
    asked = request([2, 1], [0, 1, 0], [0.5] * 3)
    asked.merge.entries = asked.merge.entries[:-1]
    with pytest.raises(CodecError, match="11 and 12 bytes"):
        unpack_merge(asked, 2)
