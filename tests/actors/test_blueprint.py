"""The memory of a cluster on paper: experts in the kernel asked for, the backbone in one that loses nothing."""

import pytest
import torch

from actors.supervision.blueprint import Blueprint
from cluster.config import ClusterConfig, KernelName
from model.storage.checkpoint import COORDINATOR, Checkpoint, Expert
from tests.support.checkpoints import write_mixtral


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("model")
    write_mixtral(path, dtype=torch.float16)
    return Checkpoint.open(path)


@pytest.mark.parametrize(
    ("kernel", "expert_share", "backbone_share"),
    [("auto", 1.0, 1.0), ("fp32", 2.0, 2.0), ("fp16", 1.0, 1.0), ("bf16", 1.0, 1.0), ("int8", 0.5, 1.0)],
)
def test_weights_take_the_kernels_bytes(
    checkpoint: Checkpoint, kernel: KernelName, expert_share: float, backbone_share: float
) -> None:
    config = ClusterConfig(model="m", kernel=kernel, device="cpu", experts_device="cpu")
    needs = {need.name: need for need in Blueprint(config, checkpoint, 0.0).needs(1 << 40)}
    backbone = needs.pop("coordinator-0")
    assert backbone.weight_bytes == backbone_share * checkpoint.owned_bytes(COORDINATOR)
    assert len(needs) == checkpoint.config.num_experts
    assert {need.weight_bytes for need in needs.values()} == {expert_share * checkpoint.owned_bytes(Expert(0))}
