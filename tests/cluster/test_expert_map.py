"""The map from experts to replicas: complete or not, never contradictory."""

import dataclasses

import pytest

from cluster.expert_map import ExpertMap, ExpertMapError, ReplicaInfo, agreeing
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId


def replica(
    name: str, experts: tuple[int, ...], layers: range = range(2), *, domain: str = "fp16", address: str = ""
) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=ReplicaId(name),
        expert_ids=tuple(ExpertId(expert) for expert in experts),
        first_layer=LayerId(layers.start),
        num_layers=len(layers),
        address=address or f"host:{name}",
        node_id=NodeId("n0"),
        numerics_domain=domain,
    )


def names(expert_map: ExpertMap, layer: int, expert: int) -> list[str]:
    return [r.replica_id for r in expert_map.replicas_for(LayerId(layer), ExpertId(expert))]


def test_lookups_find_every_holder_by_id() -> None:
    expert_map = ExpertMap(1, 2, 3, (replica("c", (1,)), replica("a", (0, 1)), replica("b", (2,), range(1, 2))))
    assert names(expert_map, 0, 0) == ["a"]
    assert names(expert_map, 1, 1) == ["a", "c"]
    assert (names(expert_map, 0, 2), names(expert_map, 1, 2)) == ([], ["b"])
    assert names(expert_map, 9, 9) == []
    assert expert_map.missing() == ((0, 2),)


def test_an_empty_map_misses_everything() -> None:
    assert len(ExpertMap(0, 2, 3, ()).missing()) == 6


def test_a_new_map_is_a_new_value_of_the_next_epoch() -> None:
    old = ExpertMap(4, 2, 1, (replica("a", (0,)),))
    new = old.with_replicas([replica("b", (0,))])
    assert (old.epoch, new.epoch) == (4, 5)
    assert (names(old, 0, 0), names(new, 0, 0)) == (["a"], ["b"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        old.epoch = 7  # type: ignore[misc]


def test_maps_are_compared_by_what_they_say() -> None:
    one, two = replica("a", (0,)), replica("b", (0,))
    assert ExpertMap(1, 2, 1, (one, two)) == ExpertMap(1, 2, 1, (two, one))
    assert ExpertMap(1, 2, 1, (one,)) != ExpertMap(2, 2, 1, (one,))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (replica("x", ()), "x holds experts"),
        (replica("x", (0, 0)), "each must be there once"),
        (replica("x", (2,)), "but there are 2"),
        (replica("x", (-1,)), "but there are 2"),
        (replica("x", (0,), range(1, 3)), r"x holds layers 1\.\.3, but there are 2"),
        (replica("x", (0,), range(0)), "x holds layers"),
        (dataclasses.replace(replica("x", (0,)), address=""), "x has no address"),
        (replica("a", (1,), address="host:9"), "replica_id 'a' is in the map twice"),
        (replica("x", (1,), address="host:a"), "address 'host:a' is in the map twice"),
        (replica("x", (0,), domain="fp32"), "x computes in numerics domain 'fp32'"),
    ],
)
def test_contradictions_are_refused_with_the_replica(wrong: ReplicaInfo, message: str) -> None:
    with pytest.raises(ExpertMapError, match=message):
        ExpertMap(1, 2, 2, (replica("a", (0,)), wrong))


@pytest.mark.parametrize(("epoch", "layers", "experts"), [(-1, 1, 1), (0, 0, 1), (0, 1, 0)])
def test_a_map_of_nothing_is_refused(epoch: int, layers: int, experts: int) -> None:
    with pytest.raises(ExpertMapError, match=f"epoch {epoch} with {layers} layers of {experts} experts"):
        ExpertMap(epoch, layers, experts, ())


def test_experts_may_differ_in_numerics_domain_but_their_replicas_may_not() -> None:
    a, b, c = replica("a", (0,)), replica("b", (1,), domain="fp32"), replica("c", (0,), domain="fp32")
    assert agreeing([c, b, a], ()) == ((a, b), (c,))


def test_those_who_serve_keep_their_domain() -> None:
    a, b = replica("a", (0,)), replica("b", (0,), domain="fp32")
    assert agreeing([a, b], [b]) == ((b,), (a,))
    assert agreeing([a, b], [replica("b", (0,), domain="bf16")]) == ((a,), (b,)), "b came back changed"


def test_a_group_must_agree_with_all_its_experts() -> None:
    a, b, group = replica("a", (0,)), replica("b", (1,), domain="fp32"), replica("c", (0, 1))
    assert agreeing([a, b, group], ()) == ((a, b), (group,))
