"""The window's routes over real sockets: the page's files and headers, its stream, who may not watch, who leaves."""

import asyncio
import json
import re
import tomllib
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx2
import pytest

from actors.front.front_door import FrontDoor
from actors.front.http_app import create_app
from actors.window.broadcast import MAX_VIEWERS
from actors.window.routes import STATIC
from tests.support.front import VOCAB, client_of, run, serving
from tests.support.tokenizers import write_byte_tokenizer
from tests.support.window import SeenCluster

SCRIPTS = sorted(STATIC.glob("*.js"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer and a chat template."""
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


@asynccontextmanager
async def served(front: FrontDoor) -> AsyncIterator[httpx2.AsyncClient]:
    limits = httpx2.Limits(max_connections=None)
    async with serving(create_app(front)) as url, httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        yield client


async def snapshots(reply: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in reply.aiter_lines():
        if line.startswith("data: "):
            yield json.loads(line.removeprefix("data: "))


async def requests_counted(client: httpx2.AsyncClient) -> str:
    return (await client.get("/metrics")).text


# --- the page ---


def test_the_page_and_its_files_are_served_and_allow_nothing_else(model_dir: Path) -> None:
    async def work() -> None:
        async with client_of(SeenCluster().front(model_dir)) as client:
            page = await client.get("/dashboard")
            assert page.status_code == 200
            assert page.headers["content-type"] == "text/html; charset=utf-8"
            named = re.findall(r'(?:src|href)="(dashboard/[^"]+)"', page.text)
            assert sorted(named) == ["dashboard/app.css", "dashboard/app.js", "dashboard/icon.svg"]
            modules = {f"dashboard/{path.name}" for path in SCRIPTS}
            for path in modules.union(named):
                found = await client.get(f"/{path}")
                assert found.status_code == 200, path
                kind = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}[Path(path).suffix]
                assert found.headers["content-type"].startswith(kind)
                assert found.headers["x-content-type-options"] == "nosniff"
            policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            assert "unsafe" not in page.headers["content-security-policy"]

    run(work())


@pytest.mark.parametrize("name", ["nothing.js", "..%2Froutes.py", "index.html", "%2e%2e/routes.py", "app.js/"])
def test_no_other_file_is_served(model_dir: Path, name: str) -> None:
    async def work() -> None:
        async with client_of(SeenCluster().front(model_dir)) as client:
            reply = await client.get(f"/dashboard/{name}")
            assert reply.status_code in (307, 404)
            assert "add_window" not in reply.text
            assert (await client.post("/dashboard")).status_code == 405

    run(work())


def test_the_files_are_in_the_package() -> None:
    told = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "actors.window" in told["packages"]
    (pattern,) = told["package-data"]["actors.window"]
    assert sorted(STATIC.parent.glob(pattern)) == sorted(STATIC.iterdir())


class Outline(HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts_with_text = 0
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        self.scripts_with_text += self._inside in ("script", "style") and bool(data.strip())

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_the_page_is_well_made() -> None:
    text = (STATIC / "index.html").read_text()
    page = Outline(text)
    ids = [about["id"] for _, about in page.tags if "id" in about]
    assert [one for one, times in Counter(ids).items() if times > 1] == []
    for tag, about in page.tags:
        for name in ("aria-labelledby", "aria-describedby", "for"):
            assert set((about.get(name) or "").split()) <= set(ids), f"{tag} {name}={about.get(name)}"
        assert "style" not in about, f"{tag} has a style of its own, which the policy forbids"
        assert not [name for name in about if name.startswith("on")], f"{tag} has an inline handler"
        if tag in ("section", "table") or about.get("role") in ("grid", "region", "img"):
            assert about.get("aria-label") or about.get("aria-labelledby") or tag == "table", f"{tag} has no name"
    assert page.scripts_with_text == 0
    by_tag = [tag for tag, _ in page.tags]
    assert by_tag.count("h1") == by_tag.count("main") == by_tag.count("title") == 1
    labelled = {about["for"] for tag, about in page.tags if tag == "label"}
    assert {about["id"] for tag, about in page.tags if tag == "input"} == labelled
    assert ("html", {"lang": "en"}) in page.tags


@pytest.mark.parametrize("path", [*sorted(STATIC.iterdir())], ids=lambda path: path.name)
def test_nothing_is_loaded_from_elsewhere_and_nothing_is_evaluated(path: Path) -> None:
    text = path.read_text().replace("http://www.w3.org/2000/svg", "")
    assert not re.findall(r"https?:|//[a-z]+\.[a-z]|@import|url\(|eval\(|new Function|innerHTML|document\.write", text)
    assert text.count("\n") <= 400


def test_modules_import_only_each_other_and_all_are_used() -> None:
    imported = {name for path in SCRIPTS for name in re.findall(r'from "\./([a-z]+\.js)"', path.read_text())}
    assert imported | {"app.js"} == {path.name for path in SCRIPTS}


def test_whatever_the_scripts_look_for_is_on_the_page() -> None:
    ids = set(re.findall(r'id="([^"]+)"', (STATIC / "index.html").read_text()))
    assert set(re.findall(r'\bat\("([^"]+)"\)', (STATIC / "app.js").read_text())) <= ids


# --- the stream ---


def test_snapshots_come_and_change_and_nobody_is_asked_more_for_many_pages(model_dir: Path) -> None:
    async def work() -> None:
        cluster = SeenCluster()
        async with served(cluster.front(model_dir)) as client:
            opened: list[int] = []

            async def watch() -> list[dict[str, Any]]:
                seen: list[dict[str, Any]] = []
                async with client.stream("GET", "/dashboard/events") as reply:
                    assert reply.status_code == 200
                    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
                    assert reply.headers["cache-control"] == "no-store"
                    async for one in snapshots(reply):
                        seen.append(one)
                        if one["cluster"]["state"] == "degraded":
                            return seen
                        if len(seen) == 1:
                            opened.append(cluster.looks)
                        if len(opened) == MAX_VIEWERS:  # from here on all see it
                            cluster.states["expert-2-r0"] = ("dead", "exit code -9")
                return seen

            found = await asyncio.gather(*(watch() for _ in range(MAX_VIEWERS)))
            for seen in found:
                assert seen[0]["cluster"]["state"] == "ready"
                assert seen[0]["load"]["tokens"] == cluster.load
                rows = {row["replica_id"]: row["state"] for row in seen[-1]["replicas"]}
                assert rows["expert-2-r0"] == "dead"
            assert cluster.looks - opened[-1] < MAX_VIEWERS, "one look is for all"

    run(work())


def test_there_are_so_many_places_and_one_that_is_left_is_free_again(model_dir: Path) -> None:
    async def work() -> None:
        front = SeenCluster().front(model_dir)
        async with served(front) as client:
            opened = [client.stream("GET", "/dashboard/events") for _ in range(MAX_VIEWERS)]
            for one in opened:
                assert (await one.__aenter__()).status_code == 200
            refused = await client.get("/dashboard/events")
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "15"
            error = refused.json()["error"]
            assert (error["code"], error["type"]) == ("too_many_viewers", "rate_limit_error")
            assert str(MAX_VIEWERS) in error["message"]
            text = await requests_counted(client)
            assert "octavo_http_requests_inflight 0.0" in text, "who watches does not generate"
            await opened.pop().__aexit__(None, None, None)
            async with asyncio.timeout(120):
                while (reply := await client.send(_get(client), stream=True)).status_code == 429:
                    await reply.aclose()
            await reply.aclose()
            for one in opened:
                await one.__aexit__(None, None, None)
            async with asyncio.timeout(120):
                while "octavo_http_requests_total" not in text or _watched(text) < MAX_VIEWERS + 1:
                    text = await requests_counted(client)
            assert "octavo_client_disconnects_total 0.0" in text, "closing a page is nothing to count"
            assert "octavo_unexpected_errors_total 0.0" in text

    run(work())


def _get(client: httpx2.AsyncClient) -> httpx2.Request:
    return client.build_request("GET", "/dashboard/events")


def _watched(text: str) -> float:
    """Streams that have ended."""
    found = re.search(r'octavo_http_requests_total\{endpoint="/dashboard/events",status="200"\} (\S+)', text)
    return float(found.group(1)) if found else 0.0


def test_nobody_looks_once_the_last_page_is_closed(model_dir: Path) -> None:
    async def work() -> None:
        cluster = SeenCluster()
        async with served(cluster.front(model_dir)) as client:
            async with client.stream("GET", "/dashboard/events") as reply:
                async for _ in snapshots(reply):
                    break
            async with asyncio.timeout(120):
                while True:
                    looked = cluster.looks
                    await asyncio.sleep(2.5)
                    if cluster.looks == looked:
                        return

    run(work())


def test_while_the_cluster_drains_a_stream_is_one_snapshot_long(model_dir: Path) -> None:
    """The front door's end waits for all requests: no page may hold it up."""

    async def work() -> None:
        cluster = SeenCluster()
        async with served(cluster.front(model_dir)) as client:
            async with client.stream("GET", "/dashboard/events") as reply:
                states = []
                async for one in snapshots(reply):
                    states.append(one["cluster"]["state"])
                    cluster.more["state"] = "draining"
            assert (states[0], states[-1], states.count("draining")) == ("ready", "draining", 1)
            again = await client.get("/dashboard/events")
            assert again.text.count("data: ") == 1

    run(work())


def test_latencies_are_those_that_the_front_door_measures(model_dir: Path) -> None:
    async def work() -> None:
        front = SeenCluster().front(model_dir)
        async with served(front) as client, client.stream("GET", "/dashboard/events") as reply:
            found = snapshots(reply)
            first = await anext(found)
            assert first["front"]["ttft"] == {"count": 0, "p50_s": None, "p99_s": None}
            for _ in range(10):
                front.metrics.ttft.observe(0.3)
                front.metrics.itl.observe(0.03)
            async for one in found:
                if one["front"]["ttft"]["count"]:
                    break
            assert one["front"]["ttft"]["count"] == 10
            assert 0.25 < one["front"]["ttft"]["p50_s"] <= 0.5
            assert 0.025 < one["front"]["itl"]["p50_s"] <= 0.05

    run(work())
