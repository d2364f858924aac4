"""A coordinator shares memory where it can, and goes on without where it cannot."""

from pathlib import Path

import pytest
import torch

from actors.coordinator.lane_memory import ROUNDS, lane_memory
from cluster.config import ClusterConfig
from tests.support.checkpoints import write_mixtral
from tests.support.experts import run


@pytest.fixture
def model(tmp_path: Path) -> str:
    write_mixtral(tmp_path, hidden=32, ffn=48, layers=1, experts=2, dtype=torch.float16)
    return str(tmp_path)


def test_there_is_room_for_several_rounds_of_the_largest_batch(model: str) -> None:
    async def work() -> None:
        made = lane_memory(ClusterConfig(model=model, max_num_batched_tokens=64))
        assert made is not None
        rows = ROUNDS * 64 * 2  # every token goes to two experts
        assert (made.rows.region.num_rows, made.rows.region.width, made.num_replies) == (rows, 32, rows)
        made.close()

    run(work())


def test_nothing_is_shared_when_lanes_are_switched_off(model: str) -> None:
    assert lane_memory(ClusterConfig(model=model, transport="grpc")) is None


def test_a_model_that_cannot_be_read_is_somebody_elses_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert lane_memory(ClusterConfig(model=str(tmp_path / "nowhere"))) is None
    assert "no same-node lanes" in caplog.text
