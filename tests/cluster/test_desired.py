"""The configuration applied to a model: every expert, as often as asked for."""

import pytest

from cluster.config import ClusterConfig, ConfigError
from cluster.desired import desired_replicas


def config(replicas: int = 1, experts_per_actor: int = 1, expert_num_gpus: float | None = None) -> ClusterConfig:
    return ClusterConfig(
        model="/m", replicas=replicas, experts_per_actor=experts_per_actor, expert_num_gpus=expert_num_gpus
    )


def test_one_actor_for_each_expert_by_default() -> None:
    made = desired_replicas(config(), num_layers=30, num_experts=8, experts_on_gpu=False, memory_bytes=7)
    assert [r.replica_id for r in made] == [f"expert-{e}-r0" for e in range(8)]
    assert [r.expert_ids for r in made] == [(e,) for e in range(8)]
    assert {(r.first_layer, r.num_layers, r.gpu, r.cpu, r.memory_bytes, r.node_id) for r in made} == {
        (0, 30, 0.0, 0.0, 7, None)
    }


def test_replicas_of_groups() -> None:
    made = desired_replicas(config(replicas=2, experts_per_actor=4), num_layers=2, num_experts=8, experts_on_gpu=True)
    assert [r.replica_id for r in made] == [
        "experts-0-3-r0",
        "experts-0-3-r1",
        "experts-4-7-r0",
        "experts-4-7-r1",
    ]
    assert made[2].expert_ids == (4, 5, 6, 7)
    assert {r.gpu for r in made} == {1.0}


@pytest.mark.parametrize(
    ("on_gpu", "override", "gpu"), [(True, None, 1), (False, None, 0), (True, 0.25, 0.25), (False, 0, 0)]
)
def test_gpus_follow_the_device_unless_overridden(on_gpu: bool, override: float | None, gpu: float) -> None:
    made = desired_replicas(config(expert_num_gpus=override), num_layers=1, num_experts=1, experts_on_gpu=on_gpu)
    assert [r.gpu for r in made] == [gpu]


def test_groups_must_come_out_even() -> None:
    with pytest.raises(ConfigError, match="experts_per_actor is 3"):
        desired_replicas(config(experts_per_actor=3), num_layers=1, num_experts=8, experts_on_gpu=False)
