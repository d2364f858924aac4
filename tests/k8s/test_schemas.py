"""Every overlay builds, and what it builds is what Kubernetes and KubeRay 1.7 accept, to the letter."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.manifests import (
    K8S,
    OVERLAYS,
    ROOT,
    Object,
    complete,
    kustomize,
    of_kind,
    one_of_kind,
    overlay,
    weights_loader,
    with_components,
)

KUBERNETES = ("1.32", "1.37")
SCHEMAS = Path(os.environ.get("OCTAVO_KUBERAY_SCHEMAS", ROOT.parent / "shared" / "data" / "kuberay"))
COMPONENTS = ("observability", "components/cert-manager", "components/api-keys", "components/tracing")
CUSTOM_KINDS = {
    "RayService": "ray.io/v1",
    "PodMonitor": "monitoring.coreos.com/v1",
    "PrometheusRule": "monitoring.coreos.com/v1",
    "Certificate": "cert-manager.io/v1",
    "Issuer": "cert-manager.io/v1",
}


@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_has_one_of_each(name: str) -> None:
    objects = overlay(name)
    keys = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(set(keys)) == len(keys)
    for kind in ("RayService", "Namespace", "PersistentVolumeClaim"):
        one_of_kind(objects, kind)
    spaces = {one["metadata"].get("namespace") for one in objects if one["kind"] != "Namespace"}
    assert spaces == {one_of_kind(objects, "Namespace")["metadata"]["name"]}


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("name", OVERLAYS)
def test_built_in_kinds_are_valid(name: str, version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    checked = 0
    for one in (*complete(name), weights_loader()):
        if one["kind"] in CUSTOM_KINDS:
            assert one["apiVersion"] == CUSTOM_KINDS[one["kind"]]
            continue
        validator.validate(one, version, strict=True)
        checked += 1
    assert checked >= 9


def test_the_policy_is_valid_where_its_kind_is_stable() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    objects = list(yaml.safe_load_all(kustomize(K8S / "ready-experts")))
    assert [one["kind"] for one in objects] == ["MutatingAdmissionPolicy", "MutatingAdmissionPolicyBinding"]
    for version in ("1.36", "1.37"):
        for one in objects:
            assert "namespace" not in one["metadata"], "for the whole cluster"
            validator.validate(one, version, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_in_the_ray_service_are_valid(name: str) -> None:
    """KubeRay's own schema does not look into everything in a pod: Kubernetes' does."""
    validator = pytest.importorskip("kubernetes_validate")
    cluster = one_of_kind(overlay(name), "RayService")["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        validator.validate(pod, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_ray_service_is_kuberays(name: str) -> None:
    validator = schema_of("rayservice_v1.7.0.schema.json")
    service = one_of_kind(overlay(name), "RayService")
    assert not said(validator, service)
    assert said(validator, {**service, "spec": {**service["spec"], "upgradePolicy": {}}}), "the schema is strict"


@pytest.mark.parametrize("name", OVERLAYS)
def test_its_cluster_is_kuberays_too(name: str) -> None:
    validator = schema_of("raycluster_v1.7.0.schema.json")
    spec = one_of_kind(overlay(name), "RayService")["spec"]["rayClusterConfig"]
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "octavo"}, "spec": spec}
    assert not said(validator, cluster)


def test_components_add_what_they_say() -> None:
    plain, more = overlay("cpu-demo"), with_components("cpu-demo", *COMPONENTS)
    added = {(one["kind"], one["metadata"]["name"]) for one in more} - {
        (one["kind"], one["metadata"]["name"]) for one in plain
    }
    assert {kind for kind, _ in added} == {
        *("PodMonitor", "PrometheusRule", "ConfigMap", "NetworkPolicy"),
        *("Certificate", "Issuer"),
    }
    assert len(of_kind(more, "RayService")) == 1


def schema_of(file: str) -> Any:
    jsonschema = pytest.importorskip("jsonschema")
    if not (SCHEMAS / file).is_file():
        pytest.skip(f"no {file} in {SCHEMAS}; OCTAVO_KUBERAY_SCHEMAS names its folder")
    return jsonschema.Draft202012Validator(json.loads((SCHEMAS / file).read_text()))


def said(validator: Any, one: Object) -> list[str]:
    return [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in validator.iter_errors(one)]
