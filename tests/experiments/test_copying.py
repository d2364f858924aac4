"""What copies cost and bring is what they did: time until they were ready, steps that took longer meanwhile or less
time with them.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from torch import Tensor

from cluster.desired_set import MoveRefused
from experiments.scenario import spreading
from experiments.scenario.copying import NUM_COPIES, copy_cost
from experiments.scenario.live_run import LiveCluster
from experiments.scenario.schema import Scenario, read_scenario
from experiments.scenario.spreading import busiest, spread
from experiments.scenario.texts import TextSource
from model.experts import ExpertColumn
from tests.support.checkpoints import write_mixtral
from tests.support.still_supervisor import StillSupervisor
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

T = TypeVar("T")
COPY_S = 1.0
SLOW_S = 0.1


def under_load(
    tmp_path: Path, supervisor: StillSupervisor, load: str, measure: Callable[[LiveCluster, Scenario], Awaitable[T]]
) -> T:
    model, path = tmp_path / "model", tmp_path / "scenario.yaml"
    write_mixtral(model)
    write_byte_tokenizer(model)
    path.write_text(f"phases:\n  - {{duration_s: 1, {load}, prompt_tokens: 8, output_tokens: 16}}\n")

    async def work() -> T:
        async with tiny_cluster(model) as cluster:
            live = LiveCluster(cluster.client, TextSource(model, 0, 512), supervisor)
            found = await measure(live, read_scenario(path))
            await cluster.until(lambda seen: not seen.num_running and not seen.num_waiting)
            return found

    return asyncio.run(work())


@pytest.mark.parametrize("load", ["concurrency: 2", "rate: 20"])
def test_steps_that_are_slower_while_a_copy_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: str) -> None:
    supervisor, quick = StillSupervisor(COPY_S), ExpertColumn.forward

    def slower(self: ExpertColumn, layer: int, x_MD: Tensor) -> Tensor:
        if supervisor.loading is not None:
            time.sleep(SLOW_S)
        return quick(self, layer, x_MD)

    monkeypatch.setattr(ExpertColumn, "forward", slower)
    found = under_load(tmp_path, supervisor, load, lambda live, asked: copy_cost(live, asked, calm_s=1.0))
    assert supervisor.made == list(range(NUM_COPIES))
    assert supervisor.loading is None
    assert COPY_S <= found.seconds < 60
    assert found.slows > 1.5


def test_a_cluster_without_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(MoveRefused, match="every node is full"):
        under_load(
            tmp_path, StillSupervisor(room=0), "concurrency: 2", lambda live, asked: copy_cost(live, asked, calm_s=0.1)
        )


def test_steps_with_copies_of_the_busiest_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here copies make every call slower, so that it shows which steps were counted where."""
    supervisor, quick = StillSupervisor(room=2), ExpertColumn.forward

    def slower(self: ExpertColumn, layer: int, x_MD: Tensor) -> Tensor:
        if supervisor.copied:
            time.sleep(SLOW_S)
        return quick(self, layer, x_MD)

    monkeypatch.setattr(ExpertColumn, "forward", slower)
    found = under_load(tmp_path, supervisor, "concurrency: 2", lambda live, asked: spread(live, asked, calm_s=1.0))
    load_E = found.calm.load_LE.sum(axis=0)
    assert load_E[supervisor.made[0]] > load_E.mean()
    assert len(supervisor.made) == 2 * spreading.NUM_ROUNDS, "no room for a third"
    assert supervisor.copied == [], "nothing is left"
    assert len(found.status.replicas) == 4 + 2
    assert found.kept.token_s > 2 * found.calm.token_s
    assert len(found.took_s) == len(supervisor.made)
    assert min(found.calm.messages, found.kept.messages) > 0


def test_whom_to_copy_is_who_has_most_to_do_for_each_copy() -> None:
    one_E = np.ones(4, np.int64)
    assert busiest(np.array([8.0, 7.0, 3.0, 1.0]), one_E, 3, 3) == [0, 1, 0]
    assert busiest(np.array([20.0, 7.0, 3.0, 1.0]), one_E, 3, 2) == [0, 1, 2], "no more than there are nodes"
    assert busiest(np.array([20.0, 0.0, 0.0, 0.0]), one_E, 3, 2) == [0], "nobody else has anything to do"
