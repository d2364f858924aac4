"""A real Chromium for tests, told what to do over its DevTools protocol: open, evaluate, press keys, look.

What the page writes to its console as an error, and what it cannot load or may not do, is kept in `problems`.
"""

import asyncio
import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START_TIMEOUT_S = 120.0
CALL_TIMEOUT_S = 120.0
FLAGS = (
    *("--headless=new", "--remote-debugging-port=0", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--no-first-run", "--disable-extensions", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--mute-audio", "--hide-scrollbars", "--force-color-profile=srgb", "--no-proxy-server"),
)
KEYS = {
    **{f"Arrow{name}": code for name, code in (("Left", 37), ("Up", 38), ("Right", 39), ("Down", 40))},
    "Tab": 9,
    "Enter": 13,
    "Escape": 27,
    "End": 35,
    "Home": 36,
    "PageUp": 33,
    "PageDown": 34,
    " ": 32,
}
_CONTROL, _SHIFT = 2, 8


def find_chromium() -> str | None:
    """Where a Chromium is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


needs_chromium = pytest.mark.skipif(find_chromium() is None, reason=f"no Chromium is installed (one of {NAMES})")


class Page:
    """One page. Sizes in CSS pixels."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.problems: list[str] = []
        self.requested: list[str] = []
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command of the protocol. Raises AssertionError with Chromium's words when it refuses."""
        number = next(self._ids)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": params})
        async with asyncio.timeout(CALL_TIMEOUT_S):
            reply = await answer
        assert "error" not in reply, f"{method}: {reply['error']}"
        result: dict[str, Any] = reply["result"]
        return result

    async def begin(self) -> None:
        """What is listened to."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            await self.call(f"{domain}.enable")
        await self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    async def open(self, url: str) -> None:
        """Goes there and waits until it is loaded."""
        self._loaded.clear()
        reply = await self.call("Page.navigate", url=url)
        assert "errorText" not in reply, reply
        async with asyncio.timeout(CALL_TIMEOUT_S):
            await self._loaded.wait()

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, as JSON has it; a promise is waited for."""
        reply = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, f"{expression}: {reply['exceptionDetails']}"
        return reply["result"].get("value")

    async def until(self, expression: str, timeout_s: float = 120.0) -> Any:
        """The first value of the expression that is true."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if value := await self.evaluate(expression):
                        return value
                    await asyncio.sleep(0.05)
        except TimeoutError:
            text = await self.evaluate("document.body.innerText")
            raise AssertionError(f"not within {timeout_s:g} s: {expression}; the page says:\n{text}") from None

    async def press(self, key: str, *, control: bool = False, shift: bool = False) -> None:
        """One key, down and up."""
        modifiers = _CONTROL * control + _SHIFT * shift
        about: dict[str, Any] = {"key": key, "code": "Space" if key == " " else key, "modifiers": modifiers}
        about["windowsVirtualKeyCode"] = KEYS[key]
        text = {" ": {"text": " "}, "Enter": {"text": "\r"}}.get(key, {})
        await self.call("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **about, **text)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    async def write(self, text: str) -> None:
        """Types into what has the focus."""
        await self.call("Input.insertText", text=text)

    async def hover(self, selector: str) -> None:
        """Moves the pointer to the middle of an element."""
        box = await self.evaluate(
            f"(() => {{ const one = document.querySelector({json.dumps(selector)});"
            " one.scrollIntoView({block: 'center'}); const box = one.getBoundingClientRect();"
            " return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    async def size(self, width: int, height: int, *, phone: bool = False) -> None:
        """The window's size."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone
        )

    async def prefer(self, *, scheme: str = "light", motion: str = "no-preference") -> None:
        """What the person prefers: light or dark, and `reduce` for less motion."""
        features = [
            {"name": "prefers-color-scheme", "value": scheme},
            {"name": "prefers-reduced-motion", "value": motion},
        ]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """A PNG of what is seen, or of the whole page."""
        reply = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        await asyncio.to_thread(path.write_bytes, base64.b64decode(reply["data"]))

    async def close(self) -> None:
        """Ends listening."""
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        async for message in self._socket:
            told = json.loads(message.data)
            if "id" in told:
                answer = self._answers.pop(told["id"])
                if not answer.done():
                    answer.set_result(told)
            else:
                self._note(told["method"], told["params"])
        for answer in self._answers.values():
            answer.cancel()

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded.set()
        elif method == "Network.requestWillBeSent":
            self.requested.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            self.problems.append(json.dumps(params["args"]))
        elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")


@asynccontextmanager
async def chromium(home: Path) -> AsyncIterator[Page]:
    """A Chromium without a window and its one page; `home` keeps its profile. Everything is gone at the end."""
    found = find_chromium()
    assert found is not None
    process = await asyncio.create_subprocess_exec(
        *(found, *FLAGS, f"--user-data-dir={home / 'profile'}", "about:blank"),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home)},
        start_new_session=True,
    )
    try:
        async with aiohttp.ClientSession() as session:
            port = await _port(home / "profile/DevToolsActivePort", process)
            async with session.ws_connect(await _first_page(session, port), max_msg_size=0) as socket:
                page = Page(socket)
                try:
                    await page.begin()
                    yield page
                finally:
                    await page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def _first_page(session: aiohttp.ClientSession, port: int) -> str:
    """Where to speak to it. Chromium answers before it has one."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                pages = [one for one in await reply.json() if one["type"] == "page"]
            if pages:
                return str(pages[0]["webSocketDebuggerUrl"])
            await asyncio.sleep(0.05)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


async def _port(written: Path, process: asyncio.subprocess.Process) -> int:
    """Chromium writes the port that it has chosen into its profile."""
    async with asyncio.timeout(START_TIMEOUT_S):
        while True:
            assert process.returncode is None, f"Chromium ended with {process.returncode}"
            lines = await asyncio.to_thread(_lines, written)
            if len(lines) >= 2:
                return int(lines[0])
            await asyncio.sleep(0.05)
