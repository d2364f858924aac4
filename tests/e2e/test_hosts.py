"""A rehearsal of Kubernetes without it: three machines in network namespaces run `ray start` as the pods do.

One is Ray's head with the coordinator and the front door, two are for experts. The demo overlay's own Serve config is
started on them, with mutual TLS between all; one machine loses its network under load, and gets it back.
"""

import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.support.manifests import K8S, ROOT, groups, ray_container, ray_start_params
from tests.support.network_hosts import Host, NetworkHosts, NoNamespaces
from tests.support.pki import make_pki

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

BIN = Path(sys.executable).parent
SERVE_CONFIG = K8S / "overlays" / "cpu-demo" / "serve-config.yaml"
RAY_TOKEN = "a-ray-token-of-this-test-only-0123456789"
START_TIMEOUT_S = 300.0
BACK_TIMEOUT_S = 300.0
ANSWER_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 200.0
ATTEMPTS = 3
AWAY_S = 12.0  # longer than a connection is believed in without an answer
PROMPTS = ("Hello", "The quick brown fox", "Once upon a time")


@dataclass(frozen=True)
class Machines:
    """The three machines, and who should run on them. `pods` are those for experts, which run again if they end."""

    network: NetworkHosts
    head: Host
    experts: tuple[Host, Host]
    env: dict[str, str]
    directory: Path
    pki: Path
    pods: "dict[Host, subprocess.Popen[bytes]]" = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://{self.head.address}:8000"

    def start_pods(self) -> None:
        """On each machine for experts where none runs, as Kubernetes does with one whose Ray has given up."""
        for host in self.experts:
            if host not in self.pods or self.pods[host].poll() is not None:
                self.pods[host] = self.ray_start(host, "experts")

    def ray_start(self, host: Host, group: str) -> "subprocess.Popen[bytes]":
        """`ray start` with the parameters of a group of pods, written out as KubeRay writes them."""
        spec = groups("cpu-demo")[group]
        parameters = ray_start_params(spec)
        if host is self.head:  # here the head is for coordinators, too
            others = ray_start_params(groups("cpu-demo")["coordinators"])
            roles = json.loads(parameters["resources"]) | json.loads(others["resources"])
            parameters |= {"include-dashboard": "false", "num-cpus": others["num-cpus"], "resources": json.dumps(roles)}
        else:
            parameters["address"] = f"{self.head.address}:6379"
        options = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in parameters.items()]
        where = ["--head"] if host is self.head else []
        command = [str(BIN / "ray"), "start", *where, *options]
        env = self.env | {one["name"]: one["value"] for one in ray_container(spec)["env"] if "value" in one}
        return host.start(command, env, self.directory / f"ray-{host.address}.log", ROOT)

    def ask(self, prompt: str, num_tokens: int = 48) -> str:
        """A greedy completion, through HTTP, from the head's machine."""
        body = {"model": "tiny", "prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
        reply = httpx.post(f"{self.url}/v1/completions", json=body, timeout=ANSWER_TIMEOUT_S)
        assert reply.status_code == 200, reply.text
        return str(reply.json()["choices"][0]["text"])

    def healthy_replicas(self) -> int:
        """Expert replicas that the coordinator finds in order, as the metrics say."""
        reply = httpx.get(f"{self.url}/metrics", timeout=20)
        if reply.status_code != 200:
            return 0
        for family in text_string_to_metric_families(reply.text):
            for sample in family.samples:
                if sample.name == "octavo_expert_replicas" and sample.labels["state"] == "healthy":
                    return int(sample.value)
        return 0

    def status(self) -> dict[str, Any]:
        """`octavo status --json`, typed on the head."""
        command = [sys.executable, "-m", "actors.cli", "status", "--json", "--address", f"{self.head.address}:6379"]
        return dict(json.loads(self.head.run(command, self.env, COMMAND_TIMEOUT_S)))

    def ray_nodes(self) -> set[str]:
        """Addresses of the machines that Ray's head believes to be alive."""
        said = f"from actors import ray_runtime as r; r.connect('{self.head.address}:6379', 'octavo'); "
        said += "print(*(node.address for node in r.nodes()))"
        return set(self.head.run([sys.executable, "-c", said], self.env, COMMAND_TIMEOUT_S).split())

    def until(self, holds: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not self.head.call(lambda: _quietly(holds)).result(ANSWER_TIMEOUT_S):
            assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}\n{self.logs()}"
            time.sleep(0.3)
            if self.pods:
                self.start_pods()

    def logs(self) -> str:
        return "\n".join(f"== {log.name}\n{log.read_text()[-3000:]}" for log in sorted(self.directory.glob("*.log")))


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Three machines without anything on them. Whatever is started there is ended."""
    try:
        network = NetworkHosts(3, tmp_path)
    except NoNamespaces as error:
        pytest.skip(str(error))
    head, *experts = network.hosts
    pki = make_pki(tmp_path / "pki", names=("octavo.internal",))
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": RAY_TOKEN,
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    try:
        yield Machines(network, head, (experts[0], experts[1]), env, tmp_path, pki)
    finally:
        network.close()


def serve_config_for(machines: Machines, model: Path) -> Path:
    """The demo overlay's file with a tiny model, two copies of everything, and this test's certificates."""
    config = yaml.safe_load(SERVE_CONFIG.read_text())
    tls = {"tls_cert": "node.crt", "tls_key": "node.key", "tls_ca": "ca.crt"}
    changes = {"model": str(model), "replicas": 2, "experts_per_actor": 4, "kv_cache_bytes": 1 << 26}
    changes |= {field: str(machines.pki / name) for field, name in tls.items()}
    config["applications"][0]["args"] |= changes
    path = machines.directory / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Flow:
    """Requests one after another, as long as it is told to go on; every answer must be the one without a fault."""

    def __init__(self, machines: Machines, expected: dict[str, str]) -> None:
        self._machines = machines
        self._expected = expected
        self._stop = threading.Event()
        self.answered = 0
        self.wrong: list[str] = []
        self.slowest_s = 0.0
        self._running = machines.network.hosts[0].call(self._run)

    def _run(self) -> None:
        while not self._stop.is_set():
            for prompt, text in self._expected.items():
                began_s = time.monotonic()
                if self._machines.ask(prompt) != text:
                    self.wrong.append(prompt)
                self.slowest_s = max(self.slowest_s, time.monotonic() - began_s)
                self.answered += 1

    def end(self) -> None:
        """Raises what a request raised."""
        self._stop.set()
        self._running.result(len(self._expected) * ANSWER_TIMEOUT_S)


def test_a_machine_loses_its_network_and_gets_it_back(machines: Machines, tiny_model: Path) -> None:
    near, far = machines.experts
    machines.ray_start(machines.head, "head")
    machines.until(lambda: reachable(machines.head.address, 6379), START_TIMEOUT_S, "Ray's head")
    machines.start_pods()
    command = [str(BIN / "serve"), "run", str(serve_config_for(machines, tiny_model))]
    env = machines.env | {"RAY_ADDRESS": f"{machines.head.address}:6379"}
    machines.head.start(command, env, machines.directory / "serve.log", ROOT)
    machines.until(lambda: machines.healthy_replicas() == 4, START_TIMEOUT_S, "four replicas are healthy")

    first = machines.status()
    assert {host_of(one) for one in first["coordinators"]} == {machines.head.address}
    copies: dict[tuple[int, ...], set[str]] = {}
    for one in first["replicas"]:
        copies.setdefault(tuple(one["expert_ids"]), set()).add(host_of(one))
    assert list(copies.values()) == [{near.address, far.address}] * 2, "each copy on a machine of its own"
    assert_mutual_tls(machines, first["replicas"][0]["address"])
    for host in machines.experts:
        machines.until(lambda there=host: probe_holds(there), START_TIMEOUT_S, "the probe's question is answered")  # type: ignore[misc]

    expected = {
        prompt: machines.head.call(lambda p=prompt: machines.ask(p)).result(ANSWER_TIMEOUT_S) for prompt in PROMPTS
    }
    flow = Flow(machines, expected)
    machines.network.pull(far)
    pulled_s = time.monotonic()
    wait_for_answers(flow, 6)
    while time.monotonic() < pulled_s + AWAY_S:
        wait_for_answers(flow, 1)
    machines.network.plug(far)
    flow.end()
    assert not flow.wrong
    machines.until(lambda: machines.healthy_replicas() == 4, BACK_TIMEOUT_S, "both copies of all experts again")
    for _ in range(ATTEMPTS):  # Ray may find out only now that the machine was away, and give it up then
        machines.until(lambda: far.address in machines.ray_nodes(), BACK_TIMEOUT_S, "Ray has the machine again")
        lose_a_replica_on(near, machines)
        used = {host_of(one) for one in machines.status()["replicas"]}
        if far.address in used:
            break
    assert far.address in used, "and is used again"
    for prompt, text in expected.items():
        assert machines.head.call(lambda p=prompt: machines.ask(p)).result(ANSWER_TIMEOUT_S) == text
    print(f"{flow.answered} answers while the machine was away, the slowest after {flow.slowest_s:.1f} s")


def reachable(address: str, port: int) -> bool:
    with socket.create_connection((address, port), timeout=2):
        return True


def probe_holds(host: Host) -> bool:
    """What the pods' probe asks for, asked there."""
    url = f"http://{host.address}:52365/api/local_raylet_healthz"
    return host.call(lambda: httpx.get(url, timeout=20)).result(60).status_code == 200


def _quietly(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except (OSError, httpx.HTTPError, subprocess.SubprocessError):
        return False


def host_of(row: dict[str, Any]) -> str:
    return str(row["address"]).rpartition(":")[0]


def assert_mutual_tls(machines: Machines, address: str) -> None:
    """The expert's port shows the one certificate, and says no to whoever shows none."""
    host, port = address.rsplit(":", 1)
    ca, own = machines.pki / "ca.crt", (machines.pki / "node.crt", machines.pki / "node.key")

    def hello(certificate: bool) -> bytes:
        context = ssl.create_default_context(cafile=str(ca))
        context.set_alpn_protocols(["h2"])
        if certificate:
            context.load_cert_chain(*map(str, own))
        with (
            socket.create_connection((host, int(port)), timeout=100) as plain,
            context.wrap_socket(plain, server_hostname="octavo.internal") as secret,
        ):
            try:  # who is refused may have been hung up on already
                secret.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
                return secret.recv(64)
            except (ssl.SSLError, ConnectionError):
                return b""

    assert machines.head.call(lambda: hello(True)).result(120), "HTTP/2 answers"
    assert not machines.head.call(lambda: hello(False)).result(120), "nothing is said to whoever has no certificate"


def wait_for_answers(flow: Flow, more: int) -> None:
    wanted, deadline = flow.answered + more, time.monotonic() + ANSWER_TIMEOUT_S
    while flow.answered < wanted:
        assert time.monotonic() < deadline, f"only {flow.answered} answers"
        time.sleep(0.1)


def lose_a_replica_on(host: Host, machines: Machines) -> None:
    """SIGKILL to one that runs there; returns when there are four again, and it is none of them."""
    victim = next(one for one in machines.status()["replicas"] if host_of(one) == host.address)
    os.kill(victim["pid"], signal.SIGKILL)

    def replaced() -> bool:
        now = machines.status()["replicas"]
        return all(one["state"] == "ready" and one["pid"] != victim["pid"] for one in now)

    machines.until(replaced, BACK_TIMEOUT_S, "the loss is noticed, and made good")
    machines.until(lambda: machines.healthy_replicas() == 4, BACK_TIMEOUT_S, "four replicas are healthy again")
