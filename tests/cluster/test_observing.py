"""Work is what was measured between two looks, and nothing is made up where nothing was."""

import numpy as np
import pytest

from cluster.desired import DesiredReplica
from cluster.ids import ExpertId, LayerId, NodeId, ReplicaId
from cluster.observing import Counted, Look, ReplicaTimes, measure

SHAPE = (2, 3)


def counted(tokens: list[list[int]], compute_s: float, queue_s: float = 0.0, **replicas: ReplicaTimes) -> Counted:
    by_id = {ReplicaId(name): times for name, times in replicas.items()}
    return Counted(tokens_LE=np.array(tokens), compute_s=compute_s, queue_s=queue_s, replicas=by_id)


def replica(name: str, *experts: int, layers: range = range(2)) -> DesiredReplica:
    return DesiredReplica(
        replica_id=ReplicaId(name),
        expert_ids=tuple(map(ExpertId, experts)),
        first_layer=LayerId(layers.start),
        num_layers=len(layers),
    )


NOTHING = [[0, 0, 0], [0, 0, 0]]


def test_time_in_kernels_is_shared_out_by_tokens() -> None:
    first = Look(10.0, {"a": counted([[10, 0, 0], [5, 5, 0]], 1.0), "b": counted(NOTHING, 0.0)})
    last = Look(
        14.0, {"a": counted([[16, 2, 0], [5, 13, 0]], 3.0, 0.5), "b": counted([[4, 0, 0], [0, 0, 4]], 1.0, 2.0)}
    )
    seen = measure(first, last, SHAPE, [], {})
    assert seen is not None
    assert seen.tokens_LE.tolist() == [[2.5, 0.5, 0.0], [0.0, 2.0, 1.0]]
    assert seen.work_LE.sum() == pytest.approx(3.0 / 4.0), "seconds a second"
    assert seen.work_LE / seen.work_LE.sum() == pytest.approx(seen.tokens_LE / seen.tokens_LE.sum())
    assert (seen.queue_s, seen.speeds) == (2.0, {})


def test_a_coordinator_that_began_anew_counts_from_nothing_and_a_new_one_not_yet() -> None:
    first = Look(0.0, {"a": counted([[100, 0, 0], [0, 0, 0]], 9.0)})
    last = Look(2.0, {"a": counted([[4, 0, 0], [0, 0, 0]], 1.0), "new": counted([[50, 0, 0], [0, 0, 0]], 5.0)})
    seen = measure(first, last, SHAPE, [], {})
    assert seen is not None
    assert seen.tokens_LE[0, 0] == 2.0
    assert seen.work_LE[0, 0] == 0.5


def test_without_time_or_anybody_there_is_nothing_to_say() -> None:
    look = Look(1.0, {"a": counted(NOTHING, 0.0)})
    assert measure(look, look, SHAPE, [], {}) is None
    assert measure(look, Look(2.0, {"b": counted(NOTHING, 0.0)}), SHAPE, [], {}) is None
    idle = measure(look, Look(2.0, look.coordinators), SHAPE, [], {})
    assert idle is not None
    assert not idle.work_LE.any()


def test_replicas_times_say_what_each_expert_costs_and_how_fast_each_node_is() -> None:
    def times(calls: int, tokens: int, compute_s: float) -> ReplicaTimes:
        return ReplicaTimes(calls=calls, tokens=tokens, compute_s=compute_s, a_s=0.01, b_s=0.001)

    replicas = [replica("x", 0), replica("y", 1, 2)]
    places = {ReplicaId("x"): NodeId("n0"), ReplicaId("y"): NodeId("n1")}
    first = Look(0.0, {"a": counted(NOTHING, 0.0, x=times(0, 0, 0.0), y=times(5, 5, 1.0))})
    told = counted([[30, 10, 30], [30, 0, 0]], 9.0, x=times(10, 100, 0.2), y=times(15, 105, 1.4))
    seen = measure(first, Look(1.0, {"a": told}), SHAPE, replicas, places)
    assert seen is not None
    assert seen.speeds == pytest.approx({"n0": 1.0, "n1": 0.5}), "twice the time for the same calls"
    assert seen.work_LE[:, 0] == pytest.approx([0.1, 0.1])
    assert seen.work_LE[0, 1:] == pytest.approx([0.05, 0.15]), "of a host of speed 1, by tokens"


def test_a_node_that_hardly_worked_has_no_speed_yet() -> None:
    one = ReplicaTimes(calls=1, tokens=1, compute_s=0.01, b_s=0.001)
    first = Look(0.0, {"a": counted(NOTHING, 0.0)})
    seen = measure(
        first, Look(1.0, {"a": counted([[1, 0, 0], [0, 0, 0]], 1.0, x=one)}), SHAPE, [], {ReplicaId("x"): NodeId("n0")}
    )
    assert seen is not None
    assert seen.speeds == {}


def test_what_replicas_share_is_of_the_work_that_grows_and_only_known_if_all_tell_it() -> None:
    def look(at_s: float, steps: int, divisible: int | None) -> Look:
        times = ReplicaTimes(calls=steps, tokens=10 * steps, compute_s=0.02 * steps, a_s=0.01, b_s=0.001)
        tokens_LE = np.array([[10 * steps, 0, 0], [0, 0, 0]])
        one = Counted(
            tokens_LE=tokens_LE,
            compute_s=0.02 * steps,
            steps=steps,
            batches=2 * steps,
            replicas={ReplicaId("x"): times},
            divisible_LE=None if divisible is None else np.array([[divisible, 0, 0], [0, 0, 0]]),
        )
        return Look(at_s, {"a": one, "b": one})

    where = [replica("x", 0)], {ReplicaId("x"): NodeId("n0")}
    seen = measure(look(0.0, 10, 10), look(2.0, 20, 40), SHAPE, *where)
    assert seen is not None
    assert seen.growing_LE[0, 0] == pytest.approx(0.1), "half of 0.2 s a second"
    assert seen.divisible_LE is not None
    assert seen.divisible_LE[0] == pytest.approx([0.03, 0, 0]), "30 of 100 tokens"
    assert seen.batches == 4, "two coordinators with two microbatches each"
    for first, last in ((None, 40), (10, None)):
        seen = measure(look(0.0, 10, first), look(2.0, 20, last), SHAPE, *where)
        assert seen is not None
        assert seen.divisible_LE is None
    idle = measure(look(0.0, 10, 10), look(2.0, 10, 10), SHAPE, *where)
    assert idle is not None
    assert idle.batches == 1
