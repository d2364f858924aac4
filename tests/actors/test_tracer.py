"""Spans over a real OTLP receiver: what arrives, whose they are, and that a collector which is away harms nobody."""

import subprocess
import sys
import threading
import time

import pytest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from actors.tracing.opening import is_traced, open_tracer
from actors.tracing.tracer import CLOSE_TIMEOUT_S, Span, Tracer
from cluster.config import ClusterConfig, ConfigError
from tests.support.otlp_receiver import receiving
from tests.support.served_cluster import free_port

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
RESOURCE = {"service.name": "octavo-test"}
CONFIG = ClusterConfig(model="m")
PATIENT_S = 100.0
"""A collector that is there is waited for, however slow the machine is."""


def begun(tracer: Tracer, headers: dict[str, str]) -> Span:
    span = tracer.server_span("asked", headers, {"a": 1}, start_ns=10**18)
    assert span is not None
    return span


def test_spans_arrive_under_their_callers() -> None:
    with receiving() as receiver:
        tracer = Tracer.to(receiver.url, RESOURCE)
        span = begun(tracer, CALLER)
        span.child("part", 10**18 + 5, 10**18 + 7, {"b": ["x", "y"], "c": 0.5})
        span.set({"d": True})
        traceparent = span.traceparent
        span.end(10**18 + 9)
        tracer.close(PATIENT_S)
        (asked,), (part,) = receiver.named("asked"), receiver.named("part")
    assert (asked.trace_id, asked.parent_id, part.trace_id, part.parent_id) == (
        TRACE_ID,
        PARENT_ID,
        TRACE_ID,
        asked.span_id,
    )
    assert traceparent == f"00-{TRACE_ID}-{asked.span_id}-01"
    assert (asked.attributes, asked.is_error) == ({"a": 1, "d": True}, False)
    assert part.attributes == {"b": ["x", "y"], "c": 0.5}
    assert [asked.start_ns, part.start_ns, part.end_ns, asked.end_ns] == [10**18 + at for at in (0, 5, 7, 9)]
    assert asked.resource["service.name"] == "octavo-test"


def test_an_error_is_said_by_its_kind() -> None:
    with receiving() as receiver:
        tracer = Tracer.to(receiver.url, RESOURCE)
        begun(tracer, {}).end(error="timeout")
        tracer.close(PATIENT_S)
        (asked,) = receiver.spans
    assert asked.is_error
    assert asked.attributes["error.type"] == "timeout"
    assert asked.parent_id == ""


@pytest.mark.parametrize("header", ["", "nonsense", f"00-{'0' * 32}-{PARENT_ID}-01", f"ff-{TRACE_ID}-{PARENT_ID}-01"])
def test_a_header_that_is_none_begins_a_trace_of_its_own(header: str) -> None:
    tracer = Tracer(InMemorySpanExporter(), RESOURCE)
    made = begun(tracer, {"traceparent": header}).traceparent
    assert TRACE_ID not in made
    assert int(made[-2:], 16) & 1, "sampled"
    tracer.close()


def test_a_caller_that_does_not_sample_gets_no_span() -> None:
    tracer = Tracer(InMemorySpanExporter(), RESOURCE)
    assert tracer.server_span("asked", {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-00"}, {}) is None
    tracer.close()


def test_the_queue_is_bounded_while_the_collector_is_away() -> None:
    """Ending a span never waits for the collector, and what does not fit the queue is dropped."""
    with receiving() as receiver:
        receiver.status = 503
        tracer = Tracer.to(receiver.url, RESOURCE)
        for _ in range(20_000):
            begun(tracer, {}).end()
        receiver.status = 200
        tracer.close(PATIENT_S)
        assert 0 < len(receiver.spans) <= 2048 + 512, "a queue, and a batch that was on its way"


def test_closing_does_not_wait_for_a_collector_that_is_dead() -> None:
    tracer = Tracer.to(f"http://127.0.0.1:{free_port()}", RESOURCE)
    begun(tracer, {}).end()
    began_s = time.monotonic()
    tracer.close()
    assert time.monotonic() - began_s < CLOSE_TIMEOUT_S + 10
    assert all(thread.daemon for thread in threading.enumerate() if "Otel" in thread.name)


def test_an_endpoint_may_be_the_whole_path() -> None:
    with receiving() as receiver:
        tracer = Tracer.to(f"{receiver.url}/v1/traces", RESOURCE)
        begun(tracer, {}).end()
        tracer.close(PATIENT_S)
        assert len(receiver.spans) == 1


def test_spans_are_off_until_somebody_says_where_they_go() -> None:
    assert not is_traced(CONFIG, {})
    assert open_tracer(CONFIG, "ingress", "i", {}) is None
    here = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318"}
    assert is_traced(CONFIG, here)
    assert is_traced(CONFIG, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318/v1/traces"})
    assert is_traced(ClusterConfig(model="m", otlp_endpoint="http://127.0.0.1:4318"), {})
    assert not is_traced(CONFIG, {**here, "OTEL_SDK_DISABLED": "true"})
    assert not is_traced(CONFIG, {**here, "OTEL_TRACES_EXPORTER": "none"})
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL is 'grpc'"):
        is_traced(CONFIG, {**here, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"})


def test_a_process_says_which_it_is() -> None:
    with receiving() as receiver:
        config = ClusterConfig(model="m", otlp_endpoint=receiver.url, namespace="house")
        for environ in ({}, {"OTEL_SERVICE_NAME": "mine"}):
            tracer = open_tracer(config, "ingress", "i-1", environ)
            assert tracer is not None
            begun(tracer, {}).end()
            tracer.close(PATIENT_S)
        names = [span.resource["service.name"] for span in receiver.spans]
        assert names == ["octavo-ingress", "mine"]
        assert {span.resource["service.instance.id"] for span in receiver.spans} == {"i-1"}
        assert {span.resource["service.namespace"] for span in receiver.spans} == {"house"}


@pytest.mark.parametrize("url", ["ftp://host", "http://u:p@host:4318", "host:4318", "http://host/?a=b", ""])
def test_an_endpoint_must_be_a_plain_url(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint") as refused:
        ClusterConfig(model="m", otlp_endpoint=url)
    assert "u:p" not in str(refused.value)


OFF = """
import sys
import actors.coordinator.actor, actors.front.http_app
from actors.tracing.opening import open_tracer
from cluster.config import ClusterConfig
assert open_tracer(ClusterConfig(model="m"), "ingress", "i", {}) is None
ours = ("opentelemetry.sdk", "opentelemetry.exporter", "actors.tracing.tracer")  # FastAPI itself looks for the API
assert not [name for name in sys.modules if name.startswith(ours)]
"""
MISSING = """
import sys
sys.modules["opentelemetry.exporter"] = None
from actors.tracing.opening import is_traced
from cluster.config import ClusterConfig, ConfigError
assert not is_traced(ClusterConfig(model="m"), {})
try:
    is_traced(ClusterConfig(model="m", otlp_endpoint="http://h:1"), {})
except ConfigError as error:
    assert "octavo[otel]" in str(error), error
else:
    raise AssertionError("not refused")
"""


@pytest.mark.parametrize("program", [OFF, MISSING], ids=["off", "missing"])
def test_opentelemetry_is_not_needed_where_spans_are_off(program: str) -> None:
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
