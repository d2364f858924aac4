"""Every decoder on some thousand damaged inputs, and the harness itself: it sees what it is there to see."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import campaign
from tests.fuzz.mutation import MAX_BYTES, damaged
from tests.fuzz.registry import MAKERS, make
from tests.fuzz.shares import names_of, shares
from tests.fuzz.target import MIB, Target

SEED = 20_261_126


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.parametrize("name", MAKERS)
def test_a_decoder_keeps_its_word(scratch: Path, name: str) -> None:
    target = make(name, scratch)
    for good in target.seeds:
        target.decode(good)  # else everything is refused at the door
    report = campaign.run(target, executions=target.quick, seed=SEED, weigh_every=8)
    assert report.crashes == 0, "\n".join(report.shown)
    assert report.executions == target.quick
    assert 0 < report.accepted < report.executions, "some inputs get through, and some do not"


# --- the harness ---


def decoder(decode: Callable[[bytes], object], **changes: object) -> Target:
    parts: dict[str, object] = {"name": "planted", "decode": decode, "errors": (ValueError,), "seeds": (b"seed",)}
    return Target(**{**parts, **changes})  # type: ignore[arg-type]


def test_an_error_that_is_not_declared_is_a_crash() -> None:
    def decode(data: bytes) -> None:
        raise KeyError(data) if len(data) % 2 else ValueError

    report = campaign.run(decoder(decode), executions=200, seed=1)
    odd = sum(len(damaged(decoder(decode), 1, number)) % 2 for number in range(200))
    assert report.crashes == odd > 0
    assert "KeyError" in report.shown[0]


def test_memory_beyond_the_bound_is_a_crash() -> None:
    greedy = decoder(lambda data: bytearray(3 * MIB), base_bytes=MIB)
    report = campaign.run(greedy, executions=16, seed=1, weigh_every=4)
    assert report.crashes == 4
    assert report.max_allocated >= 3 * MIB
    assert (
        campaign.run(decoder(lambda data: bytearray(3 * MIB), base_bytes=4 * MIB), executions=16, seed=1).crashes == 0
    )


def test_time_beyond_the_bound_is_a_crash_even_of_a_decoder_that_catches_all() -> None:
    def decode(data: bytes) -> None:
        with contextlib.suppress(Exception):  # as a careless decoder does
            time.sleep(60)

    report = campaign.run(decoder(decode, max_s=0.05), executions=2, seed=1)
    assert (report.crashes, report.executions) == (2, 2)


def test_inputs_are_a_function_of_seed_and_number() -> None:
    target = decoder(len, seeds=(b"abc" * 100, b'{"a": [1, 2, {"b": null}]}'), is_json=True, words=(b"WORD",))
    once = [damaged(target, 1, number) for number in range(500)]
    assert once == [damaged(target, 1, number) for number in range(500)]
    assert once != [damaged(target, 2, number) for number in range(500)]
    assert len(set(once)) > 400
    assert max(map(len, once)) <= MAX_BYTES
    assert any(b"WORD" in one for one in once)


def test_executions_are_shared_out_and_none_is_lost() -> None:
    given = shares(["submit", "lane_hello", "frame"], 1000)
    assert sum(given.values()) == 1000
    assert given["submit"] > given["lane_hello"]
    assert names_of("") == list(MAKERS)
    with pytest.raises(SystemExit, match="there is no decoder 'nobody'"):
        names_of("nobody")


def test_a_report_is_a_line_of_json() -> None:
    line = json.loads(json.dumps(campaign.Report("x", executions=2).line()))
    assert line.keys() >= {"decoder", "executions", "crashes", "seconds", "max_rss_growth"}
    assert "shown" not in line
