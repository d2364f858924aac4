"""The lines and the table of a serving benchmark."""

import json

from experiments.serving.metrics import details, summarize
from experiments.serving.report import heading, json_line, medians, table
from experiments.serving.results import RequestResult
from experiments.serving.settings import ServeSettings

SETTINGS = ServeSettings(url="http://127.0.0.1:1", num_prompts=3, goodput=(("ttft", 1.0),))


def result(ttft_s: float, **changes: object) -> RequestResult:
    fields = {"start_s": 0.0, "ttft_s": ttft_s, "latency_s": ttft_s, "input_tokens": 5, "output_tokens": 1}
    return RequestResult(**{**fields, **changes})  # type: ignore[arg-type]


def summary(*results: RequestResult) -> dict[str, object]:
    return summarize(results, 2.0, metrics=("ttft", "tpot"), percentiles=(99,))


def test_the_heading_has_vllms_keys() -> None:
    line = heading(SETTINGS, "tiny", "20260101-000000")
    assert line["date"] == "20260101-000000"
    assert (line["backend"], line["endpoint_type"]) == ("openai", "openai")
    assert line["model_id"] == "tiny"
    assert line["num_prompts"] == 3
    assert line["request_rate"] == "inf"
    assert line["burstiness"] == 1.0
    assert line["max_concurrency"] is None
    assert json.loads(json_line(line)) == line


def test_a_bound_that_holds_requests_back_is_told() -> None:
    many = ServeSettings(url="http://127.0.0.1:1", num_prompts=2000, request_rate=2.5)
    assert heading(many, "tiny", "")["max_concurrency"] == 512
    assert heading(many, "tiny", "")["request_rate"] == 2.5
    capped = ServeSettings(url="http://127.0.0.1:1", num_prompts=2000, max_concurrency=16)
    assert heading(capped, "tiny", "")["max_concurrency"] == 16


def test_medians_over_repeats() -> None:
    failed = RequestResult(start_s=0.0, error="timeout: x")
    repeats = [
        {**summary(result(0.1), result(0.1)), "client_cpu_s": 1.0},
        {**summary(result(0.5), failed), "client_cpu_s": 5.0},
        {**summary(result(0.2), failed), "client_cpu_s": 2.0},
    ]
    line = medians(heading(SETTINGS, "tiny", ""), repeats)
    assert line["aggregate"] == "median"
    assert line["completed"] == 1
    assert round(line["median_ttft_ms"]) == 200
    assert line["client_cpu_s"] == 2.0
    assert line["mean_tpot_ms"] is None, "never measured"
    assert line["request_goodput"] is None
    assert line["failure_reasons"] == {"timeout": 2}, "added up over the repeats, so that none is hidden"
    assert line["model_id"] == "tiny"


def test_a_figure_that_one_repeat_lacks_is_the_median_of_the_others() -> None:
    long = result(0.1, latency_s=0.3, output_tokens=2)
    line = medians({}, [summary(long), summary(result(0.1))])
    assert round(line["mean_tpot_ms"]) == 200


def test_the_table_shows_every_figure_and_no_none() -> None:
    line = {**heading(SETTINGS, "tiny", ""), **summary(result(0.1), RequestResult(start_s=0.0, error="timeout: x"))}
    text = table(line, ("ttft", "tpot"))
    assert "= Serving Benchmark Result =" in text
    rows = dict(row.rsplit(" ", 1) for row in text.splitlines() if ":" in row)
    shown = {label.strip(): value for label, value in rows.items()}
    assert shown["Successful requests:"] == "1"
    assert shown["Failed requests:"] == "1"
    assert shown["Failed, timeout:"] == "1"
    assert shown["Median TTFT (ms):"] == "100.00"
    assert shown["P99 TPOT (ms):"] == "-"
    assert "Request goodput (req/s):" not in shown
    assert "None" not in text


def test_details_are_strict_json() -> None:
    assert json.loads(json_line(details([result(0.1)])))["ttfts"] == [0.1]
