"""Which coordinator gets a request, where it goes on when that one is lost, and how they are looked at."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

import pytest

from actors.front.coordinator_client import CoordinatorLost
from actors.front.coordinator_pool import MOST_KNOWN_TOKENS, CoordinatorPool
from actors.front.follower import keep_following
from actors.front.resubmission import MAX_LOSSES_IN_PLACE, Verdict
from protos.coordinator_pb2 import FINISH_REASON_ERROR, SequenceOutput, Submit
from protos.expert_pb2 import (
    STATUS_CANCELLED,
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OVERLOADED,
)
from tests.support.front import run
from tests.support.scripted_coordinator import Event, Script, ScriptedCoordinator, failing, losing, raising, saying


async def outputs(pool: CoordinatorPool, submit: Submit) -> list[SequenceOutput]:
    async with aclosing(pool.generate(submit)) as stream:
        return [output async for output in stream]


def two() -> tuple[ScriptedCoordinator, ScriptedCoordinator]:
    return ScriptedCoordinator(saying([7]), address="a:1"), ScriptedCoordinator(saying([8]), address="b:1")


def test_the_least_loaded_is_chosen() -> None:
    first, second = two()
    first.inflight_tokens = 10

    async def work() -> None:
        (output,) = await outputs(CoordinatorPool([first, second]), Submit(max_tokens=1))
        assert list(output.token_ids) == [8]

    run(work())
    assert first.submits == []


def test_who_has_computed_a_prompts_beginning_is_chosen_while_loads_are_about_equal() -> None:
    first, second = two()
    prompt = list(range(300))

    async def work() -> None:
        pool = CoordinatorPool([first, second])

        async def ask(first_load: int, second_load: int, **fields: object) -> int:
            first.inflight_tokens, second.inflight_tokens = first_load, second_load
            fields = {"prompt_token_ids": prompt, "max_tokens": 1, **fields}
            (output,) = await outputs(pool, Submit(**fields))  # type: ignore[arg-type]
            return output.token_ids[0]

        assert await ask(1, 0) == 8
        assert await ask(0, 100) == 8, "what it has computed is worth 256 tokens"
        assert await ask(0, 100, prompt_token_ids=[*prompt[:256], 9]) == 8
        assert await ask(0, 100, prompt_token_ids=[9, *prompt]) == 7
        assert await ask(0, 100, tenant="somebody") == 7
        assert await ask(0, 100, cache_salt=b"salt") == 7
        long = list(range(5000))
        assert await ask(MOST_KNOWN_TOKENS, 0, prompt_token_ids=long) == 8
        assert await ask(0, MOST_KNOWN_TOKENS + 1, prompt_token_ids=long) == 7, "but not worth any load"
        assert await ask(0, 300) == 7, "now both have it"
        assert await ask(0, 100) == 7

    run(work())


def test_the_last_refusal_is_passed_on() -> None:
    coordinators = [ScriptedCoordinator(failing(STATUS_OVERLOADED, name)) for name in ("one", "two")]

    async def work() -> None:
        (output,) = await outputs(CoordinatorPool(coordinators), Submit(max_tokens=1))
        assert (output.status, output.error) == (STATUS_OVERLOADED, "two")

    run(work())


def test_closing_the_generator_cancels_at_the_coordinator() -> None:
    coordinator = ScriptedCoordinator(saying([7] * 9))

    async def work() -> None:
        async with aclosing(CoordinatorPool([coordinator]).generate(Submit(request_id=3, max_tokens=9))) as stream:
            await anext(stream)

    run(work())
    assert coordinator.cancelled == [3]


def test_connecting_needs_one_coordinator() -> None:
    first, second = two()
    first.connected = False

    async def work() -> None:
        pool = CoordinatorPool([first, second])
        await pool.connect()
        assert not pool.all_connected
        second.connected = False
        with pytest.raises(CoordinatorLost):
            await pool.connect()

    run(work())


def test_following_keeps_streams_that_go_on_and_ends_the_others() -> None:
    first, second = two()

    async def work() -> None:
        pool = CoordinatorPool([first, second])
        await pool.snapshots()
        twin, third = (ScriptedCoordinator(saying([9]), address=address) for address in ("b:1", "c:1"))
        await pool.follow({"b:1": twin, "c:1": third})
        assert pool.all_connected
        assert set(await pool.snapshots()) == {"b:1", "c:1"}
        second.inflight_tokens = 10
        (output,) = await outputs(pool, Submit(max_tokens=1))
        assert list(output.token_ids) == [9]

    run(work())
    assert (first.connected, second.connected) == (False, True)


def test_snapshots_are_kept_for_a_second() -> None:
    first, second = two()
    second.connected = False
    now = [100.0]

    async def work() -> None:
        pool = CoordinatorPool([first, second], clock=lambda: now[0])
        assert pool.last_snapshots == {}
        assert list(await pool.snapshots()) == ["a:1"], "who does not answer is left out"
        assert await pool.is_ready()
        first.reply = type(first.reply)(state="draining")
        assert await pool.is_ready(), "not asked again yet"
        now[0] += 1.5
        assert not await pool.is_ready()
        assert pool.last_snapshots["a:1"].state == "draining"

    run(work())


def test_a_pool_is_never_empty() -> None:
    with pytest.raises(ValueError, match="at least one"):
        CoordinatorPool([])


# --- going on elsewhere ---


def told(found: list[SequenceOutput]) -> list[int]:
    return [token for output in found for token in output.token_ids]


def ask(max_tokens: int = 6, **fields: object) -> Submit:
    return Submit(request_id=5, prompt_token_ids=[1, 2], max_tokens=max_tokens, **fields)  # type: ignore[arg-type]


WORDS = [11, 12, 13, 14, 15, 16]


def test_a_request_goes_on_at_the_other_one_after_every_cut() -> None:
    for cut in range(len(WORDS)):
        first = ScriptedCoordinator(losing(saying(WORDS), cut), address="a:1")
        second = ScriptedCoordinator(saying(WORDS), address="b:1")
        second.inflight_tokens = 5

        async def work(*both: ScriptedCoordinator) -> None:
            pool = CoordinatorPool(both)
            found = await outputs(pool, ask())
            assert told(found) == WORDS
            assert pool.resubmissions == {Verdict.LOST: 1}

        run(work(first, second))
        assert list(second.submits[0].generated_token_ids) == WORDS[:cut]


def test_with_one_coordinator_a_request_waits_for_the_next() -> None:
    """Longer than a new request does; and it wakes when a coordinator connects."""
    first = ScriptedCoordinator(losing(saying(WORDS), 2), address="a:1")
    second = ScriptedCoordinator(saying(WORDS), address="b:1")

    async def work() -> None:
        pool = CoordinatorPool([first], patience_s=0.01)
        found: list[SequenceOutput] = []
        async with aclosing(pool.generate(ask())) as stream:
            found += [await anext(stream), await anext(stream)]
            first.turn(connected=False)
            waiting = asyncio.create_task(_rest(stream))
            await asyncio.sleep(0.02)
            with pytest.raises(CoordinatorLost, match="no coordinator has been connected"):
                await outputs(pool, ask())
            assert not waiting.done()
            await pool.follow({"b:1": second})
            assert told(found + await waiting) == WORDS

    run(work())
    assert len(first.submits) == 1


async def _rest(stream: AsyncGenerator[SequenceOutput, None]) -> list[SequenceOutput]:
    return [output async for output in stream]


def test_new_requests_wait_for_a_restart_and_are_refused_at_once_when_it_takes_too_long() -> None:
    first, second = two()
    now = [100.0]

    async def work() -> None:
        pool = CoordinatorPool([first, second], clock=lambda: now[0], patience_s=20.0)
        for one in (first, second):
            one.turn(connected=False)
        now[0] += 19.0
        asking = asyncio.create_task(outputs(pool, ask(1)))
        await asyncio.sleep(0)
        second.turn(connected=True)
        assert told(await asking) == [8]
        second.turn(connected=False)
        now[0] += 21.0
        with pytest.raises(CoordinatorLost, match="for 21 s"):
            await outputs(pool, ask(1))  # at once: the clock stands still, and nothing else would end it
        second.turn(connected=True)
        assert told(await outputs(pool, ask(1))) == [8], "a new outage has patience of its own"

    run(work())


def test_what_was_promised_is_not_refused() -> None:
    """The other one is full at first: a client that has seen tokens must not be told to come back later."""
    first = ScriptedCoordinator(losing(saying(WORDS), 2), address="a:1")
    full = [failing(status, "no")(ask()) for status in (STATUS_OVERLOADED, STATUS_DRAINING)]

    def script(submit: Submit) -> Iterable[Event]:
        return full.pop() if full else saying(WORDS)(submit)

    second = ScriptedCoordinator(script, address="b:1")
    second.inflight_tokens = 5

    async def work() -> None:
        async with aclosing(CoordinatorPool([first, second]).generate(ask())) as stream:
            found = [await anext(stream), await anext(stream)]
            first.turn(connected=False)
            assert told(found + await _rest(stream)) == WORDS

    run(work())
    assert len(second.submits) == 3


@pytest.mark.parametrize("other_takes_it", [True, False])
def test_who_is_sent_away_at_the_end_goes_elsewhere_or_is_told(other_takes_it: bool) -> None:
    """A drain that is over ends what it had taken in. With nobody else left, waiting would end in a cut connection."""

    def sent_away(submit: Submit) -> Iterable[Event]:
        yield SequenceOutput(token_ids=WORDS[:2])
        yield SequenceOutput(
            finish_reason=FINISH_REASON_ERROR,
            status=STATUS_DRAINING,
            error="time is up",
            num_prompt_tokens=len(submit.prompt_token_ids),
        )

    first = ScriptedCoordinator(sent_away, address="a:1")
    second = ScriptedCoordinator(
        saying(WORDS) if other_takes_it else failing(STATUS_DRAINING, "draining", after=WORDS[:2]), address="b:1"
    )
    second.inflight_tokens = 5

    async def work() -> None:
        found = await outputs(CoordinatorPool([first, second]), ask())
        if other_takes_it:
            assert told(found) == WORDS
        else:
            assert (told(found[:-1]), found[-1].status) == (WORDS[:2], STATUS_DRAINING)

    run(work())
    assert (len(first.submits), len(second.submits)) == (1, 1)


def test_one_that_stops_hands_its_requests_over() -> None:
    first = ScriptedCoordinator(failing(STATUS_CANCELLED, "stopped", after=WORDS[:3]), address="a:1")
    second = ScriptedCoordinator(saying(WORDS), address="b:1")
    second.inflight_tokens = 5

    async def work() -> None:
        assert told(await outputs(CoordinatorPool([first, second]), ask())) == WORDS

    run(work())


@pytest.mark.parametrize(
    ("script", "tries"),
    [
        (failing(STATUS_INTERNAL, "poison", after=WORDS[:1]), 3),
        (failing(STATUS_INVALID, "wrong", after=WORDS[:1]), 1),
        (failing(STATUS_DEADLINE_EXCEEDED, "late", after=WORDS[:1]), 1),
    ],
)
def test_a_request_that_cannot_be_served_is_not_tried_for_ever(script: Script, tries: int) -> None:
    both = [ScriptedCoordinator(script, address=address) for address in ("a:1", "b:1")]

    async def work() -> None:
        found = await outputs(CoordinatorPool(both), ask())
        assert told(found) == WORDS[:1]
        assert found[-1].finish_reason == FINISH_REASON_ERROR

    run(work())
    asked = [len(one.submits) for one in both]
    assert sum(asked) == tries
    assert max(asked) - min(asked) <= 1, "the other one is asked first"


def test_a_request_that_kills_its_coordinators_is_given_up() -> None:
    script = raising(CoordinatorLost("killed"), after=WORDS[:1])
    both = [ScriptedCoordinator(script, address=address) for address in ("a:1", "b:1")]

    async def work() -> None:
        with pytest.raises(CoordinatorLost, match="too many"):
            await outputs(CoordinatorPool(both), ask())

    run(work())
    assert sum(len(one.submits) for one in both) == 1 + MAX_LOSSES_IN_PLACE


def test_closing_while_it_waits_leaves_nobody_asked() -> None:
    first = ScriptedCoordinator(losing(saying(WORDS), 2), address="a:1")

    async def work() -> None:
        async with aclosing(CoordinatorPool([first]).generate(ask())) as stream:
            await anext(stream)
            await anext(stream)
            first.turn(connected=False)
            waiting = asyncio.create_task(anext(stream))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    run(work())
    assert (len(first.submits), len(first.cancelled)) == (1, 1)


def test_the_follower_asks_only_while_somebody_is_away_and_until_all_are_back() -> None:
    first, second = two()
    third = ScriptedCoordinator(saying([9]), address="c:1")
    answers: list[dict[str, ScriptedCoordinator]] = [{"a:1": first}, {"a:1": first, "c:1": third}]
    asked = asyncio.Event()

    async def look() -> dict[str, ScriptedCoordinator]:
        asked.set()
        if len(answers) == 2 and first.inflight_tokens == 0:
            first.inflight_tokens = 1
            raise TimeoutError("nobody knows")
        return answers.pop(0)

    async def work() -> None:
        pool = CoordinatorPool([first, second])
        following = asyncio.create_task(keep_following(pool, look, 2))
        await asyncio.sleep(0.01)
        assert not asked.is_set(), "all are here"
        second.turn(connected=False)
        await asked.wait()
        while pool.num_connected < 2:
            await pool.wait_for_change()
        assert pool.all_connected
        assert not answers
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    run(work())


def test_the_follower_looks_now_and_again_where_there_may_be_more() -> None:
    first = ScriptedCoordinator(saying(WORDS), address="a:1")
    second = ScriptedCoordinator(saying([9]), address="b:1")

    async def look() -> dict[str, ScriptedCoordinator]:
        return {"a:1": first, "b:1": second}

    async def work() -> None:
        pool = CoordinatorPool([first])
        following = asyncio.create_task(keep_following(pool, look, 1, again_s=0.01))
        while pool.num_connected < 2:
            await pool.wait_for_change()
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)

    run(work())
