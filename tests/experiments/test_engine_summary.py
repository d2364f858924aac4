"""Rounds that interleave, and what a cell says of them: medians, ratios within repeats, agreement, tables."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from experiments.engine_bench.cells import Cell
from experiments.engine_bench.contestants import Prompts, Sample
from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.report import JsonLines, show
from experiments.engine_bench.rounds import Measurement, Rounds
from experiments.engine_bench.summary import CellSummary, Spread, agreement, summarise, whole_repeats
from experiments.engine_bench.timing import Run
from tests.support.contestants import FakeContestant, some_shares

CELLS = (Cell(batch=1, prompt_len=4, output_len=3), Cell(batch=2, prompt_len=4, output_len=3))


def make_prompts(count: int, length: int, seed: int) -> Prompts:
    return [[1000 * seed + 10 * index] * length for index in range(count)]


def rounds(*contestants: FakeContestant, repeats: int = 2) -> Rounds:
    return Rounds(contestants=contestants, cells=CELLS, make_prompts=make_prompts, repeats=repeats)


def sample(prefill_s: float, step_s: float, tokens: tuple[int, ...] = (1, 2, 3)) -> Sample:
    times = tuple(prefill_s + step_s * step for step in range(len(tokens)))
    return Sample(Run((tokens,), (times,)), some_shares())


def measured(contestant: str, repeat: int, prefill_s: float, step_s: float, *tokens: int) -> Measurement:
    one = sample(prefill_s, step_s, tokens or (1, 2, 3))
    held = {"num_processes": 1, "pss_bytes": 10 + repeat, "weight_bytes": 0}
    return Measurement(contestant=contestant, cell=CELLS[0], repeat=repeat, prefill=one, decode=one, memory=held)


def test_contestants_take_turns_cell_by_cell_and_begin_in_turn() -> None:
    log: list[tuple[str, int, int]] = []
    ours, peer = FakeContestant("octavo", is_ours=True, log=log), FakeContestant("peer", log=log)
    told: list[str] = []
    done = rounds(ours, peer).run(lambda one: told.append(one.contestant))
    assert [(one.repeat, one.cell.batch, one.contestant) for one in done] == [
        (0, 1, "octavo"),
        (0, 1, "peer"),
        (0, 2, "peer"),
        (0, 2, "octavo"),
        (1, 1, "octavo"),
        (1, 1, "peer"),
        (1, 2, "peer"),
        (1, 2, "octavo"),
    ]
    assert told == [one.contestant for one in done]
    assert log[:3] == [("octavo", 1, 3), ("octavo", 1, 1), ("peer", 1, 3)], "a peer's one run shows both phases"


def test_all_decode_the_same_prompts_and_no_run_sees_those_of_another() -> None:
    ours, peer = FakeContestant("octavo", is_ours=True), FakeContestant("peer")
    rounds(ours, peer).run(lambda one: None)
    of_ours, of_peer = [repr(one) for one in ours.seen], [repr(one) for one in peer.seen]
    assert set(of_peer) < set(of_ours)
    assert len(set(of_ours)) == len(of_ours) == 8


def test_the_warm_up_is_short_and_reaches_every_cell() -> None:
    log: list[tuple[str, int, int]] = []
    rounds(FakeContestant("octavo", is_ours=True, log=log), FakeContestant("peer", log=log)).warm_up()
    assert log == [("octavo", 1, 3), ("peer", 1, 3), ("octavo", 2, 3), ("peer", 2, 3)]


def test_an_answer_of_another_length_is_no_measurement() -> None:
    class Short(FakeContestant):
        def generate(self, prompts: Prompts, output_len: int) -> Sample:
            return super().generate(prompts, 2)

    with pytest.raises(BenchError, match=r"peer gave \[2\] tokens where 1 sequences were to have 3"):
        rounds(Short("peer")).run(lambda one: None)


def test_the_kernel_alone_is_asked_with_the_load_that_was_counted() -> None:
    asked: list[tuple[int, object, int]] = []

    def kernel_step(cell: Cell, load: object, seed: int) -> tuple[float, float]:
        asked.append((cell.batch, load, seed))
        return 0.35, 0.006

    many = rounds(FakeContestant("octavo", is_ours=True), FakeContestant("peer"), repeats=1)
    many.kernel_step = kernel_step
    done = many.run(lambda one: None)
    assert asked == [(1, ((3, 1),), 1), (2, ((3, 1),), 1)]
    assert [round(one.kernel_share, 6) for one in done if one.contestant == "octavo"] == [0.7, 0.7]
    assert {one.kernel_share for one in done if one.contestant == "peer"} == {0.0}
    ours = [one for one in done if one.contestant == "octavo"]
    assert {round(one.kernel_cpu_share, 6) for one in ours} == {0.6}, "6 of 8 + 2 ms of CPU"
    assert (ours[0].to_json()["kernel_step_ms"], ours[0].to_json()["kernel_cpu_ms"]) == (350.0, 6.0)
    shown = io.StringIO()
    show([summarise(cell, done, ["octavo"]) for cell in CELLS], Console(file=shown, width=240))
    assert next(line.split()[-4:] for line in shown.getvalue().splitlines() if "octavo" in line) == [
        "70", "%", "60", "%",
    ]  # fmt: skip


def test_a_measurement_is_a_line_of_stable_names() -> None:
    line = measured("octavo", 1, prefill_s=2.0, step_s=0.5).to_json()
    assert (line["type"], line["contestant"], line["batch"], line["repeat"]) == ("measurement", "octavo", 1, 1)
    assert (line["prefill_tok_s"], line["decode_tok_s"], line["decode_window_tokens"]) == (2.0, 2.0, 2)
    assert line["decode_step"] == some_shares().to_json()
    assert "kernel_share" not in line


def test_a_ratio_is_the_median_of_ratios_within_repeats() -> None:
    """A machine that slows down for everybody changes no ratio."""
    weather = (1.0, 4.0, 2.0)
    measurements = [measured("octavo", index, 1.0 * slow, 0.5 * slow) for index, slow in enumerate(weather)]
    measurements += [measured("peer", index, 2.0 * slow, 1.5 * slow) for index, slow in enumerate(weather)]
    summary = summarise(CELLS[0], list(reversed(measurements)), ["octavo"])
    (ratio,) = summary.ratios
    assert (ratio.of, ratio.to) == ("octavo", "peer")
    assert (ratio.prefill, ratio.decode) == (Spread(2.0, 2.0, 2.0), Spread(3.0, 3.0, 3.0))
    assert summary.contestants[0].prefill_tok_s == Spread(2.0, 1.0, 4.0)
    assert summary.contestants[0].memory["pss_bytes"] == 12
    assert summary.repeats == 3


def test_every_variant_meets_every_peer_and_the_first_variant() -> None:
    measurements = [measured(name, 0, 1.0, 0.5) for name in ("a", "b", "llama.cpp", "transformers")]
    measurements.append(measurements[0].__class__(**{**as_fields(measurements[0]), "cell": CELLS[1]}))
    summary = summarise(CELLS[0], measurements, ["a", "b"])
    pairs = [(ratio.of, ratio.to) for ratio in summary.ratios]
    assert pairs == [
        ("a", "llama.cpp"),
        ("a", "transformers"),
        ("b", "llama.cpp"),
        ("b", "transformers"),
        ("b", "a"),
    ]
    assert [one.name for one in summary.contestants] == ["a", "b", "llama.cpp", "transformers"]


def test_a_repeat_that_was_broken_off_counts_for_nothing() -> None:
    done = [measured(name, repeat, 1.0, 0.5) for repeat in (0, 1) for name in ("a", "b")]
    broken = [*done, measured("a", 2, 1.0, 0.5)]
    assert whole_repeats(broken, 2) == done
    assert whole_repeats(broken[:1], 2) == []


def as_fields(one: Measurement) -> dict[str, object]:
    return {name: getattr(one, name) for name in one.__dataclass_fields__}


def test_agreement_counts_sequences_first_tokens_and_prefixes() -> None:
    found = agreement([[1, 2, 3, 4], [1, 2, 3, 4], [9, 2, 3, 4]], [[1, 2, 3, 4], [1, 2, 7, 4], [1, 2, 3, 4]])
    assert (found.sequences, found.equal_sequences, found.first_tokens) == (3, 1, 2)
    assert found.common_prefix == pytest.approx(0.5)
    assert not found.is_same_model
    assert agreement([[1, 2]] * 10, [[1, 3]] * 9 + [[2, 2]]).is_same_model


def two_summaries() -> list[CellSummary]:
    ours = FakeContestant("octavo", is_ours=True)
    peer = FakeContestant("peer", prefill_s=2.0, step_s=1.0, token=lambda prompt, step: 5)
    measurements = rounds(ours, peer).run(lambda one: None)
    return [summarise(cell, measurements, ["octavo"]) for cell in CELLS]


def test_tables_say_speeds_ratios_shares_memory_and_who_computes_something_else() -> None:
    shown = io.StringIO()
    show(two_summaries(), Console(file=shown, width=240))
    text = shown.getvalue()
    rows = [line.split() for line in text.splitlines()]
    assert ["1", "octavo", "4.0", "[4.0", "..", "4.0]", "2.00x", "2.0", "[2.0", "..", "2.0]", "2.00x", "0/2"] in rows
    assert ["2", "peer", "4.0", "[4.0", "..", "4.0]", "2.0", "[2.0", "..", "2.0]"] in rows
    assert "median [min .. max]" in text
    assert text.count("shares of a step") == 2
    assert "memory of peer: 0 MB in 1 processes" in text
    assert "octavo and peer agree on only 0 of 2 first tokens: not the same model" in text


def test_lines_go_to_stdout_and_into_the_file(tmp_path: Path) -> None:
    out = io.StringIO()
    lines = JsonLines(out, tmp_path / "lines.jsonl")
    for summary in two_summaries():
        lines.write(summary.to_json())
    lines.write({"third": 1 / 3})
    lines.close()
    assert (tmp_path / "lines.jsonl").read_text() == out.getvalue()
    first, second, third = map(json.loads, out.getvalue().splitlines())
    assert (first["type"], first["batch"], second["batch"], first["repeats"]) == ("summary", 1, 2, 2)
    assert first["ratios"][0]["decode"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert first["contestants"][0]["decode_step"]["shares"]["waiting"] == 0.5
    assert third == {"third": 0.333333}
