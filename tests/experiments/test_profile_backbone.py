"""The profile of the coordinator's part covers a whole step of each kind, and refuses what it does not know."""

from pathlib import Path

import pytest

from experiments.profile_backbone import make_case, profile_case
from model.storage.checkpoint import Checkpoint
from model.transformer import Backbone
from tests.support.checkpoints import write_mixtral


def test_cases_say_how_many_sequences_and_how_long() -> None:
    decode, prefill = make_case("d3@40")(), make_case("p2x33")()
    assert [item.num_tokens for item in decode.sequences] == [1, 1, 1]
    assert [item.context_len for item in decode.sequences] == [40, 77, 114]
    assert [item.num_tokens for item in prefill.sequences] == [33, 33]
    blocks = [block for item in decode.sequences for block in item.block_table]
    assert sorted(blocks) == list(range(2 + 3 + 4))


@pytest.mark.parametrize("name", ["", "d4", "p4@128", "x1@2"])
def test_an_unknown_case_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="a case looks like"):
        make_case(name)


def test_a_profile_times_every_phase_and_sums_them_up(tmp_path: Path) -> None:
    write_mixtral(tmp_path)
    backbone = Backbone.load(Checkpoint.open(tmp_path), "fp32", "cpu")
    for name in ("d2@40", "p2x20"):
        found = profile_case(backbone, name, repeats=1)
        assert set(found) == {"build", "prepare", "attention", "router", "dispatch", "combine", "head", "total"}
        assert all(value > 0 for value in found.values())
        assert found["total"] == pytest.approx(sum(found.values()) - found["total"], abs=0.01)
