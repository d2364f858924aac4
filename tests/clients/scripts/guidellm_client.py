"""guidellm: a short benchmark with its own synthetic prompts and its own report. Runs in an environment of its own."""

import json
import subprocess
import sys
from pathlib import Path

from checking import Server, main

REQUESTS, STREAMS, PROMPT_TOKENS, OUTPUT_TOKENS = 16, 4, 32, 16


def benchmark(server, request_format):
    """The report of a run over one of the API's endpoints."""
    report = Path(server.scratch) / f"{request_format.strip('/').replace('/', '-')}.json"
    settings = {
        "backend": {
            "kind": "openai_http",
            "target": server.url,
            "model": server.model,
            "request_format": request_format,
        },
        "profile": {"kind": "concurrent", "streams": [STREAMS]},
        "constraints": [{"kind": "max_requests", "count": REQUESTS}],
        "tokenizer": {"kind": "huggingface_auto", "model": server.model_dir},
        "data": [{"kind": "synthetic_text", "prompt_tokens": PROMPT_TOKENS, "output_tokens": OUTPUT_TOKENS}],
        "outputs": [{"kind": "json", "path": str(report)}],
    }
    scenario = Path(server.scratch) / "scenario.json"
    scenario.write_text(json.dumps({"spec": settings}))
    command = [sys.executable, "-m", "guidellm", "run", "--config", str(scenario), "--disable-progress"]
    ended = subprocess.run(command, cwd=server.scratch, capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return json.loads(report.read_text())


def hold(report):
    (found,) = report["benchmarks"]
    totals = found["metrics"]["request_totals"]
    assert totals["errored"] == 0, totals
    assert totals["successful"] == REQUESTS, totals
    for request in found["requests"]["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT_TOKENS, request["output_metrics"]


def check_a_benchmark_of_chat_has_no_error(server: Server) -> None:
    hold(benchmark(server, "/v1/chat/completions"))


def check_a_benchmark_of_completions_has_no_error(server: Server) -> None:
    hold(benchmark(server, "/v1/completions"))


if __name__ == "__main__":
    main(globals())
