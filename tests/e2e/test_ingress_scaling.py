"""Ray Serve adds an ingress under real streams and takes it away again; none is cut by that, and no token changes."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ray import serve

from tests.support.served_cluster import ServedCluster

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:The .metrics_interval_s. field:DeprecationWarning"),  # in what Serve says itself
]

NUM_TOKENS = 200
CROWD = 6
WAIT_S = 240
ALIVE = ("RUNNING", "STARTING", "STOPPING")

Told = tuple[int, str, int]
"""Seed, whole text, number of tokens."""


def test_ingresses_follow_the_streams_and_none_is_cut(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaling = {"MIN_INGRESSES": 1, "MAX_INGRESSES": 2, "TARGET_INGRESS_REQUESTS": 2, "SCALE_UP_S": 1, "SCALE_DOWN_S": 2}
    for name, value in scaling.items():
        monkeypatch.setenv(f"OCTAVO_{name}", str(value))
    for whose in ("REPLICA", "HANDLE"):  # Serve hears of requests every ten seconds otherwise
        monkeypatch.setenv(f"RAY_SERVE_{whose}_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")
    served = ServedCluster(tmp_path, tiny_model, "--experts-per-actor", "4")
    try:
        served.status()  # joins its Ray
        _, expected, _ = stream(served, 0)
        assert num_ingresses() == 1
        told = busy_until(served, range(CROWD), lambda: num_ingresses("RUNNING") == 2)
        told += busy_until(served, range(1), lambda: num_ingresses() == 1)
        assert {tokens for _, _, tokens in told} == {NUM_TOKENS}
        answers = {(seed, text) for seed, text, _ in told}
        assert (0, expected) in answers
        assert len(answers) == CROWD, "the same question had another answer"
    finally:
        assert served.stop() == 0


def busy_until(served: ServedCluster, seeds: range, holds: Callable[[], bool]) -> list[Told]:
    """One stream after another for each seed, until it holds and those under way have ended."""
    enough = threading.Event()

    def again_and_again(seed: int) -> list[Told]:
        told = []
        while not enough.is_set():
            told.append(stream(served, seed))
        return told

    with ThreadPoolExecutor(len(seeds)) as pool:
        clients = [pool.submit(again_and_again, seed) for seed in seeds]
        try:
            deadline_s = time.monotonic() + WAIT_S
            while not holds():
                assert time.monotonic() < deadline_s, serve.status()
                time.sleep(0.3)
        finally:
            enough.set()
        return [one for client in clients for one in client.result(200)]


def stream(served: ServedCluster, seed: int) -> Told:
    """A streamed answer, and its tokens as the server counts them."""
    text, tokens = "", 0
    with served.client() as client:
        for chunk in client.completions.create(
            model="tiny",
            prompt="Hello",
            max_tokens=NUM_TOKENS,
            temperature=1.0,
            seed=seed,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        ):
            text += "".join(choice.text for choice in chunk.choices)
            tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    return seed, text, tokens


def num_ingresses(*states: str) -> int:
    """Ingresses in these states, or that run, come or go."""
    found = serve.status().applications["octavo"].deployments["ingress"].replica_states
    return sum(num for state, num in found.items() if state in (states or ALIVE))
