"""The terminal conversation, against small servers on real ports."""

import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from rich.console import Console

from actors.command.chat import ChatError, Conversation, chat

Answer = Callable[[dict[str, Any]], tuple[int, list[str]]]


@contextmanager
def server(answer: Answer, models: tuple[str, ...] = ("tiny",), cut: bool = False) -> Iterator[str]:
    """An API whose chat answers are the events that `answer` gives; `cut` breaks the stream off."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, "application/json", json.dumps({"data": [{"id": one} for one in models]}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, events = answer(body)
            if status != 200:
                self._send(status, "application/json", events[0])
            else:
                self._send(200, "text/event-stream", "".join(f"data: {event}\n\n" for event in events))

        def _send(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data) + (100 if cut and kind != "application/json" else 0)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(data)
            self.close_connection = True

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.server_address[1]}/v1"
        finally:
            listening.shutdown()
            thread.join()


def said(*pieces: str) -> list[str]:
    chunks = [{"id": "c", "choices": [{"index": 0, "delta": {"content": piece}}]} for piece in pieces]
    return [*map(json.dumps, chunks), json.dumps({"id": "c", "choices": []}), "[DONE]"]


@contextmanager
def talking(url: str, **more: Any) -> Iterator[Conversation]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield Conversation(client, **more)


def test_an_answer_joins_the_conversation_and_the_next_question_has_it() -> None:
    asked: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> tuple[int, list[str]]:
        asked.append(body)
        return 200, said("Pa", "ris")

    with server(answer) as url, talking(url, sampling={"temperature": 0}) as talk:
        assert list(talk.reply("Capital?")) == ["Pa", "ris"]
        assert list(talk.reply("Sure?")) == ["Pa", "ris"]
    assert (asked[0]["model"], asked[0]["temperature"], asked[0]["stream"]) == ("tiny", 0, True)
    assert [one["role"] for one in asked[1]["messages"]] == ["user", "assistant", "user"]
    assert asked[1]["messages"][1]["content"] == "Paris"


def test_no_server_is_said_in_one_line() -> None:
    with server(lambda _: (200, [])) as url:
        pass
    with talking(url) as talk:
        with pytest.raises(ChatError, match=f"no server at {url}.*octavo serve"):
            list(talk.reply("hi"))
        assert talk.messages == []


def test_a_server_without_models_is_said() -> None:
    with (
        server(lambda _: (200, []), models=()) as url,
        talking(url) as talk,
        pytest.raises(ChatError, match="lists no model"),
    ):
        list(talk.reply("hi"))


def test_a_refusal_is_the_servers_words_and_the_question_is_taken_back() -> None:
    body = json.dumps({"error": {"message": "too long", "type": "invalid_request_error"}})
    with server(lambda _: (400, [body])) as url, talking(url, model="tiny") as talk:
        with pytest.raises(ChatError, match="too long"):
            list(talk.reply("hi"))
        assert talk.messages == []


@pytest.mark.parametrize("cut", [False, True])
def test_an_error_in_mid_stream_keeps_what_was_said(cut: bool) -> None:
    events = said("half")[:1] + ([] if cut else [json.dumps({"error": {"message": "had an error"}})])
    with server(lambda _: (200, events), cut=cut) as url, talking(url, model="tiny") as talk:
        with pytest.raises(ChatError, match="broke off" if cut else "had an error"):
            list(talk.reply("hi"))
        assert talk.messages[-1] == {"role": "assistant", "content": "half"}


def test_the_terminal_loop() -> None:
    lines = iter(["", "  one ", "two"])

    def ask() -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    console = Console(file=io.StringIO(), width=80)
    with server(lambda body: (200, said(f"[{body['messages'][-1]['content']}]"))) as url, talking(url) as talk:
        chat(talk, console, ask)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[one]" in output
    assert "[two]" in output
    assert len(talk.messages) == 4


def test_ctrl_c_stops_one_answer_only() -> None:
    class Interrupted(Console):
        def out(self, *objects: Any, **more: Any) -> None:
            super().out(*objects, **more)
            if objects == ("stop",):
                raise KeyboardInterrupt

    lines = iter(["first"])

    def ask() -> str:
        for line in lines:
            return line
        raise KeyboardInterrupt

    console = Interrupted(file=io.StringIO(), width=80)
    with server(lambda _: (200, said("stop", "never"))) as url, talking(url, model="tiny") as talk:
        chat(talk, console, ask)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert "(stopped)" in output
    assert "never" not in output
    assert talk.messages[-1]["content"] == "stop"
