"""Full coordinators: what they would refuse is refused at the door, at no cost, until they say that there is room."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path

import httpx2
import pytest

from actors.front.coordinator_client import CoordinatorLost
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.openai_errors import ApiError
from actors.front.overload import ANSWER_S, HOLD_S, MAX_ASKED, MAX_TENANTS, Overload, Wanted
from actors.front.room_watch import RoomWatch
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import Room, RoomReply, RoomRequest, SequenceOutput, SnapshotReply, Submit
from protos.expert_pb2 import STATUS_OVERLOADED
from tests.support.front import MODEL, VOCAB, ask, client_of, make_front, run
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying
from tests.support.tokenizers import write_byte_tokenizer

TEXT = "/v1/completions"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def refused(overload: Overload, tenant: str = "") -> float | None:
    """When to come back; None for who is let through."""
    try:
        overload.check(tenant)
    except ApiError as error:
        return error.retry_after_s if error.status == 429 else None
    return None


def test_a_refusal_speaks_for_a_moment_and_says_the_rest_of_the_wait() -> None:
    clock = Clock()
    overload = Overload(clock)
    assert refused(overload) is None
    overload.note_refused(7.0)
    clock.now_s += HOLD_S / 2
    assert refused(overload) == pytest.approx(7.0 - HOLD_S / 2)
    clock.now_s += HOLD_S
    assert [refused(overload) for _ in range(5)] == [None] * 5


def test_as_many_are_let_through_as_there_is_room_for() -> None:
    clock = Clock()
    overload = Overload(clock)
    overload.note_refused(7.0)
    assert refused(overload)
    overload.note_room("", 3, 0.0)
    assert overload.room() == 3
    assert [refused(overload) is None for _ in range(5)] == [True, True, True, False, False]
    overload.note_room("", 0, 4.0)
    assert refused(overload) == pytest.approx(4.0), "a newer word"
    assert overload.room() == 0
    assert overload.room("another") is None
    overload.note_room("", 2, 0.0)
    overload.note_refused(6.0)
    assert refused(overload) == pytest.approx(6.0), "somebody else was quicker: what was said before is no longer true"


def test_who_came_through_lately_takes_a_place_of_those_they_tell_of() -> None:
    """They may have counted before it came; to send another in vain is the slowest way to refuse it."""
    overload = Overload(Clock(), linger_s=1.0)
    overload.note_refused(7.0)
    assert refused(overload)

    def told(num: int) -> int | None:
        overload.note_room("", num, 0.0)
        return overload.room()

    overload.ask()
    assert told(3) == 3
    assert refused(overload) is None, "just before the next question"
    overload.ask()
    assert refused(overload) is None, "while they are asked"
    assert told(3) == 1
    overload.ask()
    assert told(1) == 0, "one came since the question before"
    assert refused(overload) is not None
    overload.ask()
    assert told(1) == 1, "nobody came lately"


def test_they_are_asked_only_for_tenants_that_were_refused_since() -> None:
    clock = Clock()
    overload = Overload(clock)
    overload.note_refused(7.0, "a", 30)
    overload.note_refused(7.0, "b", 50)
    assert overload.ask() == [], "nobody has come for nothing yet"
    assert refused(overload, "b")
    assert refused(overload, "c") is None, "of whom nothing is known"
    assert overload.ask() == [Wanted("b", 50)]
    assert overload.ask() == []
    for _ in range(2):
        assert refused(overload, "a")
        assert refused(overload, "b")
    assert sorted(overload.ask(), key=lambda one: one.tenant) == [Wanted("a", 30), Wanted("b", 50)]


def test_behind_a_proxy_that_refuses_too_they_are_asked_for_a_while_after_the_last_who_came() -> None:
    clock = Clock()
    overload = Overload(clock, linger_s=1.0)
    overload.note_refused(7.0)
    assert overload.ask() == []
    assert refused(overload)
    for _ in range(3):
        assert overload.ask() == [Wanted("", 1)]
        overload.note_room("", 0, 5.0)
        clock.now_s += 0.3
    overload.note_room("", 1, 0.0)
    clock.now_s += 0.3
    assert overload.ask() == []
    assert refused(overload) is None, "what they said last"
    assert refused(overload)


def test_while_they_are_asked_their_last_word_counts_but_not_for_ever() -> None:
    clock = Clock()
    overload = Overload(clock)
    overload.note_refused(7.0)
    assert refused(overload)
    overload.ask()
    clock.now_s += (HOLD_S + ANSWER_S) / 2
    assert refused(overload)
    clock.now_s += ANSWER_S
    assert refused(overload) is None


def test_what_is_remembered_and_asked_is_bounded() -> None:
    clock = Clock()
    overload = Overload(clock)
    for number in range(MAX_TENANTS + 10):
        overload.note_refused(7.0, f"t{number}")
    assert refused(overload, "t0") is None
    for number in range(10, MAX_TENANTS + 10):
        assert refused(overload, f"t{number}")
    asked: list[str] = []
    while wanted := overload.ask():
        assert len(wanted) <= MAX_ASKED
        asked += [one.tenant for one in wanted]
    assert sorted(asked) == sorted(f"t{number}" for number in range(10, MAX_TENANTS + 10))
    overload.note_room("nobody", 5, 0.0)


async def _ask(client: httpx2.AsyncClient, **more: object) -> int:
    response = await client.post(TEXT, json={"model": MODEL, "prompt": "hello", **more})
    assert ("retry-after" in response.headers) == (response.status_code == 429)
    return int(response.status_code)


def test_after_a_refusal_nobody_is_asked_for_a_moment(model_dir: Path) -> None:
    clock = Clock()
    coordinator = ScriptedCoordinator(failing(STATUS_OVERLOADED, "full", retry_after_ms=3000))
    front = make_front(model_dir, coordinator, overload=Overload(clock))

    async def work(client: httpx2.AsyncClient) -> None:
        assert [await _ask(client) for _ in range(5)] == [429] * 5
        assert len(coordinator.submits) == 1
        assert await _ask(client, temperature=9) == 400, "a bad request is told so, however full it is"
        clock.now_s += 2 * HOLD_S
        assert await _ask(client) == 429
        assert len(coordinator.submits) == 2

    ask(front, work)


def test_one_request_of_many_choices_speaks_for_nobody_else(model_dir: Path) -> None:
    """Its first choice found room: there is some."""
    tokens = load_tokenizer(model_dir).encode("ok", add_bos=False)
    good, bad = saying(tokens), failing(STATUS_OVERLOADED, "full", retry_after_ms=3000)
    coordinator = ScriptedCoordinator(lambda submit: (good if submit.sampling.seed == 1000 else bad)(submit))
    front = make_front(model_dir, coordinator, overload=Overload(Clock()))

    async def work(client: httpx2.AsyncClient) -> None:
        assert await _ask(client, n=3, seed=1000, max_tokens=2) == 429
        assert await _ask(client, seed=1000, max_tokens=2) == 200

    ask(front, work)


class LateReporter(ScriptedCoordinator):
    """It tells its state `answers` times; after that it is too busy to."""

    answers = 1
    asked = 0

    async def snapshot(self) -> SnapshotReply:
        self.asked += 1
        if self.asked > self.answers:
            await asyncio.Event().wait()
        return self.reply


def test_who_is_too_busy_to_say_that_it_is_ready_is_full(model_dir: Path) -> None:
    coordinator = LateReporter(failing(STATUS_OVERLOADED, "full", retry_after_ms=3000))
    coordinator.answers = 0

    async def work(client: httpx2.AsyncClient) -> None:
        assert await _ask(client) == 429

    ask(make_front(model_dir, coordinator), work)


def test_a_refusal_waits_for_no_snapshot(model_dir: Path) -> None:
    clock = Clock()
    coordinator = LateReporter(failing(STATUS_OVERLOADED, "full", retry_after_ms=3000))
    pool = CoordinatorPool([coordinator], clock)
    front = make_front(model_dir, coordinators=pool, overload=Overload(clock))

    async def work(client: httpx2.AsyncClient) -> None:
        for _ in range(3):
            assert await _ask(client) == 429
            clock.now_s += 9
        assert (len(coordinator.submits), coordinator.asked) == (3, 1)

    ask(front, work)


# ---- asking beside the requests ----------------------------------------------------------------------------


class Busy(ScriptedCoordinator):
    """Full; it has no time to say so, but for the first request, until it is `free`."""

    def __init__(self) -> None:
        super().__init__(failing(STATUS_OVERLOADED, "full", retry_after_ms=3000))
        self.free = asyncio.Event()
        self.was_asked = asyncio.Event()

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        if self.submits:
            await self.free.wait()
        async for output in super().generate(submit):
            yield output

    async def room(self, questions: RoomRequest) -> RoomReply:
        self.was_asked.set()
        await self.free.wait()
        return await super().room(questions)


def test_a_refusal_never_waits_for_a_coordinator_that_is_busy(model_dir: Path) -> None:
    """Also not where it is asked for room, which it takes as long to answer as it likes."""

    async def work() -> None:
        coordinator, clock = Busy(), Clock()
        front = make_front(model_dir, coordinator, overload=Overload(clock))
        async with client_of(front) as client:
            assert await _ask(client) == 429
            for _ in range(20):
                assert await _ask(client) == 429
                clock.now_s += HOLD_S / 50
            async with asyncio.timeout(120):
                await coordinator.was_asked.wait()
            assert [await _ask(client) for _ in range(5)] == [429] * 5
            assert len(coordinator.submits) == 1, "no client's request was sent to find out"
        await front.close()

    run(work())


def test_room_that_is_told_lets_requests_through_again_at_once(model_dir: Path) -> None:
    """Long before the word of the refusal is too old: the clock stands still."""
    tokens = load_tokenizer(model_dir).encode("ok", add_bos=False)

    async def work() -> None:
        full = failing(STATUS_OVERLOADED, "full", retry_after_ms=3000)
        script = [full]
        coordinator = ScriptedCoordinator(lambda submit: script[-1](submit))
        coordinator.rooms = Room(num_requests=0, retry_after_ms=9000)
        front = make_front(model_dir, coordinator, overload=Overload(Clock()))
        async with client_of(front) as client:
            assert await _ask(client, prompt=[5] * 40, max_tokens=2) == 429
            assert await _ask(client, max_tokens=2) == 429
            async with asyncio.timeout(120):
                while not coordinator.questions:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            (question,) = coordinator.questions[0].questions
            assert (question.tenant, question.num_tokens) == ("", 40)
            script.append(saying(tokens))
            coordinator.rooms = Room(num_requests=2)
            async with asyncio.timeout(120):
                while await _ask(client, max_tokens=2) != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
            coordinator.rooms = Room(num_requests=0, retry_after_ms=9000)
            answers = [await _ask(client, max_tokens=2) for _ in range(8)]
            assert answers.count(200) <= 2, "no more than there is room for"
            assert answers[-1] == 429
        await front.close()

    run(work())


def test_without_refusals_nobody_is_asked(model_dir: Path) -> None:
    tokens = load_tokenizer(model_dir).encode("ok", add_bos=False)
    coordinator = ScriptedCoordinator(saying(tokens))
    coordinator.rooms = Room(num_requests=1)
    front = make_front(model_dir, coordinator)

    async def work(client: httpx2.AsyncClient) -> None:
        assert [await _ask(client, max_tokens=2) for _ in range(5)] == [200] * 5

    ask(front, work)
    assert coordinator.questions == []


def test_the_watch_asks_one_question_at_a_time_and_survives_who_cannot_answer() -> None:
    asked: list[list[Wanted]] = []
    overload = Overload(Clock())

    async def work() -> None:
        answered = asyncio.Event()

        async def answer(wanted: Sequence[Wanted]) -> list[Room]:
            asked.append(list(wanted))
            if len(asked) == 1:
                raise CoordinatorLost("away")
            await answered.wait()
            return [Room(num_requests=1) for _ in wanted]

        watch = RoomWatch(overload, answer, pause_s=0.001)

        async def until(number: int) -> None:
            async with asyncio.timeout(120):
                while len(asked) < number:
                    assert refused(overload)
                    watch.wake()
                    await asyncio.sleep(0.001)

        overload.note_refused(7.0)
        await until(2)
        for _ in range(50):
            assert refused(overload)
            watch.wake()
            await asyncio.sleep(0)
        assert len(asked) == 2, "the answer to the last one is not there"
        answered.set()
        async with asyncio.timeout(120):
            while refused(overload):  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await watch.close()
        await watch.close()

    run(work())


# ---- several coordinators ----------------------------------------------------------------------------------


class Silent(ScriptedCoordinator):
    async def room(self, questions: RoomRequest) -> RoomReply:
        await asyncio.Event().wait()
        raise AssertionError


def _telling(num: int, retry_ms: int, address: str) -> ScriptedCoordinator:
    one = ScriptedCoordinator(saying([5]), address=address)
    one.rooms = Room(num_requests=num, retry_after_ms=retry_ms)
    return one


def test_the_room_of_all_is_added_up_and_who_is_silent_is_not_waited_for() -> None:
    wanted = [Wanted("a", 3), Wanted("b", 4)]

    async def work() -> None:
        away = _telling(100, 0, "away:1")
        away.connected = False
        members = [_telling(2, 0, "a:1"), _telling(0, 7000, "b:1"), Silent(saying([5]), address="c:1"), away]
        pool = CoordinatorPool(members)
        assert [one.num_requests for one in await pool.room(wanted)] == [2, 2]
        pool = CoordinatorPool([_telling(0, 7000, "a:1"), _telling(0, 3000, "b:1")])
        assert [(one.num_requests, one.retry_after_ms) for one in await pool.room(wanted)] == [(0, 3000)] * 2

    run(work())


def test_nobody_to_tell_is_said() -> None:
    async def work() -> None:
        away = _telling(1, 0, "a:1")
        for members in ([ScriptedCoordinator(saying([5]))], [away]):
            away.connected = False
            with pytest.raises(CoordinatorLost, match="whether it has room"):
                await CoordinatorPool(members).room([Wanted("", 1)])

    run(work())
