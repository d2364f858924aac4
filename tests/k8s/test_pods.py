"""Pods and code agree: ports, environment, roles, memory, times; and nobody may do more than it needs."""

import inspect
import json
import mmap
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._private import ray_constants
from ray.serve._private import constants as serve_constants

import actors
from actors import local_ray
from actors.coordinator.actor import Coordinator
from actors.expert.actor import ExpertActor
from cluster.config import ClusterConfig
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST, is_role
from tests.support.manifests import (
    K8S,
    OVERLAYS,
    Object,
    cluster_args,
    complete,
    component,
    containers,
    groups,
    of_kind,
    one_of_kind,
    overlay,
    pod_specs,
    quantity,
    ray_container,
    ray_service,
    ray_start_params,
    serve_config,
    weights_loader,
)

RAY_ENDS_WITHIN_S = 10
LITERAL_SECRET = re.compile(r"TOKEN(?!IZER)|PASSWORD|SECRET|_KEY$|CREDENTIAL", re.IGNORECASE)
PEM = "-----" + "BEGIN"


# ---- ports --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_port_is_one_that_is_opened_and_the_other_way_round(name: str) -> None:
    opened = {
        "gcs-server": ray_constants.DEFAULT_PORT,
        "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
        "dashboard-agent": ray_constants.DEFAULT_DASHBOARD_AGENT_LISTEN_PORT,
        "serve": serve_config(name)["http_options"]["port"],
    }
    for group, spec in groups(name).items():
        opened["metrics"] = int(spec["rayStartParams"]["metrics-export-port"])
        here = opened if group == "head" else {k: v for k, v in opened.items() if k not in ("gcs-server", "dashboard")}
        declared = ray_container(spec)["ports"]
        assert {one["name"]: one["containerPort"] for one in declared} == here
        assert len(declared) == len(here)


def test_octavos_own_ports_are_drawn_at_start() -> None:
    """So no manifest can name them, and the policy opens all among Octavo's pods, and only there."""
    for kind in (Coordinator, ExpertActor):
        assert inspect.signature(kind).parameters["port"].default == 0
    for name in OVERLAYS:
        (inside,) = [
            one for one in of_kind(overlay(name), "NetworkPolicy") if one["metadata"]["name"] == "octavo-inside"
        ]
        (rule,) = inside["spec"]["ingress"]
        assert "ports" not in rule
        assert rule["from"] == [{"podSelector": inside["spec"]["podSelector"]}]


# ---- environment --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_variable_means_something_to_somebody(name: str) -> None:
    ours = {f"OCTAVO_{field.name.upper()}" for field in fields(ClusterConfig)}
    libraries = {"OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM", "RAY_USAGE_STATS_ENABLED", "XDG_CACHE_HOME"}
    serve_source = Path(serve_constants.__file__).read_text()
    for group, spec in pod_specs(overlay(name)):
        for container in containers(spec):
            names = [one["name"] for one in container.get("env", ())]
            assert len(set(names)) == len(names), group
            for variable in set(names) - libraries - ours - {ray._raylet.NODE_ZONE_ENV, "GETS_HTTP"}:
                known = f'"{variable}"' in serve_source if variable.startswith("RAY_SERVE_") else in_raylet(variable)
                assert known, f"{group}: nobody reads {variable}"


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_front_door_runs_on_one_loop_as_in_a_local_cluster(name: str) -> None:
    for _, spec in pod_specs(overlay(name)):
        for container in containers(spec):
            env = {one["name"]: one.get("value") for one in container.get("env", ())}
            if local_ray.HTTP_PROXY_CALLBACK in env.values():
                assert [env.get(variable) for variable in local_ray.ONE_LOOP] == ["0", "0"]


def in_raylet(variable: str) -> bool:
    """Ray's C++ settings are RAY_<name of the setting>, compiled into the raylet."""
    setting = variable.removeprefix("RAY_").encode()
    with (Path(ray.__file__).parent / "core/src/ray/raylet/raylet").open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ).find(b"\0" + setting + b"\0") >= 0


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_is_written_down(name: str) -> None:
    objects = complete(name)
    assert not of_kind(objects, "Secret")
    assert cluster_args(name).get("auth_token") is None
    for group, spec in pod_specs(objects):
        for container in containers(spec):
            for one in container.get("env", ()):
                assert not (LITERAL_SECRET.search(one["name"]) and "value" in one), (group, one["name"])
    for path in K8S.rglob("*"):
        if path.is_file():
            assert PEM not in path.read_text(), path


@pytest.mark.parametrize("name", OVERLAYS)
def test_rays_own_token_is_asked_for(name: str) -> None:
    assert ray_service(name)["rayClusterConfig"]["authOptions"] == {"mode": "token"}


# ---- versions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_images_carry_our_version_and_rays(name: str) -> None:
    tag = actors.__version__ if name == "cpu-demo" else f"{actors.__version__}-cuda"
    images = {container["image"] for _, spec in pod_specs(overlay(name)) for container in containers(spec)}
    assert images == {f"octavo:{tag}"}
    assert ray_service(name)["rayClusterConfig"]["rayVersion"] == ray.__version__


# ---- who goes where -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_groups_have_the_roles_that_placement_knows(name: str) -> None:
    for spec in groups(name).values():
        ((role, amount),) = json.loads(ray_start_params(spec)["resources"]).items()
        assert amount >= 1
        wanted = {"coordinator": COORDINATOR_HOST, "expert": EXPERT_HOST}.get(component(spec))
        if wanted is None:
            assert is_role(role), "the head's: a role that nobody has"
            assert role not in (COORDINATOR_HOST, EXPERT_HOST)
        else:
            assert role == wanted


@pytest.mark.parametrize("name", OVERLAYS)
def test_groups_are_of_sizes_that_can_be(name: str) -> None:
    workers = {group: spec for group, spec in groups(name).items() if group != "head"}
    assert len(workers) == len(ray_service(name)["rayClusterConfig"]["workerGroupSpecs"])
    for spec in workers.values():
        assert 1 <= spec["minReplicas"] <= spec["replicas"] <= spec["maxReplicas"]
    assert workers["coordinators"]["replicas"] >= cluster_args(name)["coordinators"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_labels_are_what_selectors_select(name: str) -> None:
    objects = complete(name)
    pods = [spec["template"]["metadata"]["labels"] for spec in groups(name).values()]
    selectors: list[Object] = [one["spec"]["podSelector"] for one in of_kind(objects, "NetworkPolicy")]
    for kind in ("PodDisruptionBudget", "PodMonitor"):
        selectors += [one["spec"]["selector"] for one in of_kind(objects, kind)]
    for spec in groups(name).values():
        for constraint in spec["template"]["spec"].get("topologySpreadConstraints", ()):
            wanted = constraint["labelSelector"]["matchLabels"]
            assert wanted.items() <= spec["template"]["metadata"]["labels"].items()
    for selector in selectors:
        assert set(selector) == {"matchLabels"}
        assert any(selector["matchLabels"].items() <= labels.items() for labels in pods), selector


# ---- times --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_draining_is_over_before_anybody_loses_patience(name: str) -> None:
    """drain_timeout_s < what drain-node may take < where it is cut off < SIGKILL, less what Ray takes to end."""
    given = ClusterConfig(**cluster_args(name))
    for spec in groups(name).values():
        pod = spec["template"]["spec"]
        (cut, cut_s, *command) = ray_container(spec)["lifecycle"]["preStop"]["exec"]["command"]
        assert (cut, command[:2]) == ("timeout", ["octavo", "drain-node"])
        options = dict(zip(command[2::2], command[3::2], strict=True))
        assert known_options("drain-node", list(options))
        assert given.drain_timeout_s < float(options["--timeout"]) < float(cut_s)
        assert 0 < float(options["--settle"]) < float(options["--timeout"])
        assert float(cut_s) + RAY_ENDS_WITHIN_S < pod["terminationGracePeriodSeconds"]
        assert given.namespace == defaults_of("drain-node")["namespace"], "where it looks for the supervisor"
        assert serve_config(name)["http_options"]["port"] == defaults_of("drain-node")["http_port"]
    assert ray_service(name)["upgradeStrategy"]["type"] == "NewCluster"
    assert given.request_timeout_s < ray_service(name)["rayClusterDeletionDelaySeconds"]


# ---- what nobody may ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OVERLAYS)
def test_nobody_may_more_than_it_needs(name: str) -> None:
    objects = overlay(name)
    accounts = {one["metadata"]["name"]: one for one in of_kind(objects, "ServiceAccount")}
    enforced = one_of_kind(objects, "Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert enforced == "restricted"
    user = int(re.findall(r"^USER (\d+):\d+$", (K8S / "Dockerfile").read_text(), re.MULTILINE)[-1])
    for group, pod in pod_specs((*objects, weights_loader())):
        assert pod["automountServiceAccountToken"] is False, group
        assert accounts[pod["serviceAccountName"]]["automountServiceAccountToken"] is False
        security = pod["securityContext"]
        assert security["runAsNonRoot"], group
        assert security["runAsUser"] == user != 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(pod):
            assert locked(container["securityContext"]), (group, container["name"])
    if (options := ray_service(name)["rayClusterConfig"].get("autoscalerOptions")) is not None:
        assert locked(options["securityContext"])


def locked(security: Object) -> bool:
    return (
        security["allowPrivilegeEscalation"] is False
        and security["readOnlyRootFilesystem"] is True
        and security["capabilities"] == {"drop": ["ALL"]}
    )


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_is_written_goes_to_volumes_with_a_limit(name: str) -> None:
    writable = {"/tmp", "/home/octavo", "/dev/shm"}  # Ray's session, caches, Ray's object store
    for group, pod in pod_specs((*overlay(name), weights_loader())):
        volumes = {one["name"]: one for one in pod["volumes"]}
        assert len(volumes) == len(pod["volumes"])
        for container in containers(pod):
            mounts = container["volumeMounts"]
            assert len({one["mountPath"] for one in mounts}) == len(mounts)
            own = {one["mountPath"] for one in mounts if not one.get("readOnly")}
            allowed = writable | ({"/models"} if group in ("octavo-demo-model", "octavo-weights") else set())
            assert own <= allowed, (group, own)
            for mount in mounts:
                assert mount["name"] in volumes
                if mount["mountPath"] in writable:
                    assert quantity(volumes[mount["name"]]["emptyDir"]["sizeLimit"]) > 0
    for spec in groups(name).values():
        assert {m["mountPath"] for m in ray_container(spec)["volumeMounts"] if not m.get("readOnly")} == writable
        (shm,) = [v for v in spec["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["emptyDir"]["medium"] == "Memory"
        assert quantity(shm["emptyDir"]["sizeLimit"]) >= int(spec["rayStartParams"]["object-store-memory"])


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_container_says_what_it_takes(name: str) -> None:
    for group, pod in pod_specs((*overlay(name), weights_loader())):
        for container in containers(pod):
            resources = container["resources"]
            assert set(resources["requests"]) >= {"cpu", "memory"}, (group, container["name"])
            assert resources["limits"]["memory"] == resources["requests"]["memory"], "memory is never overcommitted"
            assert "cpu" not in resources["limits"], "a throttled expert is a slow expert"


@pytest.mark.parametrize("name", OVERLAYS)
def test_weights_are_looked_at_where_they_are_served_from(name: str) -> None:
    for spec in groups(name).values():
        pod = spec["template"]["spec"]
        (init,) = pod["initContainers"]
        command = list(init["command"])
        assert command[:2] == ["octavo", "verify"]
        assert command[-1] == cluster_args(name)["model"]
        assert known_options("verify", command[2:-1])
        (mount,) = [one for one in init["volumeMounts"] if one["name"] == "models"]
        assert mount["readOnly"]
        assert command[-1].startswith(mount["mountPath"] + "/")
        (volume,) = [one for one in pod["volumes"] if one["name"] == "models"]
        claim = one_of_kind(overlay(name), "PersistentVolumeClaim")["metadata"]["name"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim, "readOnly": True}


def test_weights_are_put_where_the_pods_look_for_them() -> None:
    pod = weights_loader()
    objects = overlay("gpu")
    assert pod["metadata"]["namespace"] == one_of_kind(objects, "Namespace")["metadata"]["name"]
    (container,) = pod["spec"]["containers"]
    assert container["image"] == f"octavo:{actors.__version__}"
    (volume,) = [one for one in pod["spec"]["volumes"] if "persistentVolumeClaim" in one]
    claim = one_of_kind(objects, "PersistentVolumeClaim")["metadata"]["name"]
    assert volume["persistentVolumeClaim"] == {"claimName": claim}, "not read-only"
    (mount,) = [one for one in container["volumeMounts"] if one["name"] == volume["name"]]
    assert Path(cluster_args("gpu")["model"]).parent == Path(mount["mountPath"])


def test_the_demo_model_is_made_where_it_is_served_from() -> None:
    from actors.command.demo_model import SMOLLM2

    job = one_of_kind(overlay("cpu-demo"), "Job")["spec"]["template"]["spec"]
    (make,) = job["containers"]
    (cache,) = [one["value"] for one in make["env"] if one["name"] == "XDG_CACHE_HOME"]
    assert os.path.join(cache, "octavo", SMOLLM2.name) == cluster_args("cpu-demo")["model"]
    assert make["command"][:2] == ["octavo", "verify"]
    assert known_options("verify", make["command"][2:])
    claim = quantity(
        one_of_kind(overlay("cpu-demo"), "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"]
    )
    assert claim > SMOLLM2.disk_bytes


def known_options(command: str, options: list[str]) -> bool:
    return set(options) <= {option for parameter in parameters_of(command) for option in parameter.opts}


def defaults_of(command: str) -> dict[str, Any]:
    return {parameter.name: parameter.default for parameter in parameters_of(command)}


def parameters_of(command: str) -> list[Any]:
    import typer

    from actors.cli import app

    group: Any = typer.main.get_command(app)
    return list(group.commands[command].params)


# ---- disruption, autoscaling --------------------------------------------------------------------------------


def test_only_the_autoscaler_talks_to_kubernetes() -> None:
    cluster = ray_service("autoscale")["rayClusterConfig"]
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    tokens = [volume for volume in cluster["headGroupSpec"]["template"]["spec"]["volumes"] if "projected" in volume]
    mounts = {one["name"] for one in cluster["autoscalerOptions"]["volumeMounts"]}
    assert [one["name"] for one in tokens] == ["kubernetes-token"]
    assert "kubernetes-token" in mounts
    for _, pod in pod_specs(overlay("autoscale")):
        for container in containers(pod):
            assert "kubernetes-token" not in {one["name"] for one in container["volumeMounts"]}
    for name in OVERLAYS:
        if name != "autoscale":
            assert not ray_service(name)["rayClusterConfig"].get("enableInTreeAutoscaling")


def test_hot_experts_have_room_to_grow() -> None:
    experts = groups("autoscale")["experts"]
    assert experts["maxReplicas"] > experts["minReplicas"]
    assert experts["idleTimeoutSeconds"] > ClusterConfig(**cluster_args("autoscale")).drain_timeout_s
    limits = {key: value for key, value in cluster_args("autoscale").items() if key.endswith("_expert_hosts")}
    assert limits in ({}, {"min_expert_hosts": experts["minReplicas"], "max_expert_hosts": experts["maxReplicas"]})


def test_the_head_outlives_its_restart_in_ha() -> None:
    cluster = ray_service("ha")["rayClusterConfig"]
    assert cluster["gcsFaultToleranceOptions"]["backend"] == "rocksdb"
    for spec in groups("ha").values():
        environment = {one["name"]: one.get("value") for one in ray_container(spec)["env"]}
        assert environment["RAY_gcs_rpc_server_reconnect_timeout_s"] == "600"
