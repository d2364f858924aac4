"""Synthetic traces have what was asked of them, request traces are read within limits, reports say what was found."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from actors.command.added_commands import CommandError
from cluster.load import balancedness
from cluster.routing_trace import RoutingTrace
from experiments import simulate_cli, trace_cli
from experiments.simulation.charts import Bars, Series, bar_chart, line_chart, number, ticks
from experiments.simulation.commands import load
from experiments.simulation.request_traces import Requests, RequestTraceError, poisson, read_requests
from experiments.simulation.synthetic_routing import RoutingModel, synthesize

PUBLIC = Path(os.environ.get("OCTAVO_TRACES", "data/traces"))
ONE = Requests(np.zeros(1), np.ones(1, np.int32), np.ones(1, np.int32))


def routed(num_tokens: int = 4000, **model: Any) -> RoutingTrace:
    rng = np.random.default_rng(0)
    return synthesize(RoutingModel(num_layers=4, **model), ONE, rng, num_tokens=num_tokens, duration_s=100.0)


def test_tokens_have_distinct_experts_and_the_asked_skew() -> None:
    even, skewed = routed(skew=0.0), routed(skew=1.2)
    for trace in (even, skewed):
        assert trace.experts.shape == (4000, 4, 2)
        assert (trace.experts[:, :, 0] != trace.experts[:, :, 1]).all()
    assert balancedness(even.counts()).min() > 0.9
    assert balancedness(skewed.counts()).max() < 0.65
    assert balancedness(routed(law="dirichlet", skew=0.5).counts()).mean() < 0.7


def test_tokens_follow_their_neighbour() -> None:
    loose, sticky = (routed(skew=0.0, stickiness=p).experts[:, :, 0] for p in (0.0, 0.5))
    assert (loose[1:] == loose[:-1]).mean() == pytest.approx(1 / 8, abs=0.02)
    assert (sticky[1:] == sticky[:-1]).mean() == pytest.approx(0.5 + 0.5 / 8, abs=0.03)


def test_popularity_drifts_only_when_asked() -> None:
    def moved(trace: RoutingTrace) -> float:
        first, last = (c / c.sum(axis=1, keepdims=True) for c in (trace.counts(0, 800), trace.counts(3200)))
        return float(np.abs(first - last).sum(axis=1).mean() / 2)

    assert moved(routed(skew=1.0)) < 0.08
    assert moved(routed(skew=1.0, drift_s=40.0)) > 0.15


def test_a_seed_is_a_trace() -> None:
    assert (routed(500).experts == routed(500).experts).all()


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"top_k": 9}, "top_k is 9, but it must be 1 to 8"),
        ({"law": "normal"}, "law is 'normal'"),
        ({"drift_s": 0.0}, r"drift_s is 0\.0"),
        ({"drift_s": 1e-3}, "at most 10000 are drawn"),
        ({"stickiness": 1.5}, r"stickiness is 1\.5"),
    ],
)
def test_impossible_models_are_refused(model: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        routed(**model)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="num_tokens is 100000000"):
        routed(100_000_000)


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n2023-11-16 18:17:04.4799600,3,0\n"
)


def test_azures_format_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text(AZURE)
    found = read_requests(file)
    assert found.arrival_s.tolist() == pytest.approx([0.0, 0.5])
    assert found.prompt_tokens.tolist() == [4808, 3]
    assert found.output_tokens.tolist() == [10, 1]


def test_mooncakes_format_is_read_in_order_of_arrival(tmp_path: Path) -> None:
    file = tmp_path / "m.jsonl"
    rows = [{"timestamp": t, "input_length": 5, "output_length": t, "hash_ids": [1]} for t in (3000, 1000)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_requests(file)
    assert found.arrival_s.tolist() == [0.0, 2.0]
    assert found.output_tokens.tolist() == [1000, 3000]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "when,ContextTokens\n", "a.csv: there is no column TIMESTAMP"),
        ("a.csv", AZURE + "soon,1,1\n", "a.csv:4: TIMESTAMP is 'soon'"),
        ("a.csv", AZURE + "2023-11-16 18:17:05,x,1\n", "a.csv:4: ContextTokens is 'x', but it must be 0 to"),
        ("a.csv", AZURE + "2023-11-16 18:17:05,-1,1\n", "ContextTokens is '-1'"),
        ("a.csv", AZURE + "2023-11-16 18:17:05,1\n", "GeneratedTokens is None"),
        ("a.csv", AZURE.splitlines()[0], "a.csv: there is no request in it"),
        ("m.jsonl", "[1]\n", "m.jsonl:1: list, but it must be an object"),
        ("m.jsonl", "{\n", "m.jsonl:1: not JSON"),
        ("m.jsonl", '{"timestamp": NaN}\n', "m.jsonl:1: timestamp is nan"),
        ("m.jsonl", '{"timestamp": 1, "input_length": true}\n', "input_length is True"),
        ("m.jsonl", "[" * 100_000 + "\n", "not JSON"),
        ("m.jsonl", " " * 1_100_000, "a line of more than"),
        ("m.txt", "", r"m.txt: the name must end in .csv"),
    ],
)
def test_what_is_not_in_the_format_is_named(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(RequestTraceError, match=re.escape(says)):
        read_requests(tmp_path / name)


def test_the_public_traces_are_read_where_they_are() -> None:
    if not PUBLIC.is_dir():
        pytest.skip("the public request traces are not here; OCTAVO_TRACES names their folder")
    for name, num in (("azure_llm_2023_conv.csv", 19_366), ("mooncake_conversation.jsonl", 12_031)):
        found = read_requests(PUBLIC / name)
        assert len(found) == num
        assert 3000 < found.arrival_s[-1] < 4000


def test_requests_are_scaled_repeated_and_thinned_to_a_day() -> None:
    rng = np.random.default_rng(0)
    some = poisson(rng, rate=5.0, duration_s=100.0, prompt=20, output=4)
    assert some.prompt_tokens.mean() == pytest.approx(20, rel=0.2)
    scaled = some.at_rate(2.0, 1000.0)
    assert len(scaled) == pytest.approx(2000, abs=50)
    assert (np.diff(scaled.arrival_s) >= 0).all()
    day = scaled.over_a_day(rng, 1000.0, night=0.1)
    per_part = np.histogram(day.arrival_s, bins=5, range=(0, 1000))[0]
    assert per_part[2] > 2.5 * per_part[0]
    assert per_part[2] > 2.5 * per_part[4]
    with pytest.raises(ValueError, match="night is 2"):
        scaled.over_a_day(rng, 1000.0, night=2)
    with pytest.raises(ValueError, match="rate is inf"):
        poisson(rng, rate=math.inf, duration_s=1.0, prompt=1, output=1)
    with pytest.raises(ValueError, match="at most 2000000 requests"):
        some.at_rate(1e6, 1e6)


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-9, 1e12))
def test_ticks_are_few_even_and_reach_the_top(top: float) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert 2 <= len(found) <= 6
    assert found[-1] >= top * (1 - 1e-6)
    assert np.diff(found) == pytest.approx(found[1])


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 1234.5, 12.34, 0.012345, 100, 3)] == ["0", "1,234", "12.3", "0.0123", "100", "3"]


def test_charts_are_sound_and_escape_what_they_are_given() -> None:
    evil = '<script>"&'
    long = Series(evil, list(range(5000)), [float(i % 7) for i in range(5000)])
    for chart in (
        line_chart(evil, evil, [long, Series("empty", [], [])]),
        line_chart("t", "s", [Series("x", [1.0], [0.0])], steps=True),
        bar_chart(evil, evil, ["a", evil], [Bars(evil, [0.0, 5.0])]),
    ):
        assert "<script" not in chart
        figure = ElementTree.fromstring(chart)
        for line in figure.iter("polyline"):
            assert len(line.attrib["points"].split()) <= 402


def invoke(app: Any, *arguments: Any) -> str:
    done = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_from_nothing_to_a_report(tmp_path: Path) -> None:
    file, page, figures = tmp_path / "t.npz", tmp_path / "r.html", tmp_path / "r.json"
    size = (
        "--layers",
        2,
        "--experts",
        4,
        "--tokens",
        500,
        "--duration-s",
        60,
        "--rate",
        2,
        "--prompt",
        20,
        "--output",
        8,
    )
    assert "500 tokens of routing" in invoke(trace_cli.app, "synth", file, *size, "--skew", "zipf:1.0", "--day")
    stats = json.loads(invoke(trace_cli.app, "stats", file))
    assert (stats["num_layers"], stats["num_experts"], stats["top_k"]) == (2, 4, 2)
    assert 0 < stats["balancedness"]["min"] <= stats["balancedness"]["max"] < 1
    limits = ("--nodes", 3, "--columns", 3, "--autoscale", "3:5", "--html", page, "--json", figures)
    shown = invoke(
        simulate_cli.app, file, "--policy", "static", "--policy", "incremental", "--policy", "predictive", *limits
    )
    assert re.search(r"static +incremental\+scale +predictive\+scale\nrequests answered", shown)
    told = json.loads(figures.read_text())
    assert set(told["policies"]) == {"static", "incremental+scale", "predictive+scale"}
    for policy in told["policies"].values():
        assert policy["summary"]["unfinished"] == 0
        assert len(policy["timeline"]["at_s"]) == len(policy["timeline"]["hosts"]) > 3
        assert all(action["reason"] for action in policy["actions"])
    html = page.read_text()
    assert html.count("<svg") == 11
    assert "prefers-color-scheme:dark" in html
    assert not re.search(r"<script|src=|href=|url\(", html)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--policy", "best"], "--policy is 'best'"),
        (["--policy", "incremental nois=1"], "policy incremental has no option 'nois'"),
        (["--nodes", "0"], "--nodes is 0"),
        (["--autoscale", "9:12"], "--autoscale is '9:12'"),
        (["--columns", "0.1"], "experts do not fit"),
        (["--ranges", "99"], "num_ranges is 99"),
        (["--window-s", "0"], r"window_s is 0\.0"),
    ],
)
def test_what_cannot_be_simulated_is_one_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    file = tmp_path / "t.npz"
    invoke(trace_cli.app, "synth", file, "--layers", 2, "--tokens", 50, "--duration-s", 5)
    done = CliRunner().invoke(simulate_cli.app, [str(file), "--policy", "incremental", *arguments])
    assert isinstance(done.exception, CommandError), done.output
    assert re.search(says, str(done.exception))
    assert "\n" not in str(done.exception)


def test_one_policy_with_other_parameters_is_another_column(tmp_path: Path) -> None:
    file, figures = tmp_path / "t.npz", tmp_path / "figures.json"
    invoke(trace_cli.app, "synth", file, "--layers", 2, "--tokens", 100, "--duration-s", 30)
    labels = ["incremental", "incremental max_moves=1, max_copies=1"]
    invoke(
        simulate_cli.app,
        file,
        "--columns",
        8,
        *(part for label in labels for part in ("--policy", label)),
        "--json",
        figures,
    )
    assert set(json.loads(figures.read_text())["policies"]) == set(labels)


def test_a_file_that_is_no_trace_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_text("hello")
    for path in (tmp_path / "t.npz", tmp_path / "absent.npz"):
        with pytest.raises(CommandError, match=r"npz"):
            load(path)
