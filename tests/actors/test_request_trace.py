"""The span of an HTTP request, through the real application over scripted coordinators."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from starlette.types import Message, Receive, Scope, Send

from actors.front.front_door import FrontDoor
from actors.front.request_trace import Traced, current
from actors.tracing.tracer import Tracer
from protos.expert_pb2 import STATUS_INVALID
from tests.support.front import ask, make_front, post, run
from tests.support.scripted_coordinator import ScriptedCoordinator, failing, saying

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
SECRET = "the prompt that nobody else may read"
CHAT = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 4, "user": "somebody"}


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Iterator[Tracer]:
    one = Tracer(exporter, {"service.name": "test"})
    yield one
    one.close()


@pytest.fixture
def coordinator() -> ScriptedCoordinator:
    return ScriptedCoordinator(saying([100, 101, 102, 103]))


@pytest.fixture
def front(tmp_path: Path, tracer: Tracer, coordinator: ScriptedCoordinator) -> FrontDoor:
    return make_front(tmp_path, coordinator, spans=tracer)


def spans(exporter: InMemorySpanExporter, tracer: Tracer) -> list[ReadableSpan]:
    tracer.flush()
    return list(exporter.get_finished_spans())


def only(exporter: InMemorySpanExporter, tracer: Tracer) -> tuple[ReadableSpan, dict[str, Any]]:
    (span,) = spans(exporter, tracer)
    return span, dict(span.attributes or {})


def test_a_chat_is_a_span_under_its_caller(
    front: FrontDoor, tracer: Tracer, exporter: InMemorySpanExporter, coordinator: ScriptedCoordinator
) -> None:
    body = {**CHAT, "model": "tiny", "temperature": 0.5, "top_p": 0.9, "seed": 3, "n": 2}
    answer = ask(front, lambda client: client.post("/v1/chat/completions", json=body, headers=CALLER))
    assert answer.status_code == 200
    span, said = only(exporter, tracer)
    assert span.name == "POST /v1/chat/completions"
    assert span.parent is not None
    assert (f"{span.parent.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE_ID, PARENT_ID)
    usage = answer.json()["usage"]
    assert said["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert said["gen_ai.usage.output_tokens"] == usage["completion_tokens"] == 8
    assert said["gen_ai.response.finish_reasons"] == ("length", "length")
    assert 0 < said["gen_ai.latency.time_to_first_token"] <= said["gen_ai.latency.e2e"]
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 4,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.request.seed": 3,
        "gen_ai.request.choice.count": 2,
        "gen_ai.request.stream": False,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert {name: said.get(name) for name in expected} == expected
    assert span.context is not None
    assert {submit.traceparent for submit in coordinator.submits} == {f"00-{TRACE_ID}-{span.context.span_id:016x}-01"}


def test_a_span_says_nothing_of_texts_and_users(
    front: FrontDoor, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    post(front, "/v1/chat/completions", **CHAT, stop=["a secret stop"], stream=True)
    post(front, "/v1/completions", prompt=SECRET, max_tokens=2)
    said = json.dumps([span.to_json() for span in spans(exporter, tracer)])
    assert "text_completion" in said
    for hidden in (SECRET, "secret", "somebody"):
        assert hidden not in said


def test_a_stream_is_over_when_its_last_byte_is_out(
    front: FrontDoor, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    assert "[DONE]" in post(front, "/v1/completions", prompt="x", max_tokens=4, stream=True).text
    span, said = only(exporter, tracer)
    assert span.status.is_unset
    assert said["gen_ai.request.stream"] is True
    assert said["gen_ai.usage.output_tokens"] == 4


def test_a_refusal_is_no_error_of_the_server(front: FrontDoor, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    assert post(front, "/v1/completions", prompt="x", temperature=9).status_code == 400
    span, said = only(exporter, tracer)
    assert span.status.is_unset
    assert said["http.response.status_code"] == 400
    assert "gen_ai.usage.output_tokens" not in said


def test_a_failure_in_mid_stream_is_an_error(tmp_path: Path, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    broken = ScriptedCoordinator(failing(STATUS_INVALID, "something", after=[100, 101]))
    answer = post(make_front(tmp_path, broken, spans=tracer), "/v1/completions", prompt="x", max_tokens=4, stream=True)
    assert (answer.status_code, '"error"' in answer.text) == (200, True)
    span, said = only(exporter, tracer)
    assert not span.status.is_ok
    assert said["error.type"]


def test_a_client_that_leaves_is_an_error_of_its_own(tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert current() is not None
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"a piece", "more_body": True})

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [], "scheme": "http"}
    run(Traced(app, spans=tracer)(scope, receive, send))
    _, said = only(exporter, tracer)
    assert said["error.type"] == "client_disconnected"
    assert current() is None


def test_other_paths_and_methods_have_no_span(front: FrontDoor, tracer: Tracer, exporter: InMemorySpanExporter) -> None:
    for path in ("/health", "/metrics", "/v1/models", "/v1/completions", "/none"):
        ask(front, lambda client, path=path: client.get(path))  # type: ignore[misc]
    assert spans(exporter, tracer) == []


def test_a_caller_that_does_not_sample_is_answered_without_a_span(
    front: FrontDoor, tracer: Tracer, exporter: InMemorySpanExporter, coordinator: ScriptedCoordinator
) -> None:
    headers = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    assert ask(front, lambda client: client.post("/v1/completions", json=body, headers=headers)).status_code == 200
    assert spans(exporter, tracer) == []
    assert [submit.traceparent for submit in coordinator.submits] == [""]


def test_without_a_tracer_there_is_no_layer_and_no_header(tmp_path: Path, coordinator: ScriptedCoordinator) -> None:
    front = make_front(tmp_path, coordinator)
    body = {"model": "tiny", "prompt": "x", "max_tokens": 2}
    assert ask(front, lambda client: client.post("/v1/completions", json=body, headers=CALLER)).status_code == 200
    assert [submit.traceparent for submit in coordinator.submits] == [""]


GLOBAL = """
import pathlib, sys
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from tests.support.front import make_front, post
from tests.support.scripted_coordinator import ScriptedCoordinator, saying

exporter, reader, provider = InMemorySpanExporter(), InMemoryMetricReader(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
front = make_front(pathlib.Path(sys.argv[1]), ScriptedCoordinator(saying([100, 101])))
assert post(front, "/v1/completions", prompt="a secret", max_tokens=2).status_code == 200
assert post(front, "/v1/completions", prompt=["a secret", 5.5]).status_code == 400
assert exporter.get_finished_spans() == ()
assert reader.get_metrics_data() is None
"""


def test_nobody_elses_providers_are_told_of_requests(tmp_path: Path) -> None:
    """FastAPI would tell them, and Ray sets some in its workers."""
    command = [sys.executable, "-c", GLOBAL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
