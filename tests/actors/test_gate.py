"""Who is let in: every path but two asks for a key, before a byte of the body; rates and heads are kept."""

import asyncio
import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter, FastAPI, Request
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Message

from actors.front.accounts import Accounts
from actors.front.api_keys import KeyEntry, new_key, one_key
from actors.front.front_door import FrontDoor
from actors.front.gate import OPEN_PATHS
from actors.front.head_limits import MAX_HEAD_BYTES, MAX_HEADERS, MAX_URL_BYTES
from actors.front.http_app import create_app
from actors.front.key_file import Keys
from actors.front.overload import Overload
from actors.front.request_fields import MAX_PRIORITY
from model.text.tokenizer import load_tokenizer
from protos.expert_pb2 import STATUS_OVERLOADED
from tests.support.front import MODEL, VOCAB, make_front, run
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
KEY = "a-key-that-is-only-for-tests"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


def entry(key: str = KEY, name: str = "alice", **limits: Any) -> KeyEntry:
    return one_key(name, key, **limits)


def guarded(model_dir: Path, *entries: KeyEntry, **changes: Any) -> FrontDoor:
    """A front door with keys, that says "some text"."""
    coordinator = changes.pop("coordinator", None) or ScriptedCoordinator(
        saying(load_tokenizer(model_dir).encode("some text", add_bos=False), EOS_ID)
    )
    accounts = changes.pop("accounts", None) or Accounts(lambda: 0.0)
    return make_front(model_dir, coordinator, keys=Keys(None, entries or (entry(),)), accounts=accounts, **changes)


def client(app: FastAPI, key: str | None = KEY) -> httpx2.AsyncClient:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://octavo", headers=headers)


def ask(app: FastAPI, method: str, path: str, key: str | None = KEY, **more: Any) -> httpx2.Response:
    async def work() -> httpx2.Response:
        async with client(app, key) as asking:
            return await asking.request(method, path, **more)

    return run(work())


def prompt(text: str = "p", **more: Any) -> dict[str, Any]:
    return {"json": {"model": MODEL, "prompt": text, **more}}


def all_routes(routes: list[BaseRoute]) -> list[Route]:
    found: list[Route] = []
    for route in routes:
        if isinstance(route, Mount):
            found += all_routes(list(route.routes))
        elif isinstance(route, Route):
            found.append(route)
        else:  # what FastAPI keeps of an included router
            found += all_routes(list(route.original_router.routes))  # type: ignore[attr-defined]
    return found


# ---- closed ------------------------------------------------------------------------------------------------


def test_every_route_but_two_asks_for_a_key_those_to_come_as_well(model_dir: Path) -> None:
    """A route that somebody adds is closed without doing anything for it."""
    app = create_app(guarded(model_dir))
    router = APIRouter()

    @router.get("/new/of/a/router")
    @app.post("/new")
    async def new() -> str:
        return "nobody may see this"

    app.include_router(router)
    routes = all_routes(list(app.router.routes))
    paths = {route.path for route in routes}
    assert {TEXT, CHAT, "/v1/models", "/metrics", "/new", "/new/of/a/router", *OPEN_PATHS} <= paths
    assert len(OPEN_PATHS) == 2
    for route in routes:
        for method in route.methods or ():
            path = route.path.replace("{model_id:path}", MODEL)
            status = ask(app, method, path, key=None).status_code
            expected = 200 if path in OPEN_PATHS and method in ("GET", "HEAD") else 401
            assert status == expected, (method, path)


@pytest.mark.parametrize(
    "path",
    ["/", "/health/", "/health/x", "//health", "/Health", "/ping/../metrics", "/health%2f..%2fmetrics", "/no/such"],
)
def test_what_only_looks_like_an_open_path_is_closed(model_dir: Path, path: str) -> None:
    assert ask(create_app(guarded(model_dir)), "GET", path, key=None).status_code == 401


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE"])
def test_an_open_path_is_open_for_reading_only(model_dir: Path, method: str) -> None:
    assert ask(create_app(guarded(model_dir)), method, "/health", key=None).status_code == 401


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ([], "You didn't provide an API key. Send it as the header 'Authorization: Bearer YOUR_KEY'."),
        ([("authorization", "Bearer wrong-key-wrong-key")], "Incorrect API key provided."),
        ([("authorization", f"Basic {KEY}")], "Incorrect API key provided."),
        ([("authorization", KEY)], "Incorrect API key provided."),
        ([("authorization", "Bearer")], "Incorrect API key provided."),
        ([("authorization", f"Bearer {KEY} x")], "Incorrect API key provided."),
        ([("authorization", f"Bearer {KEY}"), ("authorization", f"Bearer {KEY}")], "It must be sent once"),
        ([("authorization", "Bearer " + "k" * 10_000)], "Incorrect API key provided."),
        ([("authorization", b"Bearer \xff\xfe\x80")], "Incorrect API key provided."),
    ],
)
def test_the_refusal_is_openais_and_repeats_no_key(
    model_dir: Path, headers: list[tuple[str, str]], message: str
) -> None:
    response = ask(create_app(guarded(model_dir)), "POST", TEXT, key=None, headers=headers, **prompt())
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == 'Bearer realm="octavo"'
    error = response.json()["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_api_key")
    assert "wrong-key" not in response.text
    assert KEY not in response.text


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_a_known_key_opens_everything(model_dir: Path, scheme: str) -> None:
    app = create_app(guarded(model_dir))
    headers = {"Authorization": f"{scheme} {KEY}"}
    assert ask(app, "GET", "/v1/models", key=None, headers=headers).status_code == 200
    assert "octavo_" in ask(app, "GET", "/metrics", key=None, headers=headers).text
    assert ask(app, "POST", TEXT, key=None, headers=headers, **prompt()).json()["choices"][0]["text"] == "some text"
    assert ask(app, "GET", "/no/such", key=None, headers=headers).status_code == 404


@pytest.mark.parametrize("path", ["/dashboard", "/dashboard/app.js"])
def test_a_browsers_own_password_opens_the_page_and_nothing_else(model_dir: Path, path: str) -> None:
    def basic(secret: str) -> dict[str, str]:
        return {"authorization": "Basic " + base64.b64encode(f"anybody:{secret}".encode()).decode()}

    app = create_app(guarded(model_dir))
    asked = ask(app, "GET", path, key=None)
    assert (asked.status_code, asked.headers["www-authenticate"]) == (401, 'Basic realm="octavo"')
    assert ask(app, "GET", path, key=None, headers=basic(KEY)).status_code == 200
    for wrong in (basic("x" * 20), basic(""), {"authorization": "Basic %%%"}, {"authorization": "Basic"}):
        assert ask(app, "GET", path, key=None, headers=wrong).status_code == 401
    for method, elsewhere in (("GET", "/v1/models"), ("POST", path), ("GET", "/dashboards"), ("GET", "/metrics")):
        assert ask(app, method, elsewhere, key=None, headers=basic(KEY)).status_code == 401
    stream = ask(app, "GET", "/dashboard/events", key=None)
    assert stream.headers["www-authenticate"] == 'Bearer realm="octavo"', "the page's own form asks for the key"


def test_a_key_that_has_expired_is_told_so(model_dir: Path) -> None:
    """The clock of these fronts stands at 2027-01-15."""
    for expires, status in (("2027-01-16", 200), ("2027-01-14T23:59:59+00:00", 401)):
        response = ask(create_app(guarded(model_dir, entry(expires=expires))), "GET", "/v1/models")
        assert response.status_code == status
    assert response.json()["error"]["message"] == "The API key has expired."


async def _call(app: FastAPI, scope: dict[str, Any], receive: Callable[[], Any]) -> list[Message]:
    sent: list[Message] = []

    async def send(message: Any) -> None:
        sent.append(message)

    whole = {"http_version": "1.1", "scheme": "http", "query_string": b"", "root_path": "", "server": ("h", 80)}
    await app({**whole, **scope}, receive, send)
    return sent


def test_unauthenticated_bytes_are_not_even_asked_for(model_dir: Path) -> None:
    app = create_app(guarded(model_dir))

    async def receive() -> Message:
        raise AssertionError("the body was read")

    scope = {"type": "http", "method": "POST", "path": TEXT, "raw_path": TEXT.encode(), "headers": []}
    sent = run(_call(app, scope, receive))
    assert sent[0]["status"] == 401


def test_there_are_no_websockets(model_dir: Path) -> None:
    async def receive() -> Message:
        return {"type": "websocket.connect"}

    for front in (guarded(model_dir), make_front(model_dir, ScriptedCoordinator(saying([], EOS_ID)))):
        sent = run(_call(create_app(front), {"type": "websocket", "path": "/", "headers": []}, receive))
        assert sent == [{"type": "websocket.close", "code": 1008}]


def test_without_keys_everybody_is_let_in(model_dir: Path) -> None:
    front = make_front(model_dir, ScriptedCoordinator(saying([], EOS_ID)))
    for key in (None, "whatever"):
        response = ask(create_app(front), "POST", TEXT, key=key, **prompt())
        assert response.status_code == 200
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]


# ---- rates -------------------------------------------------------------------------------------------------


def test_a_key_over_its_rate_gets_429_and_another_goes_on(model_dir: Path) -> None:
    front = guarded(model_dir, entry(requests_per_minute=2), entry("another-key-for-tests", "bob"))
    app = create_app(front)
    answers = [ask(app, "POST", TEXT, **prompt()) for _ in range(3)]
    assert [one.status_code for one in answers] == [200, 200, 429]
    assert [one.headers["x-ratelimit-remaining-requests"] for one in answers] == ["1", "0", "0"]
    refused = answers[2]
    assert refused.headers["retry-after"] == "30"
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert "Limit 2, Used 2, Requested 1" in refused.json()["error"]["message"]
    assert ask(app, "POST", TEXT, key="another-key-for-tests", **prompt()).status_code == 200
    assert ask(app, "GET", "/v1/models").status_code == 200, "what only reads is not counted"


def test_tokens_are_charged_as_used_prompts_and_answers(model_dir: Path) -> None:
    front = guarded(model_dir, entry(tokens_per_minute=100))
    app = create_app(front)
    usage = ask(app, "POST", TEXT, **prompt("hello", n=2, max_tokens=20)).json()["usage"]
    left = ask(app, "GET", "/v1/models").headers["x-ratelimit-remaining-tokens"]
    assert int(left) == 100 - usage["total_tokens"]
    asked = ask(app, "POST", TEXT, **prompt("hello", max_tokens=90))
    assert asked.status_code == 429, "what is named as most is taken beforehand"
    assert ask(app, "GET", "/v1/models").headers["x-ratelimit-remaining-tokens"] == left
    stream = ask(app, "POST", TEXT, **prompt("hello", max_tokens=20, stream=True))
    assert stream.headers["x-ratelimit-limit-tokens"] == "100"
    said = usage["completion_tokens"] // 2
    after = int(ask(app, "GET", "/v1/models").headers["x-ratelimit-remaining-tokens"])
    assert after == int(left) - usage["prompt_tokens"] - said


def test_concurrency_is_counted_until_an_answer_is_over(model_dir: Path) -> None:
    coordinator = ScriptedCoordinator(saying([5] * 9, EOS_ID), hold_after=1)
    front = guarded(model_dir, entry(concurrency=1), coordinator=coordinator)

    async def work() -> None:
        async with client(create_app(front)) as asking:
            running = asyncio.create_task(asking.post(TEXT, **prompt()))
            await coordinator.held.wait()
            refused = await asking.post(TEXT, **prompt())
            assert refused.status_code == 429
            assert "at one time: Limit 1, Running 1, Requested 1" in refused.json()["error"]["message"]
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await coordinator.idle.wait()
            coordinator.held.clear()
            again = asyncio.create_task(asking.post(TEXT, **prompt()))
            await coordinator.held.wait()
            again.cancel()
            await asyncio.gather(again, return_exceptions=True)

    run(work())
    assert len(coordinator.submits) == 2
    (account,) = front.accounts._accounts.values()
    assert account.running == 0


@pytest.mark.parametrize("body", [{"prompt": 5}, {"prompt": "x" * 100_000}, {"prompt": "p", "model": "other"}])
def test_requests_that_fail_give_back_their_place_and_tokens(model_dir: Path, body: dict[str, Any]) -> None:
    front = guarded(model_dir, entry(concurrency=1, tokens_per_minute=1000))
    app = create_app(front)
    for _ in range(3):
        assert ask(app, "POST", TEXT, json={"model": MODEL, **body}).status_code in (400, 404)
    assert ask(app, "GET", "/v1/models").headers["x-ratelimit-remaining-tokens"] == "1000"


# ---- who asks ----------------------------------------------------------------------------------------------


def test_coordinators_are_told_whose_turn_it_is(model_dir: Path) -> None:
    front = guarded(
        model_dir,
        entry(),
        entry("bobs-key-for-these-tests", "bob", tenant="team"),
        entry("c" * 20, "carl", tenant="team"),
    )
    app = create_app(front)
    for key in (KEY, "bobs-key-for-these-tests", "c" * 20):
        ask(app, "POST", TEXT, key=key, **prompt(priority=-3))
        ask(app, "POST", CHAT, key=key, json={"model": MODEL, "messages": [{"role": "user", "content": "x"}]})
    (coordinator,) = front.coordinators._coordinators
    assert isinstance(coordinator, ScriptedCoordinator)
    told = [(submit.tenant, submit.priority) for submit in coordinator.submits]
    assert told == [("alice", -3), ("alice", 0), ("team", -3), ("team", 0), ("team", -3), ("team", 0)]


@pytest.mark.parametrize("priority", [MAX_PRIORITY + 1, -MAX_PRIORITY - 1, 1.5, "high"])
def test_priorities_are_bounded(model_dir: Path, priority: object) -> None:
    response = ask(create_app(guarded(model_dir)), "POST", TEXT, **prompt(priority=priority))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "priority")


def test_routes_see_the_tenant_and_never_the_key(model_dir: Path) -> None:
    app = create_app(guarded(model_dir))
    seen: list[dict[str, Any]] = []

    @app.get("/who")
    async def who(request: Request) -> str:
        seen.append(request.state._state)
        return str(request.state.tenant)

    assert ask(app, "GET", "/who").json() == "alice"
    assert KEY not in repr(seen)


def test_a_full_cluster_refuses_who_filled_it_and_still_asks_for_others(model_dir: Path) -> None:
    """What one tenant was refused says nothing about another: its share of the queue may be free."""
    coordinator = ScriptedCoordinator(failing(STATUS_OVERLOADED, "full", retry_after_ms=3000))
    still = Overload(lambda: 0.0)  # what was refused is refused for as long as this takes
    front = guarded(
        model_dir, entry(), entry("bobs-key-for-these-tests", "bob"), coordinator=coordinator, overload=still
    )
    app = create_app(front)
    for _ in range(4):
        assert ask(app, "POST", TEXT, **prompt()).status_code == 429
    assert ask(app, "POST", TEXT, key="bobs-key-for-these-tests", **prompt()).status_code == 429
    assert [submit.tenant for submit in coordinator.submits] == ["alice", "bob"]


# ---- heads -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keyed", [True, False])
@pytest.mark.parametrize(
    ("path", "headers", "status", "limit"),
    [
        ("/health?" + "x" * MAX_URL_BYTES, {}, 414, f"longer than {MAX_URL_BYTES} bytes"),
        ("/health", {f"x-{number}": "1" for number in range(MAX_HEADERS)}, 431, f"more than {MAX_HEADERS} headers"),
        ("/health", {"x-large": "x" * MAX_HEAD_BYTES}, 431, f"larger than {MAX_HEAD_BYTES} bytes"),
    ],
    ids=["url", "count", "size"],
)
def test_heads_are_bounded(
    model_dir: Path, keyed: bool, path: str, headers: dict[str, str], status: int, limit: str
) -> None:
    front = guarded(model_dir) if keyed else make_front(model_dir, ScriptedCoordinator(saying([], EOS_ID)))
    response = ask(create_app(front), "GET", path, key=None, headers=headers)
    assert response.status_code == status
    assert limit in response.json()["error"]["message"]


@pytest.mark.parametrize("depth", [202, 1000, 200_000])
def test_bodies_nested_too_deep_are_refused_with_the_limit(model_dir: Path, depth: int) -> None:
    body = b'{"model": "tiny", "prompt": "p", "user": ' + b"[" * depth + b"]" * depth + b"}"
    headers = {"Content-Type": "application/json"}
    response = ask(create_app(guarded(model_dir)), "POST", TEXT, content=body, headers=headers)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "The JSON body of your request is nested deeper than 201 levels."


# ---- browsers ----------------------------------------------------------------------------------------------

PREFLIGHT = {
    "Origin": "https://page.example",
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}


def test_no_page_may_ask_by_default(model_dir: Path) -> None:
    app = create_app(guarded(model_dir))
    assert ask(app, "OPTIONS", TEXT, key=None, headers=PREFLIGHT).status_code == 401
    response = ask(app, "GET", "/v1/models", headers={"Origin": "https://page.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_pages_of_allowed_origins_may_ask_and_a_preflight_needs_no_key(model_dir: Path) -> None:
    app = create_app(guarded(model_dir, entry(requests_per_minute=9), cors_origins=("https://page.example",)))
    allowed = ask(app, "OPTIONS", TEXT, key=None, headers=PREFLIGHT)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://page.example"
    assert "Authorization" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in allowed.headers
    other = {**PREFLIGHT, "Origin": "https://evil.example"}
    refused = ask(app, "OPTIONS", TEXT, key=None, headers=other)
    assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (400, None)
    answer = ask(app, "POST", TEXT, headers={"Origin": "https://page.example"}, **prompt())
    assert answer.headers["access-control-allow-origin"] == "https://page.example"
    assert "x-ratelimit-remaining-requests" in answer.headers["access-control-expose-headers"]
    error = ask(app, "POST", TEXT, key=None, headers={"Origin": "https://page.example"}, **prompt())
    assert (error.status_code, error.headers["access-control-allow-origin"]) == (401, "https://page.example")


def test_accounts_are_made_for_keys_that_are_used(model_dir: Path) -> None:
    made = [new_key(f"n{number}") for number in range(1000)]
    front = guarded(model_dir, *(one for _, one in made))
    app = create_app(front)
    for _ in range(2):
        assert ask(app, "GET", "/v1/models", key=made[-1][0]).status_code == 200
    assert [one.entry.name for one in front.accounts._accounts.values()] == ["n999"]
