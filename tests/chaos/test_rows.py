"""The table and its command line: what is registered, how rows are chosen and ordered, and what they ask."""

import json

import pytest

from experiments.serving.results import RequestFailed
from tests.chaos.__main__ import main
from tests.chaos.asks import Load, body
from tests.chaos.clusters import COUNTS, Counters, sum_counters, unhealthy
from tests.chaos.figures import Bar, Stream
from tests.chaos.row import ROWS_DIR, all_rows, by_needs, choose, row
from tests.chaos.stream import take


def test_every_row_of_this_suite_is_there_in_the_tables_order() -> None:
    ids = list(all_rows())
    assert [one for one in ids if one in {"F1", "F2", "F3", "F4", "F6", "F11", "S1"}] == [
        *("F1", "F2", "F3", "F4", "F6", "F11", "S1")
    ]
    assert len(ids) >= len(list(ROWS_DIR.glob("[a-z]*.py")))
    assert all(one.bar.text and one.fault and one.promise and one.repeats >= 1 for one in all_rows().values())


def test_rows_are_chosen_by_id_and_unknown_ones_refused() -> None:
    assert [one.id for one in choose(" F3, F1")] == ["F3", "F1"]
    assert [one.id for one in choose("")] == list(all_rows())
    with pytest.raises(ValueError, match="no row F99"):
        choose("F1,F99")


def test_rows_that_can_share_a_cluster_stand_side_by_side() -> None:
    ids = [one.id for one in by_needs(choose("F1,F2,F6,F3"))]
    assert ids == ["F1", "F3", "F2", "F6"]


def test_two_rows_cannot_have_one_id() -> None:
    known = all_rows()["F1"]

    async def another(ctx: object) -> None:
        pass

    with pytest.raises(ValueError, match="two rows F1"):
        row("F1", fault="f", promise="p", bar=Bar(text="b"), needs=known.needs)(another)
    assert all_rows()["F1"] is known


def test_requests_are_a_function_of_the_seed() -> None:
    load = Load(streams=8)
    keys = load.keys()
    bodies = {key: body(load, key, "m") for key in keys}
    assert bodies == {key: body(load, key, "m") for key in keys}
    assert len({json.dumps(one) for one in bodies.values()}) == len(keys)
    assert bodies != {key: body(Load(streams=8, seed=1), key, "m") for key in keys}
    lanes = [one for key, one in bodies.items() if key[0] == "lane"]
    assert sum(one["temperature"] == 0 for one in lanes) == len(lanes) // 2
    assert all("seed" in one for one in lanes if one["temperature"])
    assert any("logprobs" in one for one in lanes)
    assert any("presence_penalty" in one for one in lanes)
    assert {load.lane(3, count) for count in range(10)} <= set(keys)
    assert {load.arrival(count) for count in range(20)} <= set(keys)


def test_a_chunk_is_written_down_or_raises() -> None:
    stream = Stream(("lane", 0, 0), 0.0)
    choice = {"token_ids": [5, 6], "finish_reason": None, "logprobs": {"token_logprobs": [-0.5, -1.0]}}
    assert take(stream, {"choices": [choice]}, 2.0) == ""
    assert take(stream, {"choices": [{"token_ids": [7], "finish_reason": "length"}]}, 3.0) == "length"
    assert (stream.tokens, stream.times_s, stream.logprobs) == ([5, 6, 7], [2.0, 2.0, 3.0], [-0.5, -1.0])
    with pytest.raises(RequestFailed, match="gone"):
        take(stream, {"error": {"message": "gone"}}, 4.0)


def test_counters_and_health_that_a_coordinator_does_not_tell_are_unknown() -> None:
    assert sum_counters([{}, {}]) == Counters(None, None)
    assert sum_counters([]) == Counters(None, None)
    told = dict(zip(COUNTS, (100, 2, 3), strict=True))
    assert sum_counters([told, told]) == Counters(200, 10)
    assert Counters(200, 10).since(Counters(150, 4)) == Counters(50, 6)
    assert Counters(20, 1).since(Counters(150, 4)) == Counters(20, 1)  # it began anew
    assert Counters(None, None).since(Counters(1, 1)) == Counters(None, None)
    assert unhealthy({}) is None
    assert unhealthy({"replica_health": [{"replica_id": "a", "state": "healthy"}]}) is None
    assert unhealthy({"replica_health": [{"replica_id": "a", "state": "ejected"}]}) == "a is ejected"


def test_the_command_lists_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list"]) == 0
    assert "SIGKILL the only replica" in capsys.readouterr().err
    assert main(["--rows", "nothing"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "no row nothing" in said.err
    with pytest.raises(SystemExit):
        main(["--repeats", "0"])
