"""Every function on a request's way may raise once: that request fails in OpenAI's words, and nobody else's does.

A stream of another client stands still in its middle meanwhile, goes on afterwards, and is told to its end. The same
request, asked again, is answered.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx2
import pytest

import actors.front.chat_completions as chat_module
import actors.front.completions as completions_module
import actors.front.gate as gate_module
import actors.front.generation as generation_module
import actors.front.http_app as http_module
import actors.front.planning as planning_module
import actors.front.prompts as prompts_module
import actors.front.request_body as body_module
import actors.front.resume as resume_module
import actors.front.streaming as streaming_module
from actors.front.accounts import Account, Accounts
from actors.front.api_keys import KeyRing, one_key
from actors.front.caller import KeyHolder
from actors.front.chat_completions import ChatCompletion
from actors.front.choice_text import Answer, ChoiceText
from actors.front.completions import Completion
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.event_ids import EventIds, StreamKey
from actors.front.front_door import FrontDoor
from actors.front.gate import Gate
from actors.front.http_app import create_app
from actors.front.http_boundary import Bound
from actors.front.key_file import Keys
from actors.front.metrics import FrontMetrics
from actors.front.openai_responses import Head, UsageCount
from actors.front.openai_schema import ChatCompletionRequest, CompletionRequest
from actors.front.overload import Overload
from actors.front.resubmission import Resubmission
from actors.front.resume import Beginning, Untold
from actors.front.stream_memory import StreamMemory, StreamRecord
from cluster.token_bucket import TokenBucket
from model.text.chat_template import ChatTemplate
from model.text.detokenizer import IncrementalDetokenizer
from model.text.hf_tokenizer import HFTokenizer
from model.text.tokenizer import load_tokenizer
from protos.coordinator_pb2 import SequenceOutput, Submit
from tests.support.faults import Fault
from tests.support.front import MODEL, VOCAB, make_front, run
from tests.support.scripted_coordinator import ScriptedCoordinator, saying
from tests.support.tokenizers import EOS_ID, write_byte_tokenizer

TEXT = "/v1/completions"
CHAT = "/v1/chat/completions"
SAID = "some text to say"
KEY = "a-key-that-is-only-for-tests"
INTERNAL = {
    "message": "The server had an error while processing your request.",
    "type": "server_error",
    "param": None,
    "code": "internal_error",
}

FAULTS: list[tuple[Any, str]] = [
    (gate_module, "check_head"),
    (Gate, "_http"),
    (Gate, "_account"),
    (Gate, "_begin"),
    (gate_module, "_shown_key"),
    (KeyRing, "find"),
    (Accounts, "of"),
    (Account, "begin"),
    (Account, "headers"),
    (TokenBucket, "take"),
    (KeyHolder, "reserve"),
    (KeyHolder, "use"),
    (Bound, "__call__"),
    (http_module, "read_request"),
    (http_module, "_admit"),
    (http_module, "_answer"),
    (http_module, "unless_gone"),
    (body_module, "_read"),
    (body_module, "from_json"),
    (CompletionRequest, "model_validate"),
    (ChatCompletionRequest, "model_validate"),
    (Overload, "check"),
    (Completion, "prepare"),
    (ChatCompletion, "prepare"),
    (completions_module, "check_request"),
    (completions_module, "completion_prompts"),
    (chat_module, "chat_prompt"),
    (prompts_module, "text_prompt"),
    (prompts_module, "_check_size"),
    (FrontDoor, "text_work"),
    (FrontDoor, "next_request_id"),
    (HFTokenizer, "encode"),
    (ChatTemplate, "encode"),
    (completions_module, "begin"),
    (resume_module, "_hash"),
    (StreamKey, "draw"),
    (completions_module, "plan"),
    (chat_module, "plan"),
    (planning_module, "_max_tokens"),
    (planning_module, "_submit"),
    (planning_module, "_sampling"),
    (planning_module, "_check"),
    (StreamMemory, "begin"),
    (StreamMemory, "add"),
    (StreamRecord, "note"),
    (Completion, "chunks"),
    (Completion, "body"),
    (ChatCompletion, "chunks"),
    (ChatCompletion, "body"),
    (completions_module, "run"),
    (generation_module, "merge"),
    (generation_module, "_next"),
    (generation_module, "_deltas"),
    (generation_module, "_all_outputs"),
    (generation_module, "_outputs"),
    (generation_module, "_observe"),
    (CoordinatorPool, "generate"),
    (Resubmission, "judge"),
    (IncrementalDetokenizer, "push"),
    (ChoiceText, "feed"),
    (Untold, "feed"),
    (FrontMetrics, "choice_ended"),
    (UsageCount, "count"),
    (UsageCount, "usage"),
    (Completion, "_choice"),
    (Answer, "add"),
    (Head, "body"),
    (Beginning, "event_ids"),
    (EventIds, "at"),
    (streaming_module, "frame"),
    (streaming_module, "_send"),
    (streaming_module.EventStream, "_run"),
]
# Not what a function can do that raises: to have begun a request and not say so, or to leave a coroutine that it was
# given unawaited.
NOT = [(Gate, "_begin", True), (Account, "begin", True), (http_module, "unless_gone", False)]
SWEEP = [one for fault in FAULTS for after in (False, True) if (one := (*fault, after)) not in NOT]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    write_byte_tokenizer(path, VOCAB)
    return path


class Golden(ScriptedCoordinator):
    """Holds the sequence of one tenant after its third token until `go`."""

    def __init__(self, model_dir: Path) -> None:
        super().__init__(saying(load_tokenizer(model_dir).encode(SAID, add_bos=False), EOS_ID))
        self.standing = asyncio.Event()
        self.go = asyncio.Event()

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        place = 0
        async for output in super().generate(submit):
            if submit.tenant == "golden" and place == 3:
                self.standing.set()
                await self.go.wait()
            place += 1
            yield output


def asks() -> list[tuple[str, dict[str, Any]]]:
    """Both endpoints, whole and as a stream; and two choices at once."""
    bodies: list[tuple[str, dict[str, Any]]] = []
    for stream in (False, True):
        more = {"model": MODEL, "stream": stream, "max_tokens": 60}
        bodies += [
            (TEXT, {"prompt": "p", **more}),
            (CHAT, {"messages": [{"role": "user", "content": "hi"}], **more}),
        ]
    return [*bodies, (TEXT, {"prompt": "p", "model": MODEL, "max_tokens": 60, "n": 2})]


def text_of(response: httpx2.Response) -> str:
    """What a good answer says, up to the last event."""
    assert response.status_code == 200, response.text
    if response.headers["content-type"].startswith("application/json"):
        choice = response.json()["choices"][0]
        return str(choice.get("text") or choice["message"]["content"])
    datas = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    assert datas.pop() == "[DONE]"
    said = ""
    for data in map(json.loads, datas):
        assert "error" not in data, data
        for choice in data["choices"]:
            said += choice.get("text") or choice.get("delta", {}).get("content") or ""
    return said


def check_failed(response: httpx2.Response) -> None:
    """It failed as a request may: 500 or an error event, of which neither tells anything of our insides."""
    assert "injected" not in response.text
    assert "Traceback" not in response.text
    if response.status_code == 500:
        assert response.json() == {"error": INTERNAL}
        return
    if "error" in response.text:
        *_, event, done, end = response.text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        assert json.loads(event.removeprefix("data: ")) == {"error": INTERNAL}
        return
    assert text_of(response) == SAID, "it raised when all was said"


@pytest.mark.parametrize(
    ("where", "name", "after"),
    SWEEP,
    ids=[f"{one[0].__name__.split('.')[-1]}.{one[1]}-{'after' if one[2] else 'before'}" for one in SWEEP],
)
def test_every_function_of_a_request_may_raise_once(
    model_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    where: Any,
    name: str,
    after: bool,
) -> None:
    caplog.set_level(logging.CRITICAL)
    fault = Fault(where, name, after=after)
    fault.install(monkeypatch)
    coordinator = Golden(model_dir)
    entries = (
        one_key("golden", "golden-" + KEY),
        one_key("other", KEY, concurrency=1, requests_per_minute=1000, tokens_per_minute=10**6),
    )
    front = make_front(model_dir, coordinator, keys=Keys(None, entries))

    async def work() -> None:
        transport = httpx2.ASGITransport(app=create_app(front))
        async with httpx2.AsyncClient(transport=transport, base_url="http://octavo") as client:

            async def ask(path: str, body: dict[str, Any], key: str = KEY) -> httpx2.Response:
                return await client.post(path, json=body, headers={"Authorization": f"Bearer {key}"})

            golden = asyncio.create_task(ask(*asks()[2], key="golden-" + KEY))
            await coordinator.standing.wait()
            for path, body in asks():
                before, fault.left = fault.calls, 1
                response = await ask(path, body)
                fault.left = 0
                if fault.calls > before:
                    check_failed(response)
                assert text_of(await ask(path, body)) == SAID, "and again, now that nothing raises"
            coordinator.go.set()
            assert text_of(await golden) == SAID
        assert fault.calls, f"{name} is not on the way of any request"

    run(work())
    assert "octavo_http_requests_inflight 0.0" in front.metrics.render().decode()
    assert {account.running for account in front.accounts._accounts.values()} == {0}
