"""Every command in k8s/README.md is one that can be typed: octavo's are parsed, kubectl's are about what there is."""

import re
import shlex
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import typer

import actors
from actors.cli import app
from cluster.config import ClusterConfig
from tests.support.manifests import (
    K8S,
    OVERLAYS,
    ROOT,
    complete,
    containers,
    groups,
    of_kind,
    one_of_kind,
    overlay,
    pod_specs,
    serve_config,
)

TEXT = (K8S / "README.md").read_text()
PLACEHOLDERS = {"POD", "NAME", "REGISTRY", "URL"}
KUBERAYS_LABELS = {"ray.io/node-type": {"head", "worker"}}
VERBS = {"apply", "get", "exec", "logs", "port-forward", "create", "label", "run", "drain", "delete", "cp"}


def blocks() -> list[str]:
    """Code that is typed into a shell, with continued lines joined."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    found = [block for language, block in fenced if not language]
    return [line.strip() for block in found for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def inline() -> list[str]:
    """Commands within the prose, which may be broken over lines."""
    prose = " ".join(re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL).split())
    return [text for text in re.findall("`([^`]+)`", prose) if re.match("(octavo|kubectl|docker) ", text)]


def words(program: str) -> list[list[str]]:
    """Arguments of every call of that program, also within another command."""
    calls = []
    for line in (*blocks(), *inline()):
        parts = shlex.split(re.sub(r"^(\w+)=\$\((.*)\)$", r"\2", line))
        calls += [parts[at + 1 :] for at, part in enumerate(parts) if part == program and _is_called(parts, at)]
    return calls


def _is_called(parts: list[str], at: int) -> bool:
    return at == 0 or parts[at - 1] in ("--", "|")


def until_the_pipe(arguments: list[str]) -> list[str]:
    return arguments[: arguments.index("|")] if "|" in arguments else arguments


def test_octavo_is_called_as_it_can_be() -> None:
    group: Any = typer.main.get_command(app)
    calls = words("octavo")
    assert {call[0] for call in calls} >= {"chat", "status", "verify", "drain-node", "simulate"}
    for call in calls:
        command = group.get_command(None, call[0])
        if call[0] == "keys" and "api_keys_file" not in {field.name for field in fields(ClusterConfig)}:
            continue  # there are no keys here
        assert command is not None, call
        arguments = until_the_pipe([re.sub("^(TRACE|POD)$", "x", part) for part in call[1:]])
        if len(call) == 1:
            continue
        if getattr(command, "commands", None):
            command, arguments = command.commands[arguments[0]], arguments[1:]
        command.make_context(call[0], arguments)  # raises for an option that is not there, or an argument that lacks


def test_kubectl_is_called_about_what_there_is() -> None:
    calls = words("kubectl")
    assert len(calls) >= 12
    spaces = {one_of_kind(overlay("ha"), "Namespace")["metadata"]["name"], "clients"}
    for call in calls:
        if "--" in call:
            call = call[: call.index("--")]
        verb = next(part for part in call if part in VERBS)
        for flag, value in pairwise(call):
            if flag == "-n":
                assert value in spaces, call
            elif flag in ("-k", "-f") and value != "-":
                assert (ROOT / value).exists() or "NAME" in value, call
            elif flag == "-c":
                assert value in container_names(), call
            elif flag == "-l":
                key, _, wanted = value.partition("=")
                assert wanted in KUBERAYS_LABELS[key], call
        if verb == "get" and "rayservice" in call:
            assert call[call.index("rayservice") + 1] == service_name()
        for part in call:
            if part.startswith("svc/"):
                assert part == f"svc/{service_name()}-serve-svc", "the name that KubeRay gives"
            if part.startswith("--image="):
                assert part.endswith(f"octavo:{actors.__version__}")


def test_the_secret_and_the_label_are_those_that_are_asked_for() -> None:
    secrets = set(re.findall(r"create secret generic (\S+)", TEXT))
    needed = {
        volume["secret"]["secretName"]
        for _, pod in pod_specs(complete("gpu"))
        for volume in pod["volumes"]
        if "secret" in volume
    }
    assert secrets == needed | {"octavo-metrics-key"}
    (label,) = set(re.findall(r"octavo\.dev/client=(\w+)", TEXT))
    (http,) = [one for one in of_kind(overlay("gpu"), "NetworkPolicy") if one["metadata"]["name"] == "octavo-http"]
    (rule,) = http["spec"]["ingress"]
    assert rule["from"] == [{"namespaceSelector": {"matchLabels": {"octavo.dev/client": label}}}]


def test_addresses_are_those_of_the_service() -> None:
    space = one_of_kind(overlay("gpu"), "Namespace")["metadata"]["name"]
    port = serve_config("gpu")["http_options"]["port"]
    for host, found_port in re.findall(r"http://([\w.-]+):(\d+)", TEXT):
        assert (host, int(found_port)) == (f"{service_name()}-serve-svc.{space}", port)
    for local, remote in re.findall(r"port-forward svc/\S+ (\d+):(\d+)", TEXT):
        assert int(remote) == int(local) == port


def test_images_are_built_as_the_dockerfile_says() -> None:
    targets = set(re.findall(r" AS (\w+)$", (K8S / "Dockerfile").read_text(), re.MULTILINE))
    arguments = set(re.findall(r"^ARG (\w+)", (K8S / "Dockerfile").read_text(), re.MULTILINE))
    builds = words("docker")
    assert len(builds) >= 3
    for call in builds:
        for flag, value in pairwise(call):
            if flag == "--target":
                assert value in targets
            elif flag == "--build-arg":
                assert value.partition("=")[0] in arguments
            elif flag == "-t":
                tag = value.rpartition(":")[2]
                assert tag == actors.__version__ + ("-cuda" if "cuda" in call else "")
    assert set(re.findall(r"--build-arg (\w+)=", TEXT)) <= arguments


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_table_of_overlays_counts_their_pods(name: str) -> None:
    (row,) = re.findall(rf"^\| `{name}` \| .* \| (.*) \|$", TEXT, re.MULTILINE)
    experts = [spec for group, spec in groups(name).items() if group.startswith("experts")]
    if name == "autoscale":
        (only,) = experts
        assert row == f"{only['minReplicas']} to {only['maxReplicas']} expert pods"
        return
    (coordinators,) = re.findall(r"(\d+) coordinators?", row)
    assert int(coordinators) == groups(name)["coordinators"]["replicas"]
    (times, each) = map(int, re.findall(r"(\d+) × (\d+) expert", row)[0])
    pods = sum(spec["replicas"] for spec in experts)
    assert pods in (times, times * each)


def container_names() -> set[str]:
    return {one["name"] for name in OVERLAYS for _, pod in pod_specs(overlay(name)) for one in containers(pod)}


def service_name() -> str:
    return str(one_of_kind(overlay("gpu"), "RayService")["metadata"]["name"])
