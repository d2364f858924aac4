"""What Serve's proxy refuses in an ingress's place: for whom, for how long, in whose words, and that it is counted."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from actors import local_ray
from actors.front import proxy_guard
from actors.front.accounts import Accounts
from actors.front.api_keys import one_key
from actors.front.front_door import FrontDoor
from actors.front.http_app import create_app
from actors.front.key_file import Keys
from actors.front.overload import Overload
from actors.front.proxy_ask import ASK_HEADER, ROOM_HEADER, TOLD, is_question
from actors.front.proxy_hold import (
    ANSWER_HOLDS,
    BY_COORDINATOR,
    HOLD_HEADER,
    MAX_ASKS,
    MAX_BODY_BYTES,
    MAX_HOLDS,
    PROBE_S,
    REFUSED_HEADER,
    REFUSER_HEADER,
    STALE_S,
    HoldingProxy,
    hold_value,
    refused_at_proxy,
)
from protos.coordinator_pb2 import Room
from protos.expert_pb2 import STATUS_OVERLOADED
from tests.support.front import MODEL, VOCAB, make_front, run, serving
from tests.support.idle_clock import run_idle
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying
from tests.support.tokenizers import write_byte_tokenizer

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HOLD_S = 0.25
KEY = "a-key-that-is-only-for-tests"


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


async def never(_: float) -> None:
    """Nobody is asked."""
    await asyncio.Event().wait()


class Pauses:
    """Before questions: they end when the test says so."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self._over = asyncio.Event()

    async def __call__(self, seconds: float) -> None:
        self.begun.append(seconds)
        await self._over.wait()

    async def end(self) -> None:
        """Those that have begun, and what comes of it."""
        self._over.set()
        self._over = asyncio.Event()
        await _settle()


class Ingress:
    """Answers as `say` has it, and remembers what came."""

    def __init__(self) -> None:
        self.status = 429
        self.headers: list[tuple[bytes, bytes]] = [
            (b"retry-after", b"3"),
            (b"X-Octavo-Hold-Ms", b"250"),
            (b"x-request-id", b"of-the-first"),
        ]
        self.body = (b'{"error":', b'"full"}')
        self.seen: list[Scope] = []
        self.gate: asyncio.Event | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.seen.append(scope)
        status, headers, body, gate = self.status, self.headers, self.body, self.gate
        if gate is not None:
            await gate.wait()
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for piece in body[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": body[-1]})

    @property
    def told(self) -> list[tuple[str, int]]:
        """What it was told of refusals at the proxy."""
        return [one for scope in self.seen for one in refused_at_proxy(scope["headers"])]


class Asked:
    """What one request was answered."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.body = b""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
            assert len(self.headers) == len(message["headers"]), "no header comes twice"
        else:
            self.body += message["body"]


async def ask(proxy: ASGIApp, path: str = TEXT, method: str = "POST", **headers: str) -> Asked:
    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    given = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": given}
    asked = Asked()
    await proxy(scope, receive, asked)
    return asked


def test_what_an_ingress_refused_is_refused_in_its_words_for_as_long_as_it_says() -> None:
    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never)
        first = await ask(proxy)
        assert (first.status, first.headers["x-request-id"]) == (429, "of-the-first")
        assert HOLD_HEADER.lower() not in first.headers, "that is between the two"
        own = await ask(proxy, x_request_id="mine")
        drawn = [await ask(proxy) for _ in range(2)]
        for one in (own, *drawn):
            assert (one.status, one.body, one.headers["retry-after"]) == (429, b'{"error":"full"}', "3")
            assert HOLD_HEADER.lower() not in one.headers
        ids = [one.headers["x-request-id"] for one in (own, *drawn)]
        assert ids[0] == "mine"
        assert len({*ids, "of-the-first"}) == 4
        assert len(ingress.seen) == 1
        clock.now_s += HOLD_S
        await ask(proxy)
        assert len(ingress.seen) == 2

    run_idle(work())


@pytest.mark.parametrize(
    "other",
    [
        {"path": CHAT},
        {"method": "GET"},
        {"authorization": "Bearer another"},
        {"origin": "https://example.org"},
        {"last_event_id": "7"},
    ],
)
def test_it_speaks_for_nobody_else(other: dict[str, Any]) -> None:
    """Whoever has had a part of an answer was promised the rest; another key may be another tenant's."""

    async def work() -> None:
        ingress = Ingress()
        proxy = HoldingProxy(ingress, Clock(), never)
        first: dict[str, Any] = {"authorization": "Bearer one"}
        await ask(proxy, **first)
        assert (await ask(proxy, **first)).status == 429
        assert len(ingress.seen) == 1
        another = await ask(proxy, **{**first, **other})
        assert len(ingress.seen) == 2
        assert HOLD_HEADER.lower() not in another.headers, "whatever a refusal says"

    run_idle(work())


@pytest.mark.parametrize("lacks", ["hold", "status", "size"])
def test_other_answers_speak_for_nobody(lacks: str) -> None:
    """A key's own limit, an answer, and what is too large to be one of ours."""

    async def work() -> None:
        ingress = Ingress()
        if lacks == "hold":
            ingress.headers = ingress.headers[:1]
        elif lacks == "status":
            ingress.status = 503
        else:
            ingress.body = (b"x" * MAX_BODY_BYTES, b"x")
        proxy = HoldingProxy(ingress, Clock(), never)
        answers = [await ask(proxy) for _ in range(3)]
        assert len(ingress.seen) == 3
        assert [one.body for one in answers] == [b"".join(ingress.body)] * 3

    run_idle(work())


async def _settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_then_one_is_sent_to_find_out_and_the_others_need_not_wait_for_it() -> None:
    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never)
        await ask(proxy)
        clock.now_s += HOLD_S
        ingress.gate = asyncio.Event()
        probe = asyncio.create_task(ask(proxy))
        await _settle()
        assert len(ingress.seen) == 2
        clock.now_s += PROBE_S * 0.9
        assert [(await ask(proxy)).status for _ in range(5)] == [429] * 5
        ingress.gate.set()
        assert (await probe).status == 429
        clock.now_s += HOLD_S * 0.9
        assert (await ask(proxy)).status == 429, "it was refused: that counts from then on"
        assert len(ingress.seen) == 2

    run_idle(work())


def test_who_is_not_refused_at_once_has_found_room_and_all_are_sent_on() -> None:
    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never)
        await ask(proxy)
        clock.now_s += HOLD_S
        ingress.gate = asyncio.Event()
        asked = [asyncio.create_task(ask(proxy))]
        await _settle()
        clock.now_s += PROBE_S
        asked += [asyncio.create_task(ask(proxy)) for _ in range(3)]
        await _settle()
        assert len(ingress.seen) == 5
        ingress.gate.set()
        await asyncio.gather(*asked)

    run_idle(work())


def test_an_answer_ends_it_at_once() -> None:
    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never)
        await ask(proxy)
        clock.now_s += HOLD_S
        ingress.status = 200
        assert [(await ask(proxy)).status for _ in range(4)] == [200] * 4

    run_idle(work())


def test_the_answer_to_who_came_before_ends_nothing() -> None:
    """It was let in when there was room, which says nothing of now."""

    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never)
        ingress.gate, ingress.status = early, _ = asyncio.Event(), 200
        before = asyncio.create_task(ask(proxy))
        await _settle()
        ingress.gate, ingress.status = None, 429
        await ask(proxy)
        clock.now_s += HOLD_S
        ingress.gate = late = asyncio.Event()
        probe = asyncio.create_task(ask(proxy))
        await _settle()
        early.set()
        assert (await before).status == 200
        assert [(await ask(proxy)).status for _ in range(3)] == [429] * 3
        assert len(ingress.seen) == 3
        late.set()
        await probe

    run_idle(work())


def test_what_was_said_long_ago_refuses_nobody() -> None:
    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never)
        await ask(proxy)
        clock.now_s += HOLD_S + STALE_S
        ingress.gate, ingress.status = asyncio.Event(), 200
        asked = [asyncio.create_task(ask(proxy)) for _ in range(3)]
        await _settle()
        assert len(ingress.seen) == 4
        ingress.gate.set()
        assert [one.status for one in await asyncio.gather(*asked)] == [200] * 3

    run_idle(work())


def test_the_next_that_is_sent_on_tells_how_many_were_refused() -> None:
    async def work() -> None:
        ingress = Ingress()
        proxy = HoldingProxy(ingress, Clock(), never)
        for path, count in ((TEXT, 4), (CHAT, 3)):
            for _ in range(count):
                await ask(proxy, path)
        await ask(proxy, "/-/healthz", "GET")
        assert ingress.told == [(TEXT, 3)], "told with the first one for the other path, and not to Serve itself"
        await ask(proxy, "/metrics", "GET")
        await ask(proxy, "/metrics", "GET")
        assert ingress.told == [(TEXT, 3), (CHAT, 2)]

    run_idle(work())


def test_what_is_remembered_is_bounded_and_holds_no_key() -> None:
    async def work() -> None:
        ingress = Ingress()
        ingress.headers = [(b"x-octavo-hold-ms", b"999999999")]
        clock = Clock()
        proxy = HoldingProxy(ingress, clock, never)
        for number in range(MAX_HOLDS + 5):
            await ask(proxy, authorization=f"Bearer {number}")
        assert len(proxy._holds) == MAX_HOLDS
        assert all(b"Bearer" not in key and len(key) == 16 for key in proxy._holds)
        clock.now_s += 1.0
        before = len(ingress.seen)
        await ask(proxy, authorization=f"Bearer {MAX_HOLDS}")
        assert len(ingress.seen) == before + 1, "however long it was to be"

    run_idle(work())


def test_junk_in_a_report_counts_for_nothing() -> None:
    name = REFUSED_HEADER.lower().encode()
    assert list(refused_at_proxy([(name, b"x /v1"), (name, b""), (name, b"-3 /v1"), (b"other", b"3 /v1")])) == []
    assert list(refused_at_proxy([(name, b"3 /v1"), (name, b"2")])) == [("/v1", 3), ("", 2)]


# ---- asking, beside the requests ------------------------------------------------------------------------------


class Desk(Ingress):
    """Answers questions as `room` says, requests as an ingress."""

    def __init__(self) -> None:
        super().__init__()
        self.questions: list[Scope] = []
        self.room: str | None = "0"
        self.silent = self.raises = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not is_question(scope["headers"]):
            await super().__call__(scope, receive, send)
            return
        self.questions.append(scope)
        assert await receive() == {"type": "http.request", "body": b"", "more_body": False}
        if self.silent:
            await receive()
        if self.raises:
            raise RuntimeError("Serve's own")
        if self.room == "0":
            await send({"type": "http.response.start", "status": 429, "headers": self.headers})
            await send({"type": "http.response.body", "body": b'{"error":"still full"}'})
            return
        told = [] if self.room is None else [(ROOM_HEADER.encode(), self.room.encode()), (b"x-octavo-hold-ms", b"250")]
        await send({"type": "http.response.start", "status": 204, "headers": told})
        await send({"type": "http.response.body", "body": b""})


async def _statuses(proxy: HoldingProxy, number: int, **headers: str) -> list[int]:
    """Of so many requests; a question that one of them made necessary is on its way."""
    statuses = [(await ask(proxy, **headers)).status for _ in range(number)]
    await _settle()
    return statuses


def test_while_it_is_told_that_there_is_no_room_no_request_is_sent_to_find_out() -> None:
    async def work() -> None:
        desk, clock, pauses = Desk(), Clock(), Pauses()
        proxy = HoldingProxy(desk, clock, pauses)
        await ask(proxy)
        assert pauses.begun == [], "nobody has come in vain"
        for turn in range(1, 11):
            assert await _statuses(proxy, 5) == [429] * 5
            assert len(pauses.begun) == turn, "one question at a time"
            clock.now_s += pauses.begun[-1]
            await pauses.end()
            assert len(desk.questions) == turn
        assert (await ask(proxy)).body == b'{"error":"still full"}', "in the newest words"
        assert clock.now_s > 100 + 4 * HOLD_S
        assert len(desk.seen) == 1

    run_idle(work())


def test_as_many_are_sent_on_as_there_is_room_for_and_nobody_else() -> None:
    async def work() -> None:
        desk, clock, pauses = Desk(), Clock(), Pauses()
        proxy = HoldingProxy(desk, clock, pauses)
        await _statuses(proxy, 2)
        desk.room, desk.status = "2", 200
        await pauses.end()
        assert await _statuses(proxy, 5) == [200, 200, 429, 429, 429], "an answer is no sign of more room"
        assert len(desk.seen) == 3
        desk.room = "0"
        await pauses.end()
        assert await _statuses(proxy, 2) == [429] * 2
        desk.room = None
        await pauses.end()
        assert await _statuses(proxy, 5) == [200] * 5, "of many ingresses this one knows of none that is refused"
        assert len(desk.questions) == 3

    run_idle(work())


@pytest.mark.parametrize("trouble", ["silent", "other", "raises", "unheld"])
def test_where_no_word_comes_a_request_finds_out(trouble: str) -> None:
    """Whoever is away, or of another version: nobody is refused for long while there is room."""

    async def work() -> None:
        desk, clock, pauses = Desk(), Clock(), Pauses()
        proxy = HoldingProxy(desk, clock, pauses)
        await _statuses(proxy, 2)
        desk.status = 200
        desk.silent = trouble == "silent"
        if trouble == "other":
            desk.room = "x"
        elif trouble == "raises":
            desk.raises = True
        elif trouble == "unheld":
            desk.headers = desk.headers[:1]
        await pauses.end()
        if trouble == "silent":
            assert (await ask(proxy)).status == 429, "it has a moment to say something"
            clock.now_s += ANSWER_HOLDS * HOLD_S
        assert len(desk.questions) == 1
        assert await _statuses(proxy, 3) == [200] * 3

    run_idle(work())


def test_a_question_comes_too_late_where_nobody_is_refused_any_more() -> None:
    async def work() -> None:
        desk, clock, pauses = Desk(), Clock(), Pauses()
        proxy = HoldingProxy(desk, clock, pauses)
        await _statuses(proxy, 2)
        clock.now_s += HOLD_S
        await pauses.end()
        assert desk.questions == []
        desk.status = 200
        assert await _statuses(proxy, 3) == [200] * 3

    run_idle(work())


def test_a_question_tells_who_asks_and_how_many_were_refused_and_is_asked_for_a_few_only() -> None:
    async def work() -> None:
        desk, clock, pauses = Desk(), Clock(), Pauses()
        proxy = HoldingProxy(desk, clock, pauses)
        for number in range(MAX_ASKS + 3):
            own = {"authorization": f"Bearer {number}", "origin": "https://a.example", "content_length": "7"}
            await _statuses(proxy, 3, **own)
        assert len(pauses.begun) == MAX_ASKS
        await pauses.end()
        assert len(desk.questions) == MAX_ASKS
        for number, scope in enumerate(desk.questions):
            named = dict(scope["headers"])
            assert named[b"authorization"] == f"Bearer {number}".encode()
            assert named[b"origin"] == b"https://a.example"
            assert b"content-length" not in named, "there is no body"
            assert (scope["method"], scope["path"]) == ("POST", TEXT)
        told = [*desk.told, *(one for scope in desk.questions for one in refused_at_proxy(scope["headers"]))]
        assert sum(count for _, count in told) == 2 * (MAX_ASKS + 3)
        assert len(list(refused_at_proxy(desk.questions[0]["headers"]))) == 1

    run_idle(work())


def test_where_it_is_to_be_told_a_refusal_says_who_made_it() -> None:
    async def work() -> None:
        ingress, clock = Ingress(), Clock()
        proxy = HoldingProxy(ingress, clock, never, tells_refuser=True)
        name = REFUSER_HEADER.lower()
        assert [(await ask(proxy)).headers[name] for _ in range(2)] == ["ingress 0", "proxy 0"]
        ingress.headers[1] = (HOLD_HEADER.encode(), hold_value(HOLD_S, BY_COORDINATOR).encode())
        clock.now_s += HOLD_S
        assert (await ask(proxy)).headers[name] == "coordinator 0"
        assert name not in (await ask(HoldingProxy(ingress, clock, never))).headers

    run_idle(work())


# ---- with a front door behind it, over sockets ---------------------------------------------------------------


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


class Full(ScriptedCoordinator):
    """Full, but for who asks when `script` says otherwise."""

    def __init__(self) -> None:
        self.now = failing(STATUS_OVERLOADED, "full", retry_after_ms=3000)
        super().__init__(lambda submit: self.now(submit))


Ask = Callable[..., Any]


@asynccontextmanager
async def proxied(
    front: FrontDoor, clock: Clock, pause: Callable[[float], Awaitable[None]] = never
) -> AsyncIterator[tuple[Ask, Callable[[], int]]]:
    """The front door behind what Serve's proxy speaks and does; how to ask it, and how many requests came to it."""
    app = create_app(front, says_request_ids=True)
    passed = 0

    async def counting(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal passed
        asks = scope["type"] == "http" and is_question(scope["headers"])
        passed += scope["type"] == "http" and scope["method"] == "POST" and not asks
        await app(scope, receive, send)

    async with (
        serving(HoldingProxy(counting, clock, pause), proxy_guard.ProxyHttp) as url,  # type: ignore[arg-type]
        httpx2.AsyncClient(base_url=url, timeout=60) as client,
    ):

        async def post(**headers: str) -> httpx2.Response:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            body = {"model": MODEL, "prompt": "hello", "max_tokens": 2}
            return await client.post(TEXT, json=body, headers=named)

        post.metrics = lambda: client.get("/metrics")  # type: ignore[attr-defined]
        yield post, lambda: passed


def refused_by_metrics(page: str) -> float:
    line = next(line for line in page.splitlines() if line.startswith("octavo_http_requests_total") and '"429"' in line)
    assert f'endpoint="{TEXT}"' in line
    return float(line.split()[-1])


def test_refusals_of_both_are_alike_and_counted_together(model_dir: Path) -> None:
    async def work() -> None:
        clock, coordinator = Clock(), Full()
        front = make_front(model_dir, coordinator, overload=Overload(clock), is_guarded=True)
        async with proxied(front, clock) as (post, passed):
            answers = [await post(x_request_id=f"mine-{number}") for number in range(10)]
            assert [one.status_code for one in answers] == [429] * 10
            assert passed() == 1, "the coordinator's word speaks for others at once"
            for number, one in enumerate(answers):
                assert one.headers.get_list("x-request-id") == [f"mine-{number}"]
                assert one.json() == answers[0].json()
                assert one.headers["retry-after"] == "3"
                assert HOLD_HEADER not in one.headers
            assert answers[1].headers.keys() == answers[9].headers.keys()
            assert refused_by_metrics((await post.metrics()).text) == 10  # type: ignore[attr-defined]
            coordinator.now = saying([5, 6])
            clock.now_s += 2.0
            assert (await post()).status_code == 200
            assert refused_by_metrics((await post.metrics()).text) == 10, "once"  # type: ignore[attr-defined]

    run(work())


def test_room_at_a_coordinator_lets_as_many_through_without_one_that_finds_out(model_dir: Path) -> None:
    async def work() -> None:
        clock, coordinator, pauses = Clock(), Full(), Pauses()
        coordinator.rooms = Room(num_requests=0, retry_after_ms=9000)
        front = make_front(model_dir, coordinator, overload=Overload(clock, linger_s=0.5), is_guarded=True)
        async with proxied(front, clock, pauses) as (post, passed):
            assert [(await post()).status_code for _ in range(4)] == [429] * 4
            await pauses.end()
            async with asyncio.timeout(120):
                while not coordinator.questions:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                coordinator.now = saying([5, 6])
                coordinator.rooms = Room(num_requests=2)
                while front.overload.room() != 2:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                assert passed() == 1
                while (await post()).status_code != 200:
                    await pauses.end()
            answers = [(await post()).status_code for _ in range(4)]
            assert answers.count(200) <= 1, "no more than it had room for"
            assert passed() == 2 + answers.count(200)
            page = (await post.metrics()).text  # type: ignore[attr-defined]
            assert 'status="204"' not in page, "a question is no request"

    run(work())


def test_behind_a_guarded_proxy_no_body_is_read_to_refuse(model_dir: Path) -> None:
    """And none is refused so who goes on with an answer."""

    async def work() -> None:
        front = make_front(model_dir, Full(), overload=Overload(Clock()), is_guarded=True)
        app = create_app(front)
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://octavo") as client:
            assert (await client.post(TEXT, json={"model": MODEL, "prompt": "hello"})).status_code == 429

        async def never() -> Message:
            raise AssertionError("the body was asked for")

        for path in (TEXT, CHAT):
            asked = Asked()
            head = {"type": "http", "method": "POST", "path": path, "query_string": b"", "raw_path": path.encode()}
            await app({**head, "headers": [(b"content-type", b"application/json")]}, never, asked)
            assert asked.status == 429
            assert asked.headers[HOLD_HEADER.lower()] == "250"
        async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://octavo") as client:
            resumed = await client.post(TEXT, json={"model": MODEL, "prompt": "hello"}, headers={"Last-Event-ID": "x"})
            assert resumed.status_code == 400
        await front.close()

    run(work())


def test_a_question_is_answered_with_what_is_known_and_takes_nobodys_place(model_dir: Path) -> None:
    async def work() -> None:
        overload = Overload(Clock())
        front = make_front(model_dir, Full(), overload=overload, is_guarded=True)
        app = create_app(front)
        head = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "raw_path": CHAT.encode()}

        async def question() -> Asked:
            async def receive() -> Message:
                raise AssertionError("there is no body")

            asked = Asked()
            await app({**head, "headers": [(ASK_HEADER.lower().encode(), b"1")]}, receive, asked)
            return asked

        name, held = ROOM_HEADER.lower(), HOLD_HEADER.lower()
        unknown = await question()
        assert (unknown.status, name in unknown.headers, held in unknown.headers) == (TOLD, False, False)
        overload.note_refused(7.0)
        full = await question()
        assert (full.status, full.headers["retry-after"], full.headers[held]) == (429, "7", "250")
        overload.note_room("", 2, 0.0)
        for _ in range(4):
            room = await question()
            assert (room.status, room.headers[name], room.headers[held]) == (TOLD, "2", "250")
        await front.close()

    run(work())


def test_a_client_can_neither_count_nor_see_what_is_between_the_two(model_dir: Path) -> None:
    async def work() -> None:
        clock = Clock()
        front = make_front(model_dir, Full(), overload=Overload(clock), is_guarded=True)
        async with proxied(front, clock) as (post, _):
            own = {"X_Octavo_Refused": f"1000 {TEXT}", "x_octavo_hold_ms": "9", "x_octavo_ask": "1"}
            answers = [await post(**own) for _ in range(3)]
            assert [one.status_code for one in answers] == [429] * 3
            assert not any(name.startswith("x-octavo") for one in answers for name in one.headers)
            assert refused_by_metrics((await post.metrics()).text) == 3  # type: ignore[attr-defined]

    run(work())


def test_without_a_guarded_proxy_nothing_is_said_and_nothing_believed(model_dir: Path) -> None:
    async def work() -> None:
        front = make_front(model_dir, Full(), overload=Overload(Clock()))
        async with serving(create_app(front)) as url, httpx2.AsyncClient(base_url=url, timeout=60) as client:
            for _ in range(3):
                headers = {REFUSED_HEADER: f"1000 {TEXT}", ASK_HEADER: "1"}
                answer = await client.post(TEXT, json={"model": MODEL, "prompt": "hello"}, headers=headers)
                assert answer.status_code == 429
                assert HOLD_HEADER not in answer.headers
            assert refused_by_metrics((await client.get("/metrics")).text) == 3

    run(work())


def test_a_key_whose_requests_are_counted_is_counted_each_time(model_dir: Path) -> None:
    """It is told what is left of its limit, and after so many that there is nothing left."""

    async def work() -> None:
        clock = Clock()
        keys = Keys(None, (one_key("alice", KEY, requests_per_minute=5), one_key("bob", f"{KEY}-2")))
        accounts = Accounts(clock)
        front = make_front(model_dir, Full(), overload=Overload(clock), is_guarded=True, keys=keys, accounts=accounts)
        async with proxied(front, clock) as (post, passed):
            answers = [await post(authorization=f"Bearer {KEY}") for _ in range(7)]
            left = [one.headers["x-ratelimit-remaining-requests"] for one in answers]
            assert left == ["4", "3", "2", "1", "0", "0", "0"]
            assert passed() == 7
            assert "requests per min" in answers[-1].json()["error"]["message"]
            for _ in range(5):
                assert (await post(authorization=f"Bearer {KEY}-2")).status_code == 429
            assert passed() == 8, "bob's are not counted: the second and later were not sent on"
            assert (await post(authorization="Bearer wrong")).status_code == 401

    run(work())


def test_pages_of_other_origins_may_read_a_refusal_of_the_proxy(model_dir: Path) -> None:
    async def work() -> None:
        clock, origins = Clock(), ("https://a.example", "https://b.example")
        front = make_front(model_dir, Full(), overload=Overload(clock), is_guarded=True, cors_origins=origins)
        async with proxied(front, clock) as (post, passed):
            for origin in (*origins, "https://evil.example"):
                answers = [await post(origin=origin) for _ in range(4)]
                allowed = [one.headers.get("access-control-allow-origin") for one in answers]
                assert allowed == [origin if origin in origins else None] * 4
            assert passed() < 12

    run(work())


def test_the_environment_says_whether_proxies_are_guarded() -> None:
    assert local_ray.HTTP_PROXY_CALLBACK == proxy_guard.CALLBACK
    assert f"{proxy_guard.middlewares.__module__}:{proxy_guard.middlewares.__name__}" == proxy_guard.CALLBACK
    assert proxy_guard.is_guarded({proxy_guard.CALLBACK_VARIABLE: proxy_guard.CALLBACK})
    assert not proxy_guard.is_guarded({proxy_guard.CALLBACK_VARIABLE: "theirs:own"})
    assert not proxy_guard.is_guarded({})
