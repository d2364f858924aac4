"""The demo overlay's pods, all of them, in containers: they serve, and one goes without anybody noticing.

`make image-check` runs this; scheduling, the Service and network policies are not rehearsed.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2 as httpx
import pytest

from tests.support.manifests import (
    Object,
    cluster_args,
    groups,
    quantity,
    ray_container,
    ray_start_params,
    serve_config,
)
from tests.support.pod_machines import Image, make_manifest, make_volumes, network
from tests.support.pods import Pod

pytestmark = [pytest.mark.timeout(1500)]

START_TIMEOUT_S = 400.0
SETTLE_S = 8.0


@dataclass(frozen=True)
class Cluster:
    """The demo overlay's pods: head, coordinator and the experts', each a machine of its own in the network."""

    pods: dict[str, Pod]
    token: str

    @property
    def head(self) -> Pod:
        return self.pods["head"]

    @property
    def coordinator(self) -> Pod:
        return self.pods["coordinators-0"]

    @property
    def experts(self) -> list[Pod]:
        return [pod for name, pod in self.pods.items() if name.startswith("experts")]

    def ask(self, method: str, port: int, path: str, body: Object | None = None) -> httpx.Response:
        """Asks the head's dashboard, or the front door (port 8000) in the coordinator's pod."""
        pod = self.coordinator if port == 8000 else self.head
        headers = {} if port == 8000 else {"Authorization": f"Bearer {self.token}"}
        url = f"http://{pod.host.address}:{port}{path}"
        asked = pod.host.call(lambda: httpx.request(method, url, json=body, headers=headers, timeout=60))
        return asked.result(90)

    def status(self) -> Object:
        """`octavo status --json`, typed in the head's pod as the README says."""
        done = self.head.exec(["octavo", "status", "--json", "--address", "auto"])
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout))

    def until(self, holds: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not _quietly(holds):
            for pod in self.pods.values():
                assert pod.is_running(), f"{pod.name} has ended:\n{pod.log.read_text()[-3000:]}"
            logs = "\n".join(f"== {pod.name}\n{pod.log.read_text()[-1500:]}" for pod in self.pods.values())
            assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}\n{logs}"
            time.sleep(0.5)


def test_the_demo_overlay_serves_in_its_own_pods(cpu_image: Image, cluster: Cluster) -> None:
    """The manifests' own Serve config, handed over as KubeRay does; then a pod of experts is taken away."""
    cluster.until(lambda: cluster.head.passes("readinessProbe"), "the head is ready")
    assert cluster.head.passes("livenessProbe")
    cluster.until(lambda: all(pod.passes("startupProbe") for pod in cluster.experts), "the experts' pods have started")
    cluster.until(lambda: cluster.coordinator.passes("startupProbe"), "the coordinator's pod has started")
    assert not cluster.coordinator.passes("readinessProbe"), "it has no proxy yet"

    handed = cluster.ask("PUT", 8265, "/api/serve/applications/", serve_config("cpu-demo"))
    assert handed.status_code == 200, handed.text
    assert cluster.ask("GET", 8265, "/api/serve/applications/").status_code == 200
    cluster.until(lambda: cluster.ask("GET", 8000, "/health").status_code == 200, "it serves")
    assert cluster.coordinator.passes("readinessProbe")
    body = {"model": model_name(), "prompt": "Hello", "max_tokens": 32, "temperature": 0, "ignore_eos": True}
    first = cluster.ask("POST", 8000, "/v1/completions", body)
    assert first.status_code == 200, first.text
    text = first.json()["choices"][0]["text"]

    where = {one["address"].rpartition(":")[0] for one in cluster.status()["replicas"]}
    assert where == {pod.host.address for pod in cluster.experts}, "experts are with the experts"
    for pod in cluster.experts:
        assert pod.passes("readinessProbe"), "the Service does not choose it"
    going, staying = cluster.experts
    hook_s, end_s, words = going.end()
    assert "nothing runs here any more" in words, words
    assert SETTLE_S - 1 <= hook_s < 45
    cluster.pods.pop(going.name)
    after = cluster.status()
    assert {one["address"].rpartition(":")[0] for one in after["replicas"]} == {staying.host.address}
    assert after["state"] == "ready", "everything was elsewhere before the pod went"
    again = cluster.ask("POST", 8000, "/v1/completions", body)
    assert (again.status_code, again.json()["choices"][0]["text"]) == (200, text)
    print(f"preStop took {hook_s:.1f} s, the end {end_s:.1f} s")
    for pod in cluster.pods.values():
        limit = quantity(ray_container(pod.group)["resources"]["limits"]["memory"])
        print(f"{pod.name}: {pod.memory_bytes() / 2**20:.0f} of {limit / 2**20:.0f} MiB")
        for volume in ("tmp", "home"):
            (spec,) = [one for one in pod.spec["volumes"] if one["name"] == volume]
            assert pod.used_bytes(volume) < quantity(spec["emptyDir"]["sizeLimit"]), volume


@pytest.fixture
def cluster(cpu_image: Image, tmp_path: Path) -> Iterator[Cluster]:
    """All pods of the demo overlay, started, with a tiny model where the demo's would be."""
    wanted = [("head", 0), *((name, i) for name, spec in workers() for i in range(spec["replicas"]))]
    volumes, token = make_volumes(tmp_path, "cpu-demo"), secrets.token_hex(32)
    with network(len(wanted), tmp_path) as hosts:
        pods: dict[str, Pod] = {}
        try:
            for host, (group, index) in zip(hosts, wanted, strict=True):
                name = group if group == "head" else f"{group}-{index}"
                pods[name] = Pod(name, host, groups("cpu-demo")[group], cpu_image, volumes, tmp_path / "pods")
            make_manifest(pods["head"])
            for name, pod in pods.items():
                env = kuberay_env(name, pods["head"], token)
                pod.init()
                if name != "head":
                    waited = pod.wait_for_head(pods["head"].host.address, env)
                    assert waited.returncode == 0, waited.stderr
                pod.start(ray_start(pod, pods["head"]), env)
            yield Cluster(pods, token)
        finally:
            for pod in pods.values():
                pod.kill()


def workers() -> list[tuple[str, Object]]:
    return [(name, spec) for name, spec in groups("cpu-demo").items() if name != "head"]


def ray_start(pod: Pod, head: Pod) -> str:
    """The command that KubeRay 1.7 makes of a group's parameters and resources."""
    parameters = ray_start_params(pod.group)
    parameters |= {"dashboard-host": "0.0.0.0"} if pod is head else {"address": f"{head.host.address}:6379"}
    parameters["resources"] = f"'{parameters['resources']}'"
    options = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in parameters.items()]
    return " ".join(["ray", "start", *(["--head"] if pod is head else []), *options])


def kuberay_env(name: str, head: Pod, token: str) -> dict[str, str]:
    """What KubeRay adds, and the label as `ready-experts` leaves it."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_PORT": "6379",
        "RAY_ADDRESS": f"{head.host.address}:6379",
        "RAY_CLOUD_INSTANCE_ID": name,
        "RAY_TIMEOUT_MS_TASK_WAIT_FOR_DEATH_INFO": "0",
        "GETS_HTTP": "false" if name == "head" or name.startswith("experts") else "true",
    }


def model_name() -> str:
    return Path(cluster_args("cpu-demo")["model"]).name


def _quietly(holds: Callable[[], bool]) -> bool:
    try:
        return holds()
    except (OSError, httpx.HTTPError):
        return False
