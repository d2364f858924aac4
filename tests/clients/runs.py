"""Runs a client's script in the client's environment, once, and says how each of its checks went."""

import ast
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.clients.environments import ClientEnvironment

SCRIPTS = Path(__file__).with_name("scripts")
RESULT = "RESULT "
TIMEOUT_S = 480.0
"""Of one script."""

# Nothing may go to a proxy or to the hubs that some clients like to ask at import.
_ENVIRONMENT = {
    "OPENAI_API_KEY": "none",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "PYTHONUNBUFFERED": "1",
}
_LEFT_OUT = ("PYTHONPATH", "http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one check went: passed, failed, or unsupported by the server; `text` says why."""

    outcome: str
    text: str


@dataclass(frozen=True, slots=True)
class Client:
    """A client: its environment's name, and the script that uses it."""

    environment: str
    script: str

    @property
    def checks(self) -> list[str]:
        """The names of the script's checks, in order, read and not run."""
        tree = ast.parse((SCRIPTS / self.script).read_text())
        return [one.name for one in tree.body if isinstance(one, ast.FunctionDef) and one.name.startswith("check_")]

    def run(self, server: Mapping[str, Any]) -> dict[str, Outcome]:
        """The outcome of each check; all that did not come to an end failed, with what the process said last."""
        scratch = Path(str(server["scratch"]))
        command = [
            str(ClientEnvironment(self.environment).python),
            str(SCRIPTS / self.script),
            json.dumps(dict(server)),
        ]
        kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
        environ = kept | _ENVIRONMENT | {"HF_HOME": str(scratch / "hf"), "XDG_CACHE_HOME": str(scratch / "cache")}
        said = scratch / "said.txt"
        with said.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=environ, cwd=scratch
            )
            try:
                process.wait(TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        text = said.read_text(errors="replace")
        results = [json.loads(line.removeprefix(RESULT)) for line in text.splitlines() if line.startswith(RESULT)]
        found = {one["check"]: Outcome(one["outcome"], one["text"]) for one in results}
        unended = Outcome("failed", f"exit status {process.returncode}; said last:\n{text[-4000:]}")
        return {name: found.get(name, unended) for name in self.checks}
