"""k8s/README.md names files, commands and figures that are so."""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import pytest
import yaml

from actors.channels import WireCredentials, open_channel, serve_grpc
from actors.ingress import parse_args
from tests.support.front import run
from tests.support.manifests import K8S, OVERLAYS, ROOT, cluster_args, groups, one_of_kind, overlay, ray_service

TEXT = (K8S / "README.md").read_text()
PROSE = " ".join(TEXT.split())
READ_MS = {"L4": 1.47, "A10": 0.73, "A100": 0.22, "H100": 0.13}
RIDGE_TOKENS = {"L4": 302, "A10": 156, "A100": 115, "H100": 221}


def test_files_that_it_names_exist() -> None:
    named = set(re.findall(r"`?(k8s/[\w./-]+|tests/[\w./-]+|cluster/\w+\.py)", TEXT))
    assert len(named) > 6
    for path in named:
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`((?:overlays|components|ready-experts|observability)/?[\w./-]+)`", TEXT):
        if "NAME" not in path:
            assert (K8S / path).exists(), path
    assert set(re.findall(r"^\| `([\w-]+)` \|", TEXT, re.MULTILINE)) == set(OVERLAYS)


def test_figures_that_it_names_are_those_of_the_manifests() -> None:
    service = ray_service("gpu")
    pod = groups("gpu")["experts"]["template"]["spec"]
    assert f"{service['rayClusterDeletionDelaySeconds']} s" in TEXT
    hook = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert f"is cut off after {hook[1]}, and Ray has the rest of {pod['terminationGracePeriodSeconds']}" in PROSE
    assert f"have the rest of {hook[hook.index('--timeout') + 1]} s" in PROSE
    assert f"`drain_timeout_s` is {cluster_args('gpu')['drain_timeout_s']}" in PROSE
    assert str(pod["securityContext"]["runAsUser"]) in TEXT
    assert pod["volumes"][1]["secret"]["secretName"] in TEXT
    assert cluster_args("gpu")["tls_server_name"] in TEXT
    assert one_of_kind(overlay("gpu"), "Namespace")["metadata"]["name"] == "octavo"


def script(first: str) -> str:
    """The block of commands that has this at the start of a line."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in blocks if re.search(f"^{re.escape(first)}", block, re.MULTILINE)]
    return str(found)


def test_the_serve_config_runs_elsewhere_with_the_changes_that_it_says(tmp_path: Path) -> None:
    commands = script("sed -e").replace("mine.yaml", str(tmp_path / "mine.yaml"))
    subprocess.run(["sh", "-ec", commands.replace("serve run", "test -f")], cwd=ROOT, check=True)
    config = yaml.safe_load((tmp_path / "mine.yaml").read_text())
    parsed = parse_args(config["applications"][0]["args"])
    assert config["http_options"]["host"] == "127.0.0.1"
    assert (parsed.model, parsed.tls_cert, parsed.tls_server_name) == ("/path/to/model", None, None)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_certificates_made_as_it_says_let_processes_talk(tmp_path: Path) -> None:
    commands = [line for line in script("openssl req -x509").splitlines() if not line.startswith("kubectl")]
    subprocess.run(["sh", "-ec", "\n".join(commands)], cwd=tmp_path, check=True, capture_output=True, timeout=280)
    files = (str(tmp_path / name) for name in ("tls.crt", "tls.key", "ca.crt"))
    credentials = WireCredentials("a-token-of-this-test", *files, cluster_args("gpu")["tls_server_name"])

    async def work() -> None:
        async def answer(request: bytes, _context: object) -> bytes:
            return request

        def register(server: grpc.aio.Server) -> None:
            methods: Any = {"Once": grpc.unary_unary_rpc_method_handler(answer)}
            server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("octavo.ExpertService", methods),))

        server = await serve_grpc(
            register, service="octavo.ExpertService", host="127.0.0.1", port=0, credentials=credentials
        )
        async with open_channel(server.address, credentials) as channel:
            assert await channel.unary_unary("/octavo.ExpertService/Once")(b"hello", timeout=120) == b"hello"
        await server.stop(0)

    run(work())


@pytest.mark.parametrize("gpu", READ_MS)
def test_the_cost_table_is_its_own_formula(gpu: str) -> None:
    (row,) = re.findall(rf"^\| {gpu} \| (.*) \|$", TEXT, re.MULTILINE)
    assert [int(figure) for figure in row.split(" | ")] == [round(tokens_per_s(gpu, batch)) for batch in (1, 16, 64)]


def tokens_per_s(gpu: str, batch: int, context: int = 2048) -> float:
    """As the page says it: two experts a token of eight, 352 MB an expert in a layer, 8 KiB a token and way."""
    read_ms = READ_MS[gpu]
    expert_ms = read_ms * max(1.0, batch * 2 / 8 / RIDGE_TOKENS[gpu])
    attention_ms = read_ms * (100e6 + batch * context * 4096) / 352e6
    wire_ms = 1.0 + batch * 2 * 8192 * 2 / (25e9 / 8) * 1e3
    return batch / (32 * (expert_ms + attention_ms + wire_ms) / 1e3)
