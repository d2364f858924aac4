"""What can be typed after `octavo bench serve`, and what comes out where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from experiments.bench_cli import app
from experiments.serving.settings import BenchError, ServeSettings
from tests.support.raw_http import answers_fully, raw_server

ROOT = Path(__file__).resolve().parent.parent.parent
SMALL = ["--num-prompts", "3", "--output-len", "4", "--input-len", "2"]


def test_lines_on_stdout_and_a_table_on_stderr() -> None:
    with raw_server(answers_fully) as url:
        done = CliRunner().invoke(app, ["serve", url, *SMALL, "--repeats", "2", "--num-warmups", "1", "--seed", "7"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line.get("repeat") for line in lines] == [1, 2, None]
    assert all(line["completed"] == 3 and line["seed"] == 7 for line in lines)
    assert all("errors" not in line and "itls" not in line for line in lines)
    assert "Serving Benchmark Result" in done.stderr
    assert "repeat 2 of 2: 3 answered" in done.stderr


def test_goodput_in_vllms_way_of_writing() -> None:
    pairs = ["--goodput", "ttft:60000", "tpot:50.5", "e2el:60000"]
    with raw_server(answers_fully) as url:
        before = CliRunner().invoke(app, ["serve", *pairs, "--detailed", url, *SMALL])
        after = CliRunner().invoke(app, ["serve", url, *SMALL, *pairs])
        twice = CliRunner().invoke(app, ["serve", url, *SMALL, "--goodput", "ttft:0", "--goodput", "e2el:60000"])
    assert before.exit_code == after.exit_code == twice.exit_code == 0, (before.output, after.output)
    last = json.loads(after.stdout.splitlines()[-1])
    assert last["request_goodput"] == last["request_throughput"]
    assert json.loads(twice.stdout.splitlines()[-1])["request_goodput"] == 0.0
    assert json.loads(before.stdout.splitlines()[0])["errors"] == [""] * 3


def test_percentiles_and_metrics_as_typed() -> None:
    typed = ["--percentile-metrics", "itl", "--metric-percentiles", "25,99.5", "--request-rate", "inf"]
    with raw_server(answers_fully) as url:
        done = CliRunner().invoke(app, ["serve", url, *SMALL, *typed])
    last = json.loads(done.stdout.splitlines()[-1])
    assert {"p25_itl_ms", "p99.5_itl_ms"} <= set(last)
    assert "mean_ttft_ms" not in last


@pytest.mark.parametrize("typed", [["--num-prompts", "0"], ["--goodput", "x:1"], ["--metric-percentiles", "x"]])
def test_a_bad_argument_is_an_error_with_a_name(typed: list[str]) -> None:
    done = CliRunner().invoke(app, ["serve", "http://127.0.0.1:1", *typed])
    assert isinstance(done.exception, BenchError)
    assert str(done.exception).startswith(typed[0])
    assert done.stdout == ""


def test_every_setting_can_be_typed() -> None:
    done = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"})
    for name in set(ServeSettings.__dataclass_fields__) - {"url"}:
        assert f"--{name.replace('_', '-')}" in done.output, name


def test_run_as_a_module_a_failure_is_one_line() -> None:
    command = [sys.executable, "-m", "experiments.bench_cli", "serve", "nowhere"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "octavo bench: URL is 'nowhere', but must be like http://127.0.0.1:8000\n"


def test_the_list_of_benchmarks_imports_no_work() -> None:
    program = (
        "import sys, experiments.bench_cli; "
        "print([name for name in ('aiohttp', 'numpy', 'torch', 'ray', 'experiments.serving') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.stdout.strip() == "[]", done.stderr
