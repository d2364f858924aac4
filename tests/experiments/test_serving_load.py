"""How many requests are in flight and when they start, with a sender that only waits for the test."""

import asyncio
import time

import pytest

from experiments.serving.load import Load, run_load
from experiments.serving.prompts import Prompt
from experiments.serving.results import RequestResult
from tests.support.front import run


class Gate:
    """A sender: notes who is in flight, lets nobody go before `full` are."""

    def __init__(self, full: int) -> None:
        self.full = full
        self.now = self.most = 0
        self.order: list[Prompt] = []
        self._reached = asyncio.Event()

    async def __call__(self, prompt: Prompt) -> RequestResult:
        start_s = time.perf_counter()
        self.order.append(prompt)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now == self.full:
            self._reached.set()
        await self._reached.wait()
        await asyncio.sleep(0)
        self.now -= 1
        return RequestResult(start_s=start_s, text=str(prompt))


def run_gated(gate: Gate, num: int, concurrency: int) -> Load:
    prompts = [f"p{number}" for number in range(num)]
    return run(run_load(gate, prompts, [0.0] * num, concurrency))


def test_concurrency_is_reached_and_never_passed() -> None:
    gate = Gate(full=4)
    load = run_gated(gate, 20, 4)
    assert gate.most == 4
    assert gate.order == [f"p{number}" for number in range(20)]
    assert [result.text for result in load.results] == gate.order, "results stand in the order of the prompts"
    assert all(result.start_s >= 0 for result in load.results)
    assert load.duration_s >= max(result.start_s for result in load.results)
    assert load.client_cpu_s >= 0


def test_all_at_once_without_a_tighter_bound() -> None:
    gate = Gate(full=20)
    assert len(run_gated(gate, 20, 20).results) == 20
    assert gate.most == 20


def test_a_request_is_not_sent_before_it_is_due_and_waiting_for_a_slot_is_told() -> None:
    async def slow(prompt: Prompt) -> RequestResult:
        start_s = time.perf_counter()
        await asyncio.sleep(0.02)
        return RequestResult(start_s=start_s)

    due_s = [0.0, 0.0, 0.05]
    load = asyncio.run(run_load(slow, ["a", "b", "c"], due_s, 1))
    for result, due in zip(load.results, due_s, strict=True):
        assert result.start_s >= due
        assert result.queue_s == pytest.approx(result.start_s - due)
    assert load.results[1].queue_s >= 0.015, "it was due at once and had to wait for the first"


def test_a_defect_in_the_sender_ends_the_run() -> None:
    async def defect(prompt: Prompt) -> RequestResult:
        if prompt == "p1":
            raise KeyError("defect")
        await asyncio.Event().wait()
        raise AssertionError

    with pytest.raises(ExceptionGroup) as failed:
        run(run_load(defect, ["p0", "p1"], [0.0, 0.0], 2))
    assert isinstance(failed.value.exceptions[0], KeyError)


def test_nothing_to_send_is_a_short_run() -> None:
    load = run_gated(Gate(full=1), 0, 1)
    assert load.results == ()
