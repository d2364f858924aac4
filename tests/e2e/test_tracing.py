"""`octavo serve --otlp-endpoint`: the processes of a real cluster tell a real collector of one request together."""

from pathlib import Path

import pytest

from actors.coordinator.sequence_traces import SPAN
from tests.support.otlp_receiver import receiving
from tests.support.served_cluster import ServedCluster

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

TRACE_ID, PARENT_ID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_served_cluster_tells_of_a_request(tmp_path: Path, tiny_model: Path) -> None:
    with receiving() as receiver:
        served = ServedCluster(tmp_path, tiny_model, "--otlp-endpoint", receiver.url, "--experts-per-actor", "4")
        try:
            answer = served.client().completions.create(
                model="tiny",
                prompt="The door",
                max_tokens=6,
                seed=1,
                extra_body={"ignore_eos": True},
                extra_headers={"traceparent": f"00-{TRACE_ID}-{PARENT_ID}-01"},
            )
            assert answer.usage is not None
            # Every few seconds what there is is sent. At the end, too, but then nobody waits for long.
            receiver.wait(lambda now: {"POST /v1/completions", SPAN, "decode"} <= {span.name for span in now.spans})
        finally:
            assert served.stop() == 0
    spans = {span.name: span for span in receiver.spans if span.trace_id == TRACE_ID}
    http, whole = spans["POST /v1/completions"], spans[SPAN]
    assert (http.parent_id, whole.parent_id) == (PARENT_ID, http.span_id)
    assert (http.resource["service.name"], whole.resource["service.name"]) == ("octavo-ingress", "octavo-coordinator")
    assert whole.attributes["gen_ai.usage.output_tokens"] == answer.usage.completion_tokens == 6
    assert spans["decode"].attributes["octavo.expert.messages"] > 0
