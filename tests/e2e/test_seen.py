"""A real cluster that is looked at: a live trace ended by Ctrl-C, routed_experts, metrics here and in Ray."""

import base64
import io
import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import pytest
import ray

from actors import ray_runtime
from cluster.routing_trace import read_trace
from tests.support.engines import TinyModel
from tests.support.routing import routed_alone
from tests.support.served_cluster import ServedCluster, octavo, run

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServedCluster]:
    served = ServedCluster(
        tmp_path_factory.mktemp("seen"), tiny_model, "--enable-return-routed-experts", "--experts-per-actor", "4"
    )
    yield served
    served.stop()


def until(found: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not found():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s"
        time.sleep(0.2)


def complete(cluster: ServedCluster, prompt: str) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 12, "return_token_ids": True, "ignore_eos": True}
    choice: dict[str, Any] = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120).json()["choices"][0]
    return choice


def traced_tokens(cluster: ServedCluster) -> float:
    lines = httpx.get(f"{cluster.url}/metrics", timeout=120).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("octavo_trace_tokens_total{"))


def test_what_is_recorded_is_what_was_answered_and_what_one_process_takes(
    seen: ServedCluster, tiny_model: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "live.npz", tmp_path / "record.log"
    with log.open("wb") as file:
        recorder = subprocess.Popen([*octavo(), "trace", "record", str(out)], env=seen.env, stderr=file)
    until(lambda: "recording coordinator-0" in log.read_text(), 240)
    before = traced_tokens(seen)
    choices = [complete(seen, prompt) for prompt in ("The door", "The roof of the house is", "A")]
    arrays = [np.load(io.BytesIO(base64.b64decode(one["routed_experts"])), allow_pickle=False) for one in choices]
    until(lambda: traced_tokens(seen) - before == sum(map(len, arrays)), 120)
    time.sleep(15.0)  # what was recorded is told a few times a second, and nobody says that it was heard
    recorder.send_signal(signal.SIGINT)
    assert recorder.wait(180) == 0, log.read_text()

    with out.open("rb") as data:
        trace = read_trace(data)
    model = TinyModel.load(tiny_model)
    for request, (choice, array) in enumerate(zip(choices, arrays, strict=True)):
        known = [*choice["prompt_token_ids"], *choice["token_ids"]]
        assert np.array_equal(array, routed_alone(model, known[:-1]))
        assert np.array_equal(trace.experts[trace.token_request == request], array)
        assert trace.prompt_tokens[request] == len(choice["prompt_token_ids"])
        assert trace.output_tokens[request] == 12
    stats = json.loads(run(["trace", "stats", str(out)], seen.env).stdout)
    assert (stats["num_requests"], stats["num_layers"], stats["num_experts"]) == (3, 4, 8)


def test_it_ends_by_itself_and_without_traffic_there_is_no_file(seen: ServedCluster, tmp_path: Path) -> None:
    done = run(["trace", "record", str(tmp_path / "empty.npz"), "--for", "1s"], seen.env)
    assert done.returncode == 1
    assert "no token was routed while it was recorded" in done.stderr
    assert not list(tmp_path.iterdir())


def test_metrics_tell_what_the_supervisor_sees(seen: ServedCluster) -> None:
    def copies() -> list[str]:
        text = httpx.get(f"{seen.url}/metrics", timeout=120).text
        return [line for line in text.splitlines() if line.startswith("octavo_expert_copies_ready{")]

    until(lambda: len(copies()) == 8, 120)
    assert {line.split()[-1] for line in copies()} == {"1.0"}


def test_ray_shows_them_too(seen: ServedCluster) -> None:
    seen.status()  # connects this process
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    page = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"

    def everything_is_shown() -> bool:  # what was told last may come with a later page, and the page itself later
        try:
            lines = httpx.get(page, timeout=120).text.splitlines()
        except httpx.HTTPError:
            return False
        copies = [line for line in lines if line.startswith("ray_octavo_expert_copies_ready{")]
        up = [line for line in lines if line.startswith("ray_octavo_coordinator_up{") and line.endswith(" 1.0")]
        return len(copies) == 8 and len(up) == 1

    until(everything_is_shown, 120)
    ray_runtime.disconnect()
