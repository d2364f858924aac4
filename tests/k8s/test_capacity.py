"""Everything that an overlay asks for fits on the pods that it asks for: by the code that places it, and by weight."""

import json
from dataclasses import dataclass

import pytest

from actors.coordinator.loading import num_threads
from cluster.budget import ActorNeed, packed_bytes
from cluster.config import ClusterConfig
from cluster.desired import DesiredReplica, desired_replicas
from cluster.ids import CoordinatorId, NodeId
from cluster.placement import COORDINATOR_HOST, ZONE_LABEL, NodeSlots, place, place_coordinators
from tests.support.manifests import (
    ON_GPUS,
    OVERLAYS,
    cluster_args,
    component,
    groups,
    quantity,
    ray_container,
    ray_start_params,
)

# Measured as `test_hosts.py` runs the demo (proportional set size, so a share of what processes have in common): Ray of
# a worker 270 MiB, front door 268, HTTP proxy 84, an expert 472 with its 152 of weights. A pod shares with fewer, and
# has Ray's object store in /dev/shm besides: a gibibyte each.
RAY_BYTES = 1 << 30
FRONT_BYTES = 1 << 30


@dataclass(frozen=True)
class Shape:
    """What of a model matters here: layers, experts, dimensions; the rest of it in bytes as served."""

    layers: int
    experts: int
    dim: int
    ffn: int
    rest_bytes: int

    @property
    def expert_bytes(self) -> int:
        """One expert column as stored, two bytes an element."""
        return self.layers * 3 * self.dim * self.ffn * 2


DEMO = Shape(layers=30, experts=8, dim=576, ffn=1536, rest_bytes=170_000_000)
MIXTRAL = Shape(layers=32, experts=8, dim=4096, ffn=14336, rest_bytes=3_200_000_000)


def shape_of(name: str) -> Shape:
    return DEMO if name == "cpu-demo" else MIXTRAL


def config_of(name: str) -> ClusterConfig:
    return ClusterConfig(**cluster_args(name))


def expert_need(name: str) -> ActorNeed:
    shape, on_gpu = shape_of(name), name in ON_GPUS
    return ActorNeed(
        name="an expert",
        weight_bytes=packed_bytes(shape.expert_bytes, 2, "bf16" if on_gpu else "fp16"),
        largest_tensor_bytes=shape.dim * shape.ffn * 4,
        on_gpu=on_gpu,
    )


def desired(name: str) -> tuple[DesiredReplica, ...]:
    shape = shape_of(name)
    return desired_replicas(
        config_of(name),
        num_layers=shape.layers,
        num_experts=shape.experts,
        experts_on_gpu=name in ON_GPUS,
        memory_bytes=expert_need(name).host_bytes,
    )


def nodes_of(name: str) -> list[NodeSlots]:
    """The nodes as Ray would list them, one a pod, the head among them."""
    nodes = []
    for group, spec in groups(name).items():
        start = ray_start_params(spec)
        zone = {one["name"]: one.get("value") for one in ray_container(spec)["env"]}.get("RAY_NODE_ZONE")
        for index in range(spec.get("replicas", 1)):
            nodes.append(
                NodeSlots(
                    node_id=NodeId(f"{group}-{index}"),
                    gpu=float(start.get("num-gpus", 0)),
                    cpu=float(start["num-cpus"]),
                    memory_bytes=int(start["memory"]),
                    labels={} if zone is None else {ZONE_LABEL: zone},
                    roles=frozenset(json.loads(start["resources"])),
                )
            )
    return nodes


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_replica_finds_a_place_among_the_experts(name: str) -> None:
    placement = place(desired(name), nodes_of(name), {})
    pods = {group: component(spec) for group, spec in groups(name).items()}
    assert {pods[node.rpartition("-")[0]] for node in placement.values()} == {"expert"}
    assert len(placement) == shape_of(name).experts * config_of(name).replicas


def test_copies_are_in_different_zones_in_ha() -> None:
    placement = place(desired("ha"), nodes_of("ha"), {})
    zones: dict[tuple[int, ...], set[str]] = {}
    for replica in desired("ha"):
        zones.setdefault(replica.expert_ids, set()).add(placement[replica.replica_id].rpartition("-")[0])
    assert len(zones) == 8
    assert set(map(frozenset, zones.values())) == {frozenset({"experts-a", "experts-b"})}


@pytest.mark.parametrize("name", OVERLAYS)
def test_coordinators_have_a_pod_each(name: str) -> None:
    nodes = [node for node in nodes_of(name) if node.takes(COORDINATOR_HOST)]
    wanted = [CoordinatorId(f"coordinator-{i}") for i in range(config_of(name).coordinators)]
    placed = place_coordinators(wanted, nodes, {}, {})
    assert len(set(placed.values())) == len(wanted)
    if name in ON_GPUS:
        assert all(node.gpu == 1 for node in nodes)


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_pod_of_experts_holds_what_is_placed_there_and_ray(name: str) -> None:
    placement = place(desired(name), nodes_of(name), {})
    need = expert_need(name).host_bytes
    for group, spec in groups(name).items():
        if component(spec) != "expert":
            continue
        limit = quantity(ray_container(spec)["resources"]["limits"]["memory"])
        assert int(ray_start_params(spec)["memory"]) + RAY_BYTES <= limit
        for index in range(spec["replicas"]):
            held = sum(node == f"{group}-{index}" for node in placement.values())
            assert held * need + RAY_BYTES <= limit


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_coordinators_pod_holds_it_and_a_front_door(name: str) -> None:
    shape, config = shape_of(name), config_of(name)
    largest = 50_000 * shape.dim * 4  # the embedding, while it is read
    on_gpu = name in ON_GPUS
    need = ActorNeed(
        name="a coordinator",
        weight_bytes=shape.rest_bytes,
        largest_tensor_bytes=largest,
        kv_bytes=config.kv_cache_bytes or 1 << 30,
        on_gpu=on_gpu,
    )
    limit = quantity(ray_container(groups(name)["coordinators"])["resources"]["limits"]["memory"])
    assert need.host_bytes + RAY_BYTES + FRONT_BYTES <= limit


@pytest.mark.parametrize("name", OVERLAYS)
def test_cpus_are_asked_for_where_they_are_used(name: str) -> None:
    for spec in groups(name).values():
        requested = quantity(ray_container(spec)["resources"]["requests"]["cpu"])
        assert int(ray_start_params(spec)["num-cpus"]) <= requested, "Ray is not told of more than the pod has"
    assert num_threads(config_of(name)) >= 1


@pytest.mark.parametrize("name", ON_GPUS)
def test_a_gpu_is_asked_for_by_everybody_who_is_told_of_one(name: str) -> None:
    for group, spec in groups(name).items():
        resources = ray_container(spec)["resources"]
        told = ray_start_params(spec).get("num-gpus", "0")
        assert resources["limits"].get("nvidia.com/gpu", "0") == told
        assert resources["requests"].get("nvidia.com/gpu", "0") == told
        assert told == ("0" if group == "head" else "1")
