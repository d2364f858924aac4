"""One trace from HTTP to the experts and back, over real sockets into a real OTLP receiver; and into a dead one."""

from pathlib import Path
from typing import Any

import openai
import pytest

from actors.coordinator.sequence_traces import SPAN
from actors.front.http_app import create_app
from tests.support.checkpoints import write_mixtral
from tests.support.front import run, serving
from tests.support.otlp_receiver import receiving
from tests.support.served_cluster import free_port
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = {"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"}
LAYERS = 2


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mixtral with a tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    write_mixtral(path, layers=LAYERS)
    write_byte_tokenizer(path, 300)
    return path


def answers(model_dir: Path, **config: Any) -> list[str]:
    """What the cluster says to one request that is traced by its caller, and to eight at once."""

    async def work() -> list[str]:
        async with (
            tiny_cluster(model_dir, **config) as cluster,
            serving(create_app(cluster.front)) as url,
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        ):
            asked: dict[str, Any] = {"model": "tiny", "prompt": "The fox", "max_tokens": 8, "seed": 1}
            more = {"ignore_eos": True}
            one = await client.completions.create(**asked, extra_body=more, extra_headers=CALLER)
            many = await client.completions.create(**asked, n=8, extra_body=more)
            return [choice.text for choice in (*one.choices, *many.choices)]

    return run(work())


def test_a_trace_goes_from_http_to_the_experts(model_dir: Path) -> None:
    plain = answers(model_dir)
    with receiving() as receiver:
        assert answers(model_dir, otlp_endpoint=receiver.url) == plain
        receiver.wait(lambda now: len(now.named(SPAN)) == 9 and len(now.named("POST /v1/completions")) == 2)
        spans = list(receiver.spans)
        assert b"The fox" not in b"".join(receiver.raw)
    mine = {span.name: span for span in spans if span.trace_id == TRACE_ID}
    assert set(mine) == {"POST /v1/completions", SPAN, "queue", "prefill", "decode"}
    http, whole = mine["POST /v1/completions"], mine[SPAN]
    assert (http.parent_id, whole.parent_id) == (PARENT_ID, http.span_id)
    assert {mine[name].parent_id for name in ("queue", "prefill", "decode")} == {whole.span_id}
    assert http.start_ns <= whole.start_ns <= whole.end_ns <= http.end_ns
    assert (http.resource["service.name"], whole.resource["service.name"]) == ("octavo-ingress", "octavo-coordinator")
    assert whole.resource["service.instance.id"] == "coordinator-0"
    assert http.attributes["gen_ai.usage.output_tokens"] == whole.attributes["gen_ai.usage.output_tokens"] == 8
    decode = mine["decode"].attributes
    assert decode["octavo.steps"] == 7
    assert decode["octavo.expert.messages"] >= 7 * LAYERS, "a step asks at least one replica in every layer"
    assert decode["octavo.expert.wait_s"] > 0
    assert decode["octavo.expert.compute_s"] > 0
    (other,) = [span for span in spans if span.name == http.name and span.trace_id != TRACE_ID]
    under = [span for span in spans if span.name == SPAN and span.parent_id == other.span_id]
    assert (len(under), other.attributes["gen_ai.request.choice.count"], other.parent_id) == (8, 8, "")


def test_a_dead_collector_changes_no_answer(model_dir: Path) -> None:
    assert answers(model_dir, otlp_endpoint=f"http://127.0.0.1:{free_port()}") == answers(model_dir)
