"""The backbone as a generator: what it yields, what it refuses, what it reports; parity is tested elsewhere."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model.batch import ForwardBatch
from model.kernels import KernelError
from model.kv_cache import KVCache
from model.numerics import same_bits
from model.storage.checkpoint import COORDINATOR, Checkpoint
from model.transformer import Backbone, load_local, run_local
from tests.support.checkpoints import write_dense_llama, write_mixtral
from tests.support.paged import PagedModel, random_ids


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fp16")
    write_mixtral(path, dtype=torch.float16, layers=3)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> PagedModel:
    return PagedModel(path)


def one_prompt(length: int = 9) -> ForwardBatch:
    return ForwardBatch.build([random_ids(length)], [0], [[0]])


def test_forward_asks_once_per_layer_and_returns_the_wanted_rows(model: PagedModel) -> None:
    kv = KVCache(model.config, 4, 32)
    batch = ForwardBatch.build([random_ids(9)], [0], [[2]], [8, 0])
    steps = model.backbone.forward(batch, kv)
    call = next(steps)
    for layer in range(3):
        assert call.layer == layer
        assert call.plan.x_ND.shape == (9 * 2, 64)
        assert sum(call.plan.counts) == 9 * 2
        out_ND = model.experts.run(layer, call.plan)
        if layer < 2:
            call = steps.send(out_ND)
    with pytest.raises(StopIteration) as stopped:
        steps.send(out_ND)
    logits_RV: Tensor = stopped.value.value
    assert logits_RV.shape == (2, 300)
    assert logits_RV.dtype == torch.float32
    whole = model.score(random_ids(9))
    assert same_bits(logits_RV, whole[[8, 0]])


def test_an_abandoned_forward_leaves_nothing_behind(model: PagedModel) -> None:
    ids = random_ids(40, seed=3)
    expected = model.score(ids)
    abandoned = model.backbone.forward(one_prompt(), model.kv)
    next(abandoned)
    abandoned.close()
    assert same_bits(model.score(ids), expected)


def test_a_wrong_answer_shape_is_refused(model: PagedModel) -> None:
    steps = model.backbone.forward(one_prompt(), KVCache(model.config, 1, 32))
    call = next(steps)
    with pytest.raises(ValueError, match=r"experts answered with shape \(17, 64\), expected \(18, 64\)"):
        steps.send(call.plan.x_ND[:-1])


@pytest.mark.parametrize("token", [-1, 300])
def test_a_token_outside_the_vocabulary_is_refused_before_anything_is_written(model: PagedModel, token: int) -> None:
    kv = KVCache(model.config, 1, 32)
    kv.kv(0).zero_()
    with pytest.raises(ValueError, match=r"token ids must lie in 0\.\.299"):
        next(model.backbone.forward(ForwardBatch.build([[5, token]], [0], [[0]]), kv))
    assert not kv.kv(0).any()


def test_a_position_past_the_context_is_refused(model: PagedModel) -> None:
    batch = ForwardBatch.build([[5]], [512], [list(range(17))])
    with pytest.raises(ValueError, match="position 512 is past the model's context of 512"):
        next(model.backbone.forward(batch, KVCache(model.config, 17, 32)))


def test_a_dense_model_shows_its_normalised_inputs_in_token_order(tmp_path: Path) -> None:
    write_dense_llama(tmp_path)
    backbone, experts = load_local(Checkpoint.open(tmp_path))
    kv = KVCache(backbone.config, 2, 32)
    together = next(backbone.forward(one_prompt(6), kv)).plan
    assert together.counts == (6,)
    alone = next(backbone.forward(ForwardBatch.build([random_ids(6)[:1]], [0], [[1]]), kv)).plan
    assert same_bits(together.x_ND[:1], alone.x_ND)
    norm_D = Checkpoint.open(tmp_path).read("layers.0.ffn_norm")
    mean_square = (together.x_ND / norm_D).pow(2).mean(-1)
    torch.testing.assert_close(mean_square, torch.ones(6), rtol=1e-3, atol=1e-3)
    assert run_local(backbone, one_prompt(6), kv, experts).shape == (1, 300)


def test_one_sequences_nan_does_not_reach_another(model: PagedModel) -> None:
    ids = random_ids(50, seed=4)
    expected = model.score(ids)
    poisoned = copy.copy(model.backbone)
    poisoned._embed_VD = model.backbone._embed_VD.clone()
    victim, carrier = [7] * 40, [8] * 40
    poisoned._embed_VD[8] = torch.nan
    clean = model.step({"victim": victim})["victim"]
    model.release("victim")
    kv = KVCache(model.config, 4, 32)
    batch = ForwardBatch.build([victim, carrier], [0, 0], [[0, 1], [2, 3]], range(80))
    logits_RV = run_local(poisoned, batch, kv, model.experts)
    assert same_bits(logits_RV[:40], clean)
    assert bool(logits_RV[40:].isnan().all())
    assert same_bits(model.score(ids), expected)


def test_loading_reports_every_tensor_of_the_coordinator_and_its_bytes(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    seen: dict[str, int] = {}
    backbone = Backbone.load(checkpoint, "fp16", "cpu", lambda name, held: seen.update({name: held}))
    assert set(seen) == set(checkpoint.names(COORDINATOR))
    assert sum(seen.values()) == backbone.weight_bytes
    assert seen["embed"] == checkpoint.nbytes("embed")
    assert seen["layers.0.wk"] == checkpoint.nbytes("layers.0.wk")
    assert backbone.kernel == "fp16"


def test_the_domain_changes_with_the_kernel_only(path: Path) -> None:
    checkpoint = Checkpoint.open(path)
    first, again, other = (Backbone.load(checkpoint, kernel, "cpu") for kernel in ("fp16", "fp16", "fp32"))
    assert first.numerics_domain == again.numerics_domain
    assert first.numerics_domain != other.numerics_domain
    assert "kernel=fp32" in other.numerics_domain


def test_an_unknown_kernel_is_refused(path: Path) -> None:
    with pytest.raises(KernelError, match="'int4' is not available on cpu"):
        Backbone.load(Checkpoint.open(path), "int4", "cpu")


def test_no_gradient_and_no_inference_tensor_leaves_the_model(model: PagedModel) -> None:
    logits = model.score(random_ids(3))
    assert not logits.requires_grad
    assert not logits.is_inference()
    logits += 1.0
