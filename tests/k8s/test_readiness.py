"""Who is ready, who gets HTTP, and how many may be away at once."""

import contextlib
import inspect
import os
import re
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile

import pytest
import yaml

from tests.support.manifests import (
    K8S,
    OVERLAYS,
    component,
    groups,
    kustomize,
    of_kind,
    one_of_kind,
    overlay,
    ray_container,
)

SERVE_LABEL = "metadata.labels['ray.io/serve']"


@pytest.mark.parametrize("name", OVERLAYS)
def test_probes_ask_ports_and_paths_that_need_no_token(name: str) -> None:
    from ray.dashboard import http_server_agent, http_server_head

    public = inspect.getsource(http_server_agent) + inspect.getsource(http_server_head)
    for spec in groups(name).values():
        container = ray_container(spec)
        ports = {one["name"] for one in container["ports"]}
        for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
            if "httpGet" not in container[kind]:
                continue
            asked = container[kind]["httpGet"]
            assert asked["port"] in ports
            if asked["port"] != "serve":
                assert f'"{asked["path"]}"' in public
    for spec in groups(name).values():
        readiness = ray_container(spec)["readinessProbe"]
        if component(spec) == "coordinator":
            assert readiness["httpGet"] == {"path": "/-/healthz", "port": "serve"}, "a worker that is ready gets HTTP"
        elif component(spec) == "expert":
            script = readiness["exec"]["command"][2]
            (path,) = re.findall(r"GET (\S+) HTTP", script)
            assert f'"{path}"' in public
            (port,) = [one for one in ray_container(spec)["ports"] if one["name"] == "dashboard-agent"]
            assert f"/127.0.0.1/{port['containerPort']} " in script


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize(
    ("label", "answer", "ready"),
    [
        ("false", "success", True),
        ("false", "no", False),
        ("false", None, False),
        ("true", "success", False),
        ("", "success", False),
    ],
)
def test_a_pod_of_experts_is_ready_only_where_it_gets_no_http(
    name: str, label: str, answer: str | None, ready: bool
) -> None:
    """The very script, with bash; `label` is what KubeRay or `ready-experts` has made of ray.io/serve."""
    for spec in groups(name).values():
        if component(spec) != "expert":
            continue
        (variable,) = [one for one in ray_container(spec)["env"] if one["name"] == "GETS_HTTP"]
        assert variable["valueFrom"] == {"fieldRef": {"fieldPath": SERVE_LABEL}}
        with raylet_that_says(answer) as port:
            command = [
                part.replace("/52365 ", f"/{port} ")
                for part in ray_container(spec)["readinessProbe"]["exec"]["command"]
            ]
            done = subprocess.run(
                command, env={"GETS_HTTP": label, "PATH": os.environ["PATH"]}, timeout=120, check=False
            )
        assert (done.returncode == 0) == ready


@contextmanager
def raylet_that_says(answer: str | None) -> Iterator[int]:
    """A server that answers one GET so; with None nobody listens, nor gets that port meanwhile. Yields its port."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if answer is None:
            yield port
            return
        server.listen()

        def serve() -> None:
            with contextlib.suppress(OSError):
                connection, _ = server.accept()
                with connection, connection.makefile("rb") as received:
                    # bash writes line by line: closed before the blank line is read, it would reset the connection
                    asked = b"".join(takewhile(lambda line: line.strip(), received)).decode()
                    said = answer if asked.startswith("GET /api/local_raylet_healthz HTTP/1.0") else "what?"
                    connection.sendall(f"HTTP/1.0 200 OK\r\nContent-Length: {len(said)}\r\n\r\n{said}".encode())

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield port
        finally:
            with contextlib.suppress(OSError):
                server.shutdown(socket.SHUT_RDWR)  # who was not asked waits no longer
            thread.join()


def test_the_policy_sets_the_label_of_experts_and_of_nobody_else() -> None:
    policy, binding = yaml.safe_load_all(kustomize(K8S / "ready-experts"))
    assert binding["spec"] == {"policyName": policy["metadata"]["name"]}
    assert policy["spec"]["failurePolicy"] == "Fail", "a pod whose label was not set would get requests"
    match = policy["spec"]["matchConstraints"]
    assert match["namespaceSelector"]["matchLabels"] == {
        "kubernetes.io/metadata.name": one_of_kind(overlay("ha"), "Namespace")["metadata"]["name"]
    }
    wanted = match["objectSelector"]["matchLabels"].items()
    for name in OVERLAYS:
        chosen = {component(g) for g in groups(name).values() if wanted <= g["template"]["metadata"]["labels"].items()}
        assert chosen == {"expert"}
    (mutation,) = policy["spec"]["mutations"]
    assert 'escapeKey("ray.io/serve"), value: "false"' in mutation["jsonPatch"]["expression"]


def test_budgets_let_one_go_at_a_time_and_none_forbids_a_drain() -> None:
    """A budget over pods that are never ready would forbid every eviction, but for AlwaysAllow."""
    budgets = of_kind(overlay("ha"), "PodDisruptionBudget")
    covered: Counter[str] = Counter()
    for budget in budgets:
        assert budget["spec"]["maxUnavailable"] == 1
        for spec in groups("ha").values():
            if budget["spec"]["selector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items():
                covered[spec.get("groupName", "head")] += 1
                if component(spec) == "expert":
                    assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"
    assert covered == dict.fromkeys(groups("ha"), 1)
    assert groups("ha")["coordinators"]["replicas"] == 2
