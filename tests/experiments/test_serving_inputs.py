"""What goes into a serving benchmark: settings and their limits, prompts, arrival times."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.serving.arrivals import arrival_times_s
from experiments.serving.client import request_body
from experiments.serving.prompts import MAX_TEXT_BYTES, make_prompts, random_prompts, text_prompts
from experiments.serving.settings import (
    BenchError,
    ServeSettings,
    parse_goodput,
    parse_metrics,
    parse_percentiles,
)

URL = "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_prompts": 0}, "--num-prompts is 0, but must be a whole number from 1 to 100000"),
        ({"num_prompts": 100_001}, "--num-prompts is 100001, but must be a whole number from 1 to 100000"),
        ({"input_len": 0}, "--input-len is 0, but must be"),
        ({"output_len": 0}, "--output-len is 0, but must be"),
        ({"vocab_size": 1}, "--vocab-size is 1, but must be"),
        ({"num_warmups": -1}, "--num-warmups is -1, but must be"),
        ({"repeats": 0}, "--repeats is 0, but must be"),
        ({"seed": -1}, "--seed is -1, but must be"),
        ({"max_concurrency": 0}, "--max-concurrency is 0, but must be a whole number from 1 to 4096"),
        ({"request_rate": 0.0}, "--request-rate is 0, but must be more than 0"),
        ({"request_rate": math.nan}, "--request-rate is nan, but must be more than 0"),
        ({"burstiness": -1.0}, "--burstiness is -1, but must be more than 0"),
        ({"timeout_s": math.inf}, "--timeout-s is inf, but must be more than 0 and at most 86400"),
        ({"temperature": 2.5}, "--temperature is 2.5, but must be from 0 to 2"),
        ({"endpoint": "/x"}, "--endpoint is '/x', but must be one of /v1/completions, /v1/chat/completions"),
        ({"dataset": "x"}, "--dataset is 'x', but must be one of random, text"),
        ({"dataset": "text"}, "--dataset is 'text', but --text-path is not given"),
        ({"text_path": Path("t")}, "--text-path is 't', but --dataset is 'random'"),
        ({"endpoint": "/v1/chat/completions"}, "--dataset is 'random', which sends token ids"),
        ({"url": "127.0.0.1:8000"}, "URL is '127.0.0.1:8000', but must be like http://127.0.0.1:8000"),
        ({"url": "http://"}, "URL is 'http://', but must be like"),
        ({"url": "http://host:99999"}, "URL is 'http://host:99999', but must be like"),
        ({"url": "http://host/?x=1"}, "but must be like"),
    ],
)
def test_a_bad_value_is_named_with_its_limit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BenchError) as error:
        ServeSettings(**{"url": URL, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("url", [URL, URL + "/", URL + "/v1", URL + "/v1/"])
def test_the_root_is_found_with_and_without_v1(url: str) -> None:
    assert ServeSettings(url=url).base_url == URL


def test_concurrency_always_has_a_bound() -> None:
    assert ServeSettings(url=URL, num_prompts=9).concurrency == 9
    assert ServeSettings(url=URL, num_prompts=10_000).concurrency == 512
    assert ServeSettings(url=URL, num_prompts=10_000, max_concurrency=600).concurrency == 600


@pytest.mark.parametrize(
    ("dataset", "asked", "sent"),
    [("random", None, True), ("text", None, False), ("random", False, False), ("text", True, True)],
)
def test_random_prompts_ignore_the_end_of_sequence(dataset: str, asked: bool | None, sent: bool) -> None:
    path = Path("t") if dataset == "text" else None
    settings = ServeSettings(url=URL, dataset=dataset, text_path=path, ignore_eos=asked)
    assert request_body(settings, "m", [1]).get("ignore_eos", False) is sent


def test_the_bodies_ask_for_usage_and_one_length() -> None:
    completion = request_body(ServeSettings(url=URL, output_len=7), "m", [1, 2])
    assert completion == {
        "model": "m",
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "prompt": [1, 2],
        "max_tokens": 7,
    }
    settings = ServeSettings(
        url=URL, output_len=7, endpoint="/v1/chat/completions", dataset="text", text_path=Path("t")
    )
    chat = request_body(settings, "m", "hello")
    assert chat["messages"] == [{"role": "user", "content": "hello"}]
    assert chat["max_completion_tokens"] == 7
    assert not {"prompt", "max_tokens", "ignore_eos"} & set(chat)


def test_goodput_pairs() -> None:
    assert parse_goodput(["ttft:500", "tpot:50.5", "e2el:0"]) == (("ttft", 500.0), ("tpot", 50.5), ("e2el", 0.0))
    for bad in ("itl:5", "ttft", "ttft:", "ttft:x", "ttft:-1", "ttft:inf", "ttft:nan", ":5"):
        with pytest.raises(BenchError, match=f"--goodput is '{bad}', but must be METRIC:MILLISECONDS"):
            parse_goodput([bad])


def test_metric_and_percentile_lists() -> None:
    assert parse_metrics("itl, ttft,itl") == ("itl", "ttft")
    with pytest.raises(BenchError, match="--percentile-metrics is 'x', but must be one of ttft"):
        parse_metrics("ttft,x")
    assert parse_percentiles("50, 99.9,0,100,50") == (50.0, 99.9, 0.0, 100.0)
    for bad in ("", "101", "-1", "a", "nan", "50,"):
        with pytest.raises(BenchError, match="--metric-percentiles is '"):
            parse_percentiles(bad)


def test_random_prompts_have_their_length_and_no_special_ids() -> None:
    prompts = random_prompts(np.random.default_rng(0), 50, 40, 300)
    assert [len(prompt) for prompt in prompts] == [40] * 50
    ids = {token for prompt in prompts for token in prompt}
    assert all(type(token) is int for token in ids)
    assert (min(ids), max(ids)) == (150, 299), "all of them come, and 300 is not an id"
    big = random_prompts(np.random.default_rng(0), 1, 5000, 32_000)[0]
    assert min(token for token in big if isinstance(token, int)) >= 260


def test_prompts_are_a_function_of_seed_and_repeat() -> None:
    settings = ServeSettings(url=URL, seed=5, input_len=8)
    assert make_prompts(settings, 3, 1) == make_prompts(settings, 3, 1)
    assert make_prompts(settings, 3, 1) != make_prompts(settings, 3, 2)
    assert make_prompts(settings, 3, 1) != make_prompts(ServeSettings(url=URL, seed=6, input_len=8), 3, 1)


def test_text_prompts_are_windows_that_start_with_a_word(tmp_path: Path) -> None:
    text = " ".join(f"word{number}" for number in range(500))
    path = tmp_path / "text.txt"
    path.write_text(text)
    settings = ServeSettings(url=URL, dataset="text", text_path=path, input_len=20)
    prompts = make_prompts(settings, 40, 1)
    assert len(set(prompts)) > 30
    for prompt in prompts:
        assert isinstance(prompt, str)
        assert prompt in text
        assert 80 - len("word499 ") <= len(prompt) <= 80
        assert prompt.startswith("word")
    assert make_prompts(settings, 40, 1) == prompts
    assert make_prompts(settings, 40, 2) != prompts


def test_text_of_one_window_and_without_spaces() -> None:
    rng = np.random.default_rng(0)
    assert text_prompts(rng, 2, 4, "日本語文") == ["日本語文"] * 2
    assert all(len(str(prompt)) == 4 for prompt in text_prompts(rng, 9, 4, "日本語文" * 9))


def test_a_text_file_that_cannot_serve_is_named(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    settings = ServeSettings(url=URL, dataset="text", text_path=path, input_len=3)
    with pytest.raises(BenchError, match=r"text.txt', but cannot be read: No such file"):
        make_prompts(settings, 1, 1)
    path.write_text("too short")
    with pytest.raises(BenchError, match="--text-path has 9 characters, but must have 12: 4 for each token"):
        make_prompts(settings, 1, 1)
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(BenchError, match="must be UTF-8 text"):
        make_prompts(settings, 1, 1)
    with path.open("wb") as file:
        file.truncate(MAX_TEXT_BYTES + 1)  # sparse
    with pytest.raises(BenchError, match="but must have at most"):
        make_prompts(settings, 1, 1)


@pytest.mark.parametrize("burstiness", [0.1, 1.0, 20.0, math.inf])
def test_arrivals_are_ascending_and_end_at_num_over_rate(burstiness: float) -> None:
    times = arrival_times_s(np.random.default_rng(1), 200, 4.0, burstiness)
    assert times == sorted(times)
    assert times[0] >= 0
    assert times[-1] == pytest.approx(50.0)


def test_burstiness_is_the_inverse_of_the_gaps_spread() -> None:
    def spread(burstiness: float) -> float:
        times = arrival_times_s(np.random.default_rng(2), 5000, 10.0, burstiness)
        gaps = np.diff(times)
        return float(gaps.std() / gaps.mean())

    assert spread(1.0) == pytest.approx(1.0, rel=0.1)  # exponential gaps
    assert spread(0.25) == pytest.approx(2.0, rel=0.1)  # 1 / sqrt(shape)
    assert spread(math.inf) == pytest.approx(0.0, abs=1e-6)


def test_an_infinite_rate_sends_all_at_once() -> None:
    assert arrival_times_s(np.random.default_rng(0), 3, math.inf, 1.0) == [0.0, 0.0, 0.0]
