"""How a policy is asked: question after question, each with its own answer; one not waited for does no harm."""

import asyncio
import threading
from dataclasses import replace
from typing import Any

import pytest

from actors.supervision.asking import Asker, PolicyFailed, Watch
from actors.supervision.member import View
from tests.support.front import run

SEEN: Any = None
"""What the policies here are shown: they do not look."""


def test_those_who_ask_at_once_get_their_own_answers() -> None:
    async def work() -> None:
        asker = Asker(lambda _, state: ((), state), timeout_s=200)
        answers = await asyncio.gather(*(asker.ask(SEEN, number) for number in range(9)))
        assert answers == [((), number) for number in range(9)]

    run(work())


def test_who_asks_while_another_is_told_of_a_mistake_is_answered() -> None:
    def moody(_: Any, state: Any) -> Any:
        if state == "wrong":
            raise ZeroDivisionError("its own mistake")
        return (), state

    async def work() -> None:
        asker = Asker(moody, timeout_s=200)
        asked = [asker.ask(SEEN, state) for state in ("wrong", "right", "wrong")]
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
        assert str(first) == str(third) == "the policy raised ZeroDivisionError: its own mistake"
        assert second == ((), "right")

    run(work())


def test_one_that_hangs_is_asked_nothing_more_until_it_has_answered() -> None:
    gate, asked = threading.Event(), []

    def slow(_: Any, state: Any) -> Any:
        asked.append(state)
        assert gate.wait(200)
        return (), state

    async def work() -> None:
        asker = Asker(slow, timeout_s=0.05)
        for state, said in ((1, "did not answer within 0.05 s"), (2, "is still busy with an earlier question")):
            with pytest.raises(PolicyFailed, match=said):
                await asker.ask(SEEN, state)
        gate.set()
        answer = None
        while answer is None:
            try:
                answer = await asker.ask(SEEN, 3)
            except PolicyFailed:
                await asyncio.sleep(0.01)
        assert answer == ((), 3)
        assert set(asked) == {1, 3}

    run(work())


def test_an_answer_for_a_loop_that_is_closed_is_nobodys_error() -> None:
    gate = threading.Event()

    def late(_: Any, state: Any) -> Any:
        assert gate.wait(200)
        return (), state

    async def work() -> None:
        with pytest.raises(PolicyFailed, match="did not answer"):
            await Asker(late, timeout_s=0.01).ask(SEEN, 1)

    before = set(threading.enumerate())
    run(work())
    (thread,) = [one for one in threading.enumerate() if one not in before and one.name == "balancing policy"]
    gate.set()
    thread.join(200)  # an exception in it would be a warning, and so an error
    assert not thread.is_alive()


def view(load: list[list[int]] | None) -> View:
    return View("coordinator-0", 0, None if load is None else {"load": load, "steps_total": 0 if not load else 1})


def test_the_window_begins_with_the_first_look_at_somebody_even_one_who_has_counted_nothing_yet() -> None:
    watch = Watch()
    silent = {"coordinator-0": view([])}
    for at_s, there in enumerate(({}, {"coordinator-0": view(None)}, silent)):
        watch.add(float(at_s), there, (1, 2))
        assert watch.window is None
    watch.add(2.5, silent, (1, 2))
    assert watch.window is None, "no policy is asked before there is a load"
    watch.add(3.0, {"coordinator-0": view([[5, 7]])}, (1, 2))
    assert watch.window is not None
    first, last = watch.window
    assert (first.at_s, last.at_s) == (2.0, 3.0)
    grown_LE = last.coordinators["coordinator-0"].tokens_LE - first.coordinators["coordinator-0"].tokens_LE
    assert grown_LE.tolist() == [[5, 7]]


def test_what_replicas_would_share_is_known_from_who_tells_it() -> None:
    watch = Watch()
    told = view([[5, 7]])
    assert told.info is not None
    info = {**told.info, "divisible_load": [[0, 7]], "batches_total": 2}
    watch.add(0.0, {"coordinator-0": told, "coordinator-1": replace(told, info=info)}, (1, 2))
    watch.add(1.0, {"coordinator-0": told, "coordinator-1": replace(told, info=info)}, (1, 2))
    assert watch.window is not None
    silent, telling = (watch.window[1].coordinators[f"coordinator-{i}"] for i in range(2))
    assert (silent.divisible_LE, silent.batches) == (None, 0), "one of before"
    assert telling.divisible_LE is not None
    assert (telling.divisible_LE.tolist(), telling.batches) == ([[0, 7]], 2)


def test_who_counts_another_models_experts_is_not_looked_at() -> None:
    watch = Watch()
    for at_s in (0.0, 1.0):
        watch.add(at_s, {"coordinator-0": view([[5, 7, 9]])}, (1, 2))
    assert watch.window is None
