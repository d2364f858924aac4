"""What a copy costs is what it did: time until it was ready, and steps that took longer meanwhile."""

import asyncio
import time
from pathlib import Path

import pytest
from torch import Tensor

from cluster.desired_set import MoveRefused
from experiments.scenario.copying import NUM_COPIES, CopyCost, copy_cost
from experiments.scenario.live_run import LiveCluster
from experiments.scenario.schema import read_scenario
from experiments.scenario.texts import TextSource
from model.experts import ExpertColumn
from tests.support.checkpoints import write_mixtral
from tests.support.still_supervisor import StillSupervisor
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

COPY_S = 1.0
SLOW_S = 0.1


def cost_of(tmp_path: Path, supervisor: StillSupervisor, load: str) -> CopyCost:
    model, path = tmp_path / "model", tmp_path / "scenario.yaml"
    write_mixtral(model)
    write_byte_tokenizer(model)
    path.write_text(f"phases:\n  - {{duration_s: 1, {load}, prompt_tokens: 8, output_tokens: 16}}\n")

    async def work() -> CopyCost:
        async with tiny_cluster(model) as cluster:
            live = LiveCluster(cluster.client, TextSource(model, 0, 512), supervisor)
            found = await copy_cost(live, read_scenario(path), calm_s=1.0)
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
    found = cost_of(tmp_path, supervisor, load)
    assert supervisor.made == list(range(NUM_COPIES))
    assert supervisor.loading is None
    assert COPY_S <= found.seconds < 60
    assert found.slows > 1.5


def test_a_cluster_without_room_says_so(tmp_path: Path) -> None:
    with pytest.raises(MoveRefused, match="every node is full"):
        cost_of(tmp_path, StillSupervisor(room=0), "concurrency: 2")
