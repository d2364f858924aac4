"""What `kubectl kustomize` makes of k8s/, as plain values, and the parts of it that tests ask for again and again."""

import functools
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
OVERLAYS = ("cpu-demo", "gpu", "ha", "autoscale")
ON_GPUS = ("gpu", "ha", "autoscale")

Object = dict[str, Any]

_UNITS = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "": 1}


def kustomize(path: Path) -> str:
    """The manifests of a kustomization as text; skips the test where there is no kubectl."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not installed")
    made = subprocess.run(["kubectl", "kustomize", str(path)], capture_output=True, text=True, timeout=200, check=False)
    assert made.returncode == 0, made.stderr
    assert not made.stderr.strip(), made.stderr  # deprecated fields, patches without a target
    return made.stdout


@functools.cache
def overlay(name: str) -> tuple[Object, ...]:
    """The objects of an overlay. Shared between tests: not to be changed."""
    return tuple(yaml.safe_load_all(kustomize(K8S / "overlays" / name)))


@functools.cache
def with_components(name: str, *components: str) -> tuple[Object, ...]:
    """The objects of a kustomization that adds components of k8s/ to an overlay."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "k8s"
        shutil.copytree(K8S, copy)
        (copy / "more").mkdir()
        listed = [f"../{component}" for component in components]
        content = {"resources": [f"../overlays/{name}"], "components": listed}
        (copy / "more" / "kustomization.yaml").write_text(yaml.safe_dump(content))
        return tuple(yaml.safe_load_all(kustomize(copy / "more")))


def weights_loader() -> Object:
    """The pod that is applied by itself."""
    return dict(yaml.safe_load((K8S / "weights-loader.yaml").read_text()))


def complete(name: str) -> tuple[Object, ...]:
    """The objects of an overlay with the components that it leaves out."""
    watched = any(one["kind"] == "PodMonitor" for one in overlay(name))
    more = ("components/cert-manager", "components/api-keys", "components/tracing")
    return with_components(name, *(() if watched else ("observability",)), *more)


def of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    """Those of a kind, by name."""
    found = [one for one in objects if one["kind"] == kind]
    return sorted(found, key=lambda one: str(one["metadata"]["name"]))


def one_of_kind(objects: tuple[Object, ...], kind: str) -> Object:
    """The only one of its kind."""
    (found,) = of_kind(objects, kind)
    return found


def ray_service(name: str) -> Object:
    """The spec of an overlay's RayService."""
    return dict(one_of_kind(overlay(name), "RayService")["spec"])


def serve_config(name: str) -> Object:
    """What the RayService of an overlay hands to Serve."""
    return dict(yaml.safe_load(ray_service(name)["serveConfigV2"]))


def cluster_args(name: str) -> Object:
    """The arguments of ClusterConfig in an overlay."""
    (application,) = serve_config(name)["applications"]
    return dict(application["args"])


def groups(name: str) -> dict[str, Object]:
    """The groups of an overlay's Ray cluster by name: `head`, and the workers'."""
    cluster = ray_service(name)["rayClusterConfig"]
    workers = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"], **workers}


def component(group: Object) -> str:
    """head, coordinator or expert."""
    return str(group["template"]["metadata"]["labels"]["app.kubernetes.io/component"])


def pod_specs(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """All pods, those of Ray groups and jobs among them, as (name, pod spec)."""
    for one in objects:
        if one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            yield "head", cluster["headGroupSpec"]["template"]["spec"]
            for group in cluster["workerGroupSpecs"]:
                yield group["groupName"], group["template"]["spec"]
        elif one["kind"] == "Pod":
            yield one["metadata"]["name"], one["spec"]
        elif one["kind"] == "Job":
            yield one["metadata"]["name"], one["spec"]["template"]["spec"]


def containers(spec: Object) -> list[Object]:
    """Init containers, then the others."""
    return [*spec.get("initContainers", ()), *spec["containers"]]


def ray_container(group: Object) -> Object:
    """The container in which Ray runs."""
    (container,) = group["template"]["spec"]["containers"]
    return dict(container)


def ray_start_params(group: Object) -> dict[str, str]:
    """Parameters of `ray start`, as KubeRay 1.7 makes them of a group: what Ray is told of CPUs, memory and GPUs, and
    `resources`, JSON, of all others.
    """
    made = dict(group["rayStartParams"])
    others = {}
    for name, amount in group["resources"].items():
        parameter = {"cpu": "num-cpus", "memory": "memory", "gpu": "num-gpus"}.get(name.lower())
        if parameter is None:
            others[name] = quantity(amount)
        else:
            made[parameter] = str(int(quantity(amount)))
    made.setdefault("memory", str(int(quantity(ray_container(group)["resources"]["limits"]["memory"]))))
    return {**made, "resources": json.dumps(others), "block": "true"}


def quantity(text: str | int) -> float:
    """Kubernetes' numbers: 4Gi, 100m, 2."""
    shown = str(text)
    number = shown.rstrip("KMGTim")
    return float(number) * _UNITS[shown[len(number) :]]
