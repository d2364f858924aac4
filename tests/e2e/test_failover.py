"""Coordinators, ingress replicas and Serve's own processes killed under streams: answers whole, every token right."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import pytest

from tests.chaos.clusters import alive
from tests.support.resuming_client import Told, stream_all
from tests.support.served_cluster import ServedCluster, command_line

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

INGRESS = "ServeReplica:octavo:ingress"
NUM_TOKENS = 400
BEGUN, LATE = 20, 250
"""Tokens: who has more has begun, and may be whole before it is hurt."""
ATTEMPTS = 8
BODIES: list[dict[str, Any]] = [
    {
        "model": "tiny",
        "prompt": f"The house number {number} is",
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        **({"temperature": 0} if number < 8 else {"temperature": 0.8, "top_p": 0.9, "seed": number}),
    }
    for number in range(16)
]


@pytest.fixture(scope="module")
def doubled(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[ServedCluster]:
    """Two coordinators behind two ingress replicas."""
    options = ("--coordinators", "2", "--ingresses", "2", "--experts-per-actor", "4")
    served = ServedCluster(tmp_path_factory.mktemp("doubled"), tiny_model, *options)
    yield served
    served.stop()


@pytest.fixture(scope="module")
def expected(doubled: ServedCluster) -> list[list[int]]:
    """What is said when nothing breaks."""
    answers = run(doubled)
    assert not any(one.cuts_s or one.refused for one in answers)
    return [one.token_ids for one in answers]


def run(cluster: ServedCluster, hurt: Callable[[], None] = lambda: None) -> list[Told]:
    """All streams at once; `hurt` is called while each has some tokens and has many to come. None fails, and all end.

    How long after the first the last one begins is the machine's affair: if it is too late to hurt the first, all is
    asked again.
    """
    for _ in range(ATTEMPTS):
        answers = [Told() for _ in BODIES]
        with stream_all(cluster.url, BODIES, answers):
            wait_for(lambda now=answers: fewest(now) > BEGUN or most(now) > LATE, 240)  # type: ignore[misc]
            hurts = fewest(answers) > BEGUN and most(answers) <= LATE
            if hurts:
                hurt()
        assert [one.failed for one in answers] == [None] * len(answers)
        assert {one.finish_reason for one in answers} == {"length"}
        if hurts:
            return answers
    raise AssertionError(f"too late to hurt anybody: {[one.times_s[0] for one in answers]} were the first events")


def fewest(answers: Sequence[Told]) -> int:
    """Tokens of the stream that has the fewest."""
    return min(len(one.token_ids) for one in answers)


def most(answers: Sequence[Told]) -> int:
    """Tokens of the stream that has the most."""
    return max(len(one.token_ids) for one in answers)


def wait_for(condition: Callable[[], bool], timeout_s: float) -> float:
    """Seconds until it held."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() < began + timeout_s, f"not within {timeout_s:g} s"
        time.sleep(0.02)
    return time.monotonic() - began


def say(row: str, answers: list[Told], killed_s: float = math.nan, **more: float) -> None:
    """What was measured, for whoever runs this with -s."""
    cut = [one for one in answers if one.cuts_s]
    figures = {
        "worst_gap_s": max(one.worst_gap_s for one in answers),
        "streams_cut": len(cut),
        "tries": sum(len(one.cuts_s) for one in answers),
        "cut_after_s": max((one.cuts_s[0] - killed_s for one in cut), default=0.0),
        **more,
    }
    print(json.dumps({"row": row, **{name: round(value, 2) for name, value in figures.items()}}))


def kill(*pids: int) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def serve_processes(cluster: ServedCluster, title: str) -> list[psutil.Process]:
    """Ray's processes by the title that they give themselves."""
    return [one for one in cluster.processes() if title in command_line(one)]


def until_ready(cluster: ServedCluster) -> float:
    """Seconds until all are ready who are there: a status may be of before a kill."""

    def whole() -> bool:
        status = cluster.status()
        return status.state == "ready" and all(alive(one.pid) for one in (*status.coordinators, *status.replicas))

    return wait_for(whole, 240)


def test_a_killed_coordinators_streams_go_on(doubled: ServedCluster, expected: list[list[int]]) -> None:
    victim = doubled.status().coordinators[0].pid
    answers = run(doubled, lambda: kill(victim))
    assert [one.token_ids for one in answers] == expected
    assert not any(one.cuts_s for one in answers), "clients see a pause and nothing else"
    say("F7 one of two coordinators", answers, whole_again_s=until_ready(doubled))


def test_streams_wait_while_there_is_no_coordinator(doubled: ServedCluster, expected: list[list[int]]) -> None:
    victims = [one.pid for one in doubled.status().coordinators]
    answers = run(doubled, lambda: kill(*victims))
    assert [one.token_ids for one in answers] == expected
    assert not any(one.cuts_s for one in answers)
    say("F7 all coordinators", answers, whole_again_s=until_ready(doubled))


def test_streams_of_a_killed_ingress_are_resumed_at_the_other(
    doubled: ServedCluster, expected: list[list[int]]
) -> None:
    """Which replica a stream goes to is Serve's affair, too: if all are at one, it is asked again."""
    for _ in range(ATTEMPTS):
        answers = run_without_an_ingress(doubled)
        assert [one.token_ids for one in answers] == expected
        if 0 < sum(bool(one.cuts_s) for one in answers) < len(answers):
            return
    raise AssertionError("it was never so that some were cut and some were not")


def run_without_an_ingress(cluster: ServedCluster) -> list[Told]:
    """Kills one of the two under streams; new requests are answered all the while."""
    wait_for(lambda: len(serve_processes(cluster, INGRESS)) == 2, 240)
    victim = serve_processes(cluster, INGRESS)[0].pid
    statuses: list[int] = []
    killed: list[float] = []
    asked_s: list[float] = []

    def hurt() -> None:
        killed.append(time.monotonic())
        kill(victim)
        for _ in range(10):
            body = {"model": "tiny", "prompt": "x", "max_tokens": 2, "ignore_eos": True}
            statuses.append(httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120).status_code)
            asked_s.append(time.monotonic())

    answers = run(cluster, hurt)
    back_s = wait_for(lambda: len(serve_processes(cluster, INGRESS)) == 2, 240)
    say("F8 an ingress replica", answers, killed[0], process_back_s=back_s, new_requests_s=asked_s[-1] - killed[0])
    assert set(statuses) == {200}
    return answers


def test_streams_of_a_killed_proxy_are_resumed(doubled: ServedCluster, expected: list[list[int]]) -> None:
    """A whole answer may wait at its client, unread, before the proxy is dead: then no cut is seen, and all is asked
    again.
    """
    for _ in range(ATTEMPTS):
        wait_for(lambda: len(serve_processes(doubled, "ProxyActor")) == 1, 240)
        (proxy,) = serve_processes(doubled, "ProxyActor")
        answers = run(doubled, lambda pid=proxy.pid: kill(pid))  # type: ignore[misc]
        assert [one.token_ids for one in answers] == expected
        say("F8 the Serve proxy", answers)
        if all(one.cuts_s for one in answers):
            return
    raise AssertionError("it was never so that all were cut")


def test_serve_goes_on_without_its_controller(doubled: ServedCluster, expected: list[list[int]]) -> None:
    (controller,) = serve_processes(doubled, "ServeController")
    answers = run(doubled, lambda: kill(controller.pid))
    assert [one.token_ids for one in answers] == expected
    say("F8 the Serve controller", answers)
