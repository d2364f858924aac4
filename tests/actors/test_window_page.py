"""The page at /dashboard in a real Chromium: what it draws, what changes, by keyboard, light and dark, on a phone."""

import base64
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from actors.front.http_app import create_app
from actors.supervision.status import BalanceStatus
from tests.support.chromium import Page, chromium, needs_chromium
from tests.support.front import VOCAB, run, serving
from tests.support.tokenizers import write_byte_tokenizer
from tests.support.window import AT_S, NODES, SeenCluster

pytestmark = [needs_chromium, pytest.mark.timeout(400)]

CELLS = "document.querySelectorAll('#heat td.load').length"
LIVE = "document.querySelector('#connection').dataset.state === 'live'"
Use = Callable[[Page, SeenCluster, str], Awaitable[None]]


@asynccontextmanager
async def opened(
    cluster: SeenCluster, home: Path, wrap: Callable[[FastAPI], ASGIApp] | None, user: str
) -> AsyncIterator[Any]:
    write_byte_tokenizer(home, VOCAB)
    app = create_app(cluster.front(home))
    async with serving(wrap(app) if wrap else app) as url, chromium(home) as page:  # type: ignore[arg-type]
        await page.size(1440, 1000)
        await page.prefer(scheme="light")
        await page.open(f"{url.replace('://', f'://{user}')}/dashboard")
        yield page, url


def look(
    home: Path,
    use: Use,
    cluster: SeenCluster | None = None,
    wrap: Callable[[FastAPI], ASGIApp] | None = None,
    user: str = "",
) -> None:
    """Opens the page of a cluster in a Chromium; whatever it complains about fails the test.

    `user` is `NAME:PASSWORD@` where the browser has one for this server.
    """

    async def work() -> None:
        seen = cluster or SeenCluster()
        async with opened(seen, home, wrap, user) as (page, url):
            await use(page, seen, url)
            assert page.problems == []
            asked = {urlsplit(one).netloc.rpartition("@")[2] for one in page.requested}
            assert asked == {urlsplit(url).netloc}, "it asks elsewhere"

    run(work(), 380)


def text_of(selector: str) -> str:
    return f"document.querySelector({json.dumps(selector)}).textContent.replaceAll('\\u00a0', ' ')"


def test_it_draws_a_cell_for_every_layer_and_expert_and_their_numbers(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        await page.until(f"{CELLS} === 32 * 8")
        await page.until(LIVE)
        rows = await page.evaluate(
            "[...document.querySelectorAll('#heat tbody tr')]"
            ".map(r => [...r.querySelectorAll('td.load')].map(c => c.textContent))"
        )
        shares = [[f"{100 * one / sum(row):.0f}" for one in row] for row in cluster.load]
        assert rows == shares
        steps = await page.evaluate("[...new Set([...document.querySelectorAll('td.load')].map(c => c.dataset.step))]")
        assert {"-4", "0", "2"} <= set(steps)
        colours = await page.evaluate(
            "[...document.querySelectorAll('.swatch')].map(s => getComputedStyle(s).backgroundColor)"
        )
        assert len(set(colours)) == 10, "every step of the scale has a colour of its own"
        assert await page.evaluate("document.title") == "mixtral-tiny: ready"
        names = await page.evaluate("[...document.querySelectorAll('#replicas tbody th')].map(r => r.textContent)")
        assert names == cluster.names
        assert "coordinator-0" in await page.evaluate(text_of("#coordinators"))
        await page.until(f"{text_of('#value-generated')} !== '–'")

    look(tmp_path, use, SeenCluster(32, 8))


def test_numbers_show_on_hover_and_on_focus_and_a_key_walks(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        await page.until(f"{CELLS} === 4 * 8")
        await page.hover("#heat tbody tr:nth-child(3) td:nth-of-type(6)")
        tokens, total = cluster.load[2][5], sum(cluster.load[2])
        told = await page.until(f"{text_of('#cell')}.startsWith('Layer 2, expert 5') && {text_of('#cell')}")
        assert f"{tokens:,} tokens" in told
        assert f"{100 * tokens / total:.1f} % of the layer" in told
        assert told.endswith("1 of 1 copies")

        await page.evaluate("document.querySelector('#numbers').focus()")
        await page.press("Tab")
        at = "document.activeElement.place?.join()"
        assert await page.evaluate(at) == "0,0", "one stop for the whole map"
        walked = []
        for key, control in (
            ("ArrowRight", False), ("ArrowDown", False), ("End", False), ("ArrowRight", False), ("ArrowUp", False),
            ("End", True), ("PageUp", False), ("Home", False), ("ArrowLeft", False), ("PageDown", False),
            ("Home", True),
        ):  # fmt: skip
            await page.press(key, control=control)
            walked.append(await page.evaluate(at))
        assert walked == ["0,1", "1,1", "1,7", "1,7", "0,7", "3,7", "0,7", "0,0", "0,0", "3,0", "0,0"]
        assert (await page.evaluate(text_of("#cell"))).startswith("Layer 0, expert 0")
        outline = "(s => s.outlineStyle + parseFloat(s.outlineWidth))(getComputedStyle(document.activeElement))"
        assert await page.evaluate(outline) == "solid2", "the focus is seen"
        assert await page.evaluate("document.querySelectorAll('#heat [tabindex=\"0\"]').length") == 1

    look(tmp_path, use)


def test_every_control_is_reached_by_tab_and_has_a_name(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        await page.until(f"{CELLS} && {LIVE}")
        reached = []
        for _step in range(8):
            await page.press("Tab")
            name = (
                "(e => e === document.body ? '' : e.getAttribute('aria-label') || e.closest('table')?.id"
                " || e.getAttribute('aria-labelledby') || e.textContent.trim())(document.activeElement)"
            )
            reached.append(await page.evaluate(name))
        cell = reached.pop(2)
        assert cell.startswith("Layer 0, expert 0: "), "who hears the page is told the numbers"
        assert reached[:4] == ["Skip to the experts", "Show numbers", "Events, the newest first", "h-replicas"]
        await page.evaluate("document.querySelector('#numbers').focus()")
        await page.press(" ")
        assert await page.evaluate("document.querySelector('#numbers').getAttribute('aria-pressed')") == "true"
        shown = "getComputedStyle(document.querySelector('td.load[data-step=\"0\"]')).color"
        assert await page.evaluate(shown) == "rgb(30, 34, 38)"

        tree = (await page.call("Accessibility.getFullAXTree"))["nodes"]
        known = [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in tree if not one["ignored"]]
        assert ("grid", "Load by layer and expert") in known
        assert any(role == "columnheader" and name.startswith("expert 7") for role, name in known)
        assert any(role == "image" and name.startswith("Colours, from blue") for role, name in known)
        assert sum(role == "gridcell" for role, _ in known) >= 32
        unnamed = [role for role, name in known if role in ("button", "textbox", "grid", "region", "link") and not name]
        assert unnamed == []

    look(tmp_path, use)


def test_a_dead_replica_and_what_follows_are_seen(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        row = "[...document.querySelectorAll('#replicas tbody tr')].find(r => r.textContent.includes('expert-3-r0'))"
        await page.until(f"{row}?.dataset.state === 'ready'")
        kept = "(window.kept = [...document.querySelectorAll('td.load, #replicas tr')]).length"
        assert await page.evaluate(kept) == 32 + 9
        cluster.states["expert-3-r0"] = ("dead", "exit code <b>-9</b>")
        cluster.standings["expert-3-r0"] = ("away", "connection refused")
        cluster.more |= {
            "map_epoch": 4,
            "events": ["20:31:07 expert-3-r0 is dead", "20:31:08 expert-3-r0 starts again"],
            "balance": BalanceStatus(
                mode="on", policy="incremental", moves_total=1, moved_bytes_total=2**30,
                done=[{"kind": "copy", "what": "expert 3, layers 0-3", "node_id": NODES[1], "source": "",
                       "num_bytes": 2**30, "reason": "expert 3 takes 41 % of layer 2", "at": AT_S}],
            ),
        }  # fmt: skip
        # What a coordinator says of it may be seen a look later than what the supervisor does.
        await page.until(f"{row}.dataset.state === 'dead' && {row}.textContent.includes('coordinator-0: away')")
        told = await page.evaluate(f"{row}.textContent")
        assert "✕ dead" in told
        assert "exit code <b>-9</b>; coordinator-0: away, connection refused" in told, "and no markup of theirs"
        await page.until("document.querySelector('#heat th[data-lacking]')?.textContent.includes('✕3')")
        assert "expert 3 has 0 of 1" in await page.evaluate(text_of("#load-summary"))
        assert await page.evaluate(text_of("#state")) == "▲ degraded"
        assert (await page.evaluate(text_of("#replicas-note"))) == "7 ready, 1 dead"
        assert "4 since" in await page.evaluate(text_of("#epochs"))
        assert "before it 3 since" in await page.evaluate(text_of("#epochs"))
        moves = await page.evaluate(text_of("#moves"))
        assert "● donecopy expert 3, layers 0-3 to 77b01e55, 1.00 GiB" in moves
        assert "expert 3 takes 41 % of layer 2" in moves
        assert (await page.evaluate(text_of("#events li"))) == "20:31:08expert-3-r0 starts again"
        assert await page.evaluate("window.kept.every(e => e.isConnected)"), "rows and cells are kept, not made anew"

    look(tmp_path, use)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_have_contrast(tmp_path: Path, scheme: str) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        cluster.states["expert-3-r0"] = ("dead", "exit code -9")
        await page.prefer(scheme=scheme)
        await page.until(f"{CELLS} && Boolean(document.querySelector('[data-kind=bad]'))")
        await page.evaluate("document.querySelector('#numbers').click()")
        worst = await page.evaluate(CONTRAST)
        assert worst["text"] >= 4.5, worst
        assert (
            await page.evaluate("getComputedStyle(document.body).backgroundColor")
            == {
                "light": "rgb(247, 247, 245)",
                "dark": "rgb(18, 21, 24)",
            }[scheme]
        )
        await page.screenshot(tmp_path / "seen.png")
        assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")

    look(tmp_path, use)


# The least contrast of a text with what is behind it, by the WCAG's formula, and where.
CONTRAST = """(() => {
  const parse = (c) => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (e) => { for (; e; e = e.parentElement) {
    const c = parse(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] > 0) return c; }
    return [255, 255, 255]; };
  let worst = {text: 21, where: ""};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    const style = getComputedStyle(e);
    if (!own || !e.getClientRects().length || e.closest(".hidden, .skip, noscript, [data-step=none]")) continue;
    if (parse(style.color)[3] === 0 || parseFloat(style.fontSize) === 0) continue;
    const [a, b] = [light(parse(style.color)), light(behind(e))].sort((x, y) => y - x);
    const found = (a + 0.05) / (b + 0.05);
    if (found < worst.text) worst = {text: found, where: e.outerHTML.slice(0, 120)};
  }
  return worst;
})()"""


@pytest.mark.parametrize("shape", [(32, 8), (12, 64)])
def test_on_a_phone_the_page_is_as_wide_as_the_screen(tmp_path: Path, shape: tuple[int, int]) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        cluster.states["expert-3-r0"] = ("dead", "a-very-long-word-without-any-space-" * 5)
        cluster.more["events"] = ["12:00:00 " + "x" * 200]
        await page.size(375, 812, phone=True)
        await page.until(f"{CELLS} === {shape[0] * shape[1]} && Boolean(document.querySelector('[data-kind=bad]'))")
        assert await page.evaluate("document.documentElement.scrollWidth") == 375
        boxes = "[...document.querySelectorAll('.panel, .tile, header > *')]"
        over = f"{boxes}.filter(e => e.getBoundingClientRect().right > 375).length"
        assert await page.evaluate(over) == 0

    look(tmp_path, use, SeenCluster(*shape))


def test_with_less_motion_nothing_moves(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        moves = "e => parseFloat(getComputedStyle(e).transitionDuration) > 0"
        moving = f"[...document.querySelectorAll('*')].filter({moves}).length"
        await page.until(f"{CELLS} && {moving} > 0")
        await page.prefer(motion="reduce")
        assert await page.evaluate(moving) == 0
        assert await page.evaluate("document.getAnimations().length") == 0

    look(tmp_path, use)


class Switch:
    """The application, until it is switched off: then its streams break, and nobody gets in."""

    def __init__(self, app: ASGIApp) -> None:
        self.on = True
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def through(message: Any) -> None:
            if not self.on:
                raise OSError("switched off")
            await send(message)

        if scope["type"] == "http" and not self.on:
            await JSONResponse({}, status_code=503)(scope, receive, send)
            return
        await self._app(scope, receive, through)


def test_a_lost_connection_is_said_and_it_comes_back_by_itself(tmp_path: Path) -> None:
    made: list[Switch] = []

    def wrap(app: FastAPI) -> ASGIApp:
        made.append(Switch(app))
        return made[0]

    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        await page.until(f"{CELLS} && {LIVE}")
        made[0].on = False
        await page.until("document.querySelector('#connection').textContent === 'connection lost'")
        await page.until("document.querySelector('#notice').textContent.startsWith('The connection is lost')")
        assert await page.evaluate(f"{CELLS} === 32"), "what was seen last stays"
        assert await page.evaluate("document.body.classList.contains('stale')")
        await page.until("/\\d s old/.test(document.querySelector('#age').textContent)")
        made[0].on = True
        await page.until(f"{LIVE} && document.querySelector('#notice').hidden")
        assert not await page.evaluate("document.body.classList.contains('stale')")
        page.problems = [one for one in page.problems if "503" not in one and "ERR_" not in one]

    look(tmp_path, use, wrap=wrap)


class Locked:
    """Asks for a key where the page's data are."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.keys: list[str] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/dashboard/events":
            self.keys.append(dict(scope["headers"]).get(b"authorization", b"").decode())
            if self.keys[-1] != "Bearer sk-right":
                error = {
                    "error": {"message": "Incorrect API key.", "type": "x", "param": None, "code": "invalid_api_key"}
                }
                await JSONResponse(error, status_code=401)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def test_it_asks_for_a_key_and_sends_it_and_keeps_it_in_the_tab(tmp_path: Path) -> None:
    made: list[Locked] = []

    def wrap(app: FastAPI) -> ASGIApp:
        made.append(Locked(app))
        return made[0]

    async def use(page: Page, cluster: SeenCluster, url: str) -> None:
        await page.until("document.activeElement.id === 'key'")
        assert await page.evaluate(text_of("#notice")) == "This server asks for a key."
        await page.write("sk-wrong")
        await page.press("Enter")
        await page.until("document.querySelector('#notice').textContent.includes('does not take')")
        assert await page.evaluate(text_of("#key-note")) == "Incorrect API key."
        await page.write("sk-right")
        await page.press("Enter")
        await page.until(f"{CELLS} === 32 && document.querySelector('#key-form').hidden")
        assert made[0].keys == ["", "Bearer sk-wrong", "Bearer sk-right"]
        await page.open(f"{url}/dashboard")
        await page.until(f"{CELLS} === 32")
        assert made[0].keys[3:] == ["Bearer sk-right"], "it is kept for this tab"
        assert await page.evaluate("localStorage.length + document.cookie.length") == 0
        assert not any("sk-right" in one for one in page.requested)
        await page.evaluate("document.querySelector('#forget').click()")
        await page.until("!document.querySelector('#key-form').hidden")
        page.problems = [one for one in page.problems if "401" not in one]

    look(tmp_path, use, wrap=wrap)


class Password:
    """Asks for a password at every path, as a browser knows it; it is the key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wanted = b"Basic " + base64.b64encode(b"anything:sk-right")
        if scope["type"] == "http" and dict(scope["headers"]).get(b"authorization") != wanted:
            challenge = {"WWW-Authenticate": 'Basic realm="octavo"'}
            await JSONResponse({}, status_code=401, headers=challenge)(scope, receive, send)
            return
        await self._app(scope, receive, send)


def test_behind_a_browsers_own_password_it_needs_no_key(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, url: str) -> None:
        await page.until(f"{CELLS} === 32 && {LIVE}")
        assert await page.evaluate("document.querySelector('#key-form').hidden")

    look(tmp_path, use, wrap=Password, user="anything:sk-right@")


def test_when_every_place_is_taken_it_says_so_and_gets_in_later(tmp_path: Path) -> None:
    full = [True]

    class Full:
        def __init__(self, app: ASGIApp) -> None:
            self._app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http" and scope["path"] == "/dashboard/events" and full[0]:
                error = {"error": {"message": "open 16 times", "type": "x", "param": None, "code": "too_many_viewers"}}
                await JSONResponse(error, status_code=429)(scope, receive, send)
                return
            await self._app(scope, receive, send)

    async def use(page: Page, cluster: SeenCluster, _: str) -> None:
        await page.until(f"{text_of('#notice')} === 'open 16 times'")
        assert await page.evaluate(text_of("#connection")) == "no place"
        full[0] = False
        await page.until(f"{CELLS} === 32 && document.querySelector('#notice').hidden")
        page.problems = [one for one in page.problems if "429" not in one]

    look(tmp_path, use, wrap=Full)


def test_series_are_bounded_and_scales_are_round(tmp_path: Path) -> None:
    async def use(page: Page, cluster: SeenCluster, url: str) -> None:
        script = """import("./dashboard/series.js").then(({Series, roundUp}) => {
          const one = new Series();
          for (let n = 0; n < 1000; n++) one.add(n * 1000, n % 7);
          const two = new Series();
          [[0, 1], [1000, 2], [20000, 3], [21000, null], [22000, 4]].forEach(([at, v]) => two.add(at, v));
          return [one.points.length, one.path(7).split(/[ML]/).length - 1, (two.path(4).match(/M/g) || []).length,
                  [0, 0.3, 1, 7, 13, 210].map(roundUp)];
        })"""
        points, drawn, pieces, scales = await page.evaluate(script)
        assert (points, drawn) == (300, 300)
        assert pieces == 3, "a pause and an unknown value are gaps"
        assert scales == [1, 0.5, 1, 10, 20, 500]
        told = await page.evaluate("""import("./dashboard/format.js").then((f) => [f.short(12345), f.short(9999),
          f.short(4.56e6), f.rate(3.14159), f.rate(null), f.bytes(11274289152), f.latency(0.0451), f.latency(12.3),
          f.duration(5025), f.duration(59), f.percent(0.123, 1), f.count(1234567)])""")
        assert told == [
            *("12.3k", "9,999", "4.56M", "3.1", "–", "10.5\u00a0GiB", "45 ms", "12.3 s"),
            *("1 h 23 min", "59 s", "12.3\u00a0%", "1,234,567"),
        ]

    look(tmp_path, use)
