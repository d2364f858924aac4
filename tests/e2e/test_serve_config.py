"""The same cluster through Ray Serve's own command and a Serve config, as KubeRay would start it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx2 as httpx
import psutil
import pytest
import yaml

from tests.support.pki import make_pki
from tests.support.served_cluster import START_TIMEOUT_S, environment, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "k8s" / "overlays" / "cpu-demo" / "serve-config.yaml"


def test_the_demo_overlays_serve_config_starts_the_cluster(tmp_path: Path, tiny_model: Path) -> None:
    """With mutual TLS, as in Kubernetes; only places are others: ports, the model, the certificate's files."""
    config = yaml.safe_load(CONFIG.read_text())
    port = free_port()
    config["http_options"] = {"host": "127.0.0.1", "port": port}
    pki = make_pki(tmp_path / "pki", names=("octavo.internal",))
    tls = {"tls_cert": "node.crt", "tls_key": "node.key", "tls_ca": "ca.crt"}
    config["applications"][0]["args"] |= {field: str(pki / file) for field, file in tls.items()}
    config["applications"][0]["args"] |= {"model": str(tiny_model), "experts_per_actor": 4}
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(Path(sys.executable).parent / "serve"), "run", str(tmp_path / "serve.yaml")],
            env=environment(tmp_path),
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
        )
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, tmp_path / "log")
        body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=200)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == 4
        assert [one["id"] for one in httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=120).json()["data"]] == [
            "tiny"
        ]
    finally:
        family = [*psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGINT)
        process.wait(200)
    _, alive = psutil.wait_procs(family, timeout=240)
    assert not alive, alive


def wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            if httpx.get(url, timeout=30).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)
