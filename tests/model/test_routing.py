"""Which experts each token took, against the router's own logits and against transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from model.dispatch import dispatch
from model.expert_ids import id_dtype
from model.routing import RoutingCapture, experts_of
from tests.support.checkpoints import write_dense_llama, write_mixtral
from tests.support.engines import TinyModel
from tests.support.routing import plan_experts, routed_alone, routed_by_transformers


def captured(layers: list[torch.Tensor], top_k: int) -> RoutingCapture:
    capture = RoutingCapture()
    for logits_TE in layers:
        capture.note(dispatch(torch.zeros(len(logits_TE), 4), logits_TE, top_k))
    return capture


@pytest.mark.parametrize("tokens", [1, 2, 3, 17])
@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (4, 1), (5, 5), (300, 3)])
def test_the_largest_logits_first(tokens: int, experts: int, top_k: int) -> None:
    draw = torch.Generator().manual_seed(tokens * experts)
    layers = [torch.randn(tokens, experts, generator=draw) for _ in range(3)]
    found = captured(layers, top_k).experts_TLK()
    expected = torch.stack([logits_TE.topk(top_k).indices for logits_TE in layers], dim=1)
    assert np.array_equal(found, expected.numpy())
    assert found.dtype == id_dtype(experts)
    assert found.dtype.itemsize == (1 if experts <= 256 else 2)


def test_of_equal_logits_the_lower_id() -> None:
    found = captured([torch.zeros(3, 4), torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 3)], 2).experts_TLK()
    assert found.tolist() == [[[0, 1], [1, 2]]] * 3


def test_an_expert_that_nobody_takes_shifts_nobody() -> None:
    logits_TE = torch.full((5, 6), -9.0)
    logits_TE[:, 5], logits_TE[:, 2] = 2.0, 1.0
    assert captured([logits_TE], 2).experts_TLK().tolist() == [[[5, 2]]] * 5


def test_microbatches_stand_one_behind_another() -> None:
    first, second = torch.eye(4)[:2], torch.eye(4)[2:]
    parts = [captured([first, first], 1), captured([second, second], 1)]
    assert experts_of(parts).tolist() == [[[0], [0]], [[1], [1]], [[2], [2]], [[3], [3]]]


def test_a_dense_model_has_one_expert(tmp_path: Path) -> None:
    write_dense_llama(tmp_path / "llama")
    model = TinyModel.load(tmp_path / "llama")
    assert routed_alone(model, [5, 6, 7]).tolist() == [[[0], [0]]] * 3


@pytest.mark.parametrize("shape", [{}, {"experts": 8}, {"top_k": 1}, {"top_k": 3}], ids=str)
def test_the_oracle_of_other_tests_routes_as_transformers_does(tmp_path: Path, shape: dict[str, Any]) -> None:
    oracle = write_mixtral(tmp_path / "mixtral", **shape)
    model = TinyModel.load(tmp_path / "mixtral")
    token_ids = torch.randint(3, 300, (90,), generator=torch.Generator().manual_seed(7)).tolist()
    assert np.array_equal(routed_alone(model, token_ids), routed_by_transformers(oracle, token_ids))


def test_a_plan_read_row_by_row() -> None:
    plan = dispatch(torch.zeros(3, 4), torch.tensor([[0.0, 3.0, 1.0], [5.0, 0.0, 4.0], [1.0, 2.0, 0.0]]), 2)
    assert plan_experts(plan) == [[1, 2], [0, 2], [1, 0]]
