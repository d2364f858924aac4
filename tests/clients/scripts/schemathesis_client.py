"""schemathesis on the server's own OpenAPI document: nothing undeclared comes back. In an environment of its own."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

from checking import Server, Unsupported, main

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
# Always the same cases: what fails here fails everywhere, and again. Other cases are the campaign's (`make fuzz`).
MAX_EXAMPLES = 25
SECONDS = 200
LEAST_CASES = 300
LEAST_STREAMS = 2
HOOKS = """
import os
from pathlib import Path

import schemathesis


@schemathesis.hook
def after_call(context, case, response):
    kinds = {name.lower(): value for name, value in response.headers.items()}.get("content-type", ["none"])
    with Path("kinds.txt").open("a") as kept:
        kept.write(f"{response.status_code} {kinds[0]}\\n")


@schemathesis.hook
def map_body(context, body):
    # Names the model that is there, or all but 404 is out of reach; and keeps answers short.
    if isinstance(body, dict):
        if isinstance(body.get("model"), str):
            body["model"] = os.environ["OCTAVO_TEST_MODEL"]
        for name, most in (("max_tokens", 8), ("max_completion_tokens", 8), ("min_tokens", 4), ("n", 2)):
            if isinstance(body.get(name), int) and body[name] > most:
                body[name] = most
    return body
"""


def document_of(server):
    """The OpenAPI document."""
    try:
        with urllib.request.urlopen(f"{server.url}/openapi.json", timeout=120) as page:
            return json.load(page)
    except urllib.error.HTTPError as error:
        raise Unsupported(f"/openapi.json answers {error.code}") from None


def check_the_document_has_every_route(server: Server) -> None:
    paths = document_of(server)["paths"]
    wanted = {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"}
    assert wanted <= set(paths), sorted(wanted - set(paths))


def check_nothing_undeclared_comes_back(server: Server) -> None:
    document_of(server)
    folder = Path(server.scratch)
    (folder / "aiming.py").write_text(HOOKS)
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"]
    ended = subprocess.run(
        [
            *command,
            *("--checks", ",".join(CHECKS), "--max-examples", str(MAX_EXAMPLES), "--generation-deterministic"),
            *("--phases", "examples,coverage,fuzzing", "--request-timeout", "60", "--seed", "1", "--workers", "1"),
            *("--suppress-health-check", "all", "--continue-on-failure", "--no-color", "--no-shrink"),
        ],
        cwd=folder,
        env={
            **os.environ,
            "SCHEMATHESIS_HOOKS": "aiming",
            "PYTHONPATH": str(folder),
            "OCTAVO_TEST_MODEL": server.model,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    said = ended.stdout
    assert ended.returncode == 0 or is_the_tools_own_trouble(said), said[-6000:] + ended.stderr[-2000:]
    counts = re.search(r"(\d+) generated, (\d+) passed", said)
    assert counts is not None, said[-3000:]
    assert counts[1] == counts[2], said[-6000:]
    assert int(counts[1]) >= LEAST_CASES, said[-3000:]
    kinds = Counter((folder / "kinds.txt").read_text().splitlines())
    streams = sum(count for kind, count in kinds.items() if kind.startswith("200 text/event-stream"))
    assert streams >= LEAST_STREAMS, kinds
    print(f"{counts[1]} cases, {streams} of them streams, seen to be as declared")


def is_the_tools_own_trouble(said):
    """Python 3.11 may fail to parse at some depths of recursion: a generator of cases then breaks, no case is wrong.

    See python/cpython issue 106905.
    """
    errors = re.findall(r"^ *🚫? *([A-Z][\w ]*Error): (\d+)$", said, re.M)
    known = said.count("AST constructor recursion depth mismatch")
    return "FAILURES" not in said and known > 0 and all(kind == "Runtime Error" for kind, _ in errors)


if __name__ == "__main__":
    main(globals())
