"""What KubeRay 1.7's operator refuses although its schema lets it through, and what it would overwrite.

Its rules (ray-operator, validation of RayService and RayCluster) in our words; a refused RayService makes no pod.
"""

import re

import pytest

from tests.support.manifests import OVERLAYS, groups, one_of_kind, overlay, ray_container, ray_service, ray_start_params

RAY_SERVICE_NAME_LENGTH = 47
IN_RESOURCES = {"num-cpus", "num-gpus", "memory", "resources"}
MANAGED = {
    *("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_CLUSTER_NAME", "RAY_CLUSTER_NAMESPACE"),
    *("RAY_CLOUD_INSTANCE_ID", "RAY_NODE_TYPE_NAME", "KUBERAY_GEN_RAY_START_CMD", "RAY_enable_autoscaler_v2"),
    *("REDIS_PASSWORD", "REDIS_USERNAME", "RAY_REDIS_ADDRESS", "RAY_GCS_STORAGE", "RAY_GCS_STORAGE_PATH"),
}
MANAGED_LABELS = {"ray.io/serve", "ray.io/cluster", "ray.io/node-type", "ray.io/group", "app.kubernetes.io/name"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_resources_are_said_in_one_place(name: str) -> None:
    """Both at once is refused: "please use only one"."""
    for spec in groups(name).values():
        assert spec["resources"]
        assert not IN_RESOURCES & set(spec["rayStartParams"])
        assert "labels" not in spec["rayStartParams"]
        for resource in spec["resources"]:
            assert resource in ("CPU", "GPU", "memory") or resource.startswith("octavo_"), "as Ray spells them"
        assert {"num-cpus", "memory", "resources"} <= set(ray_start_params(spec))


@pytest.mark.parametrize("name", OVERLAYS)
def test_names_are_short_enough_for_what_is_made_of_them(name: str) -> None:
    service = one_of_kind(overlay(name), "RayService")["metadata"]["name"]
    assert len(service) <= RAY_SERVICE_NAME_LENGTH
    for group in groups(name):
        assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", group)


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_kuberay_sets_is_left_to_it(name: str) -> None:
    for spec in groups(name).values():
        assert not MANAGED & {one["name"] for one in ray_container(spec)["env"]}
        assert not MANAGED_LABELS & set(spec["template"]["metadata"]["labels"])
        assert "command" not in ray_container(spec), "`ray start` is KubeRay's"
        assert "restartPolicy" not in spec["template"]["spec"], "Never with the autoscaler, else as it comes"
        for kind in ("readinessProbe", "livenessProbe"):
            assert kind in ray_container(spec), "its own ask with wget, which the image does not have"


@pytest.mark.parametrize("name", OVERLAYS)
def test_what_belongs_to_an_autoscaler_is_where_there_is_one(name: str) -> None:
    cluster = ray_service(name)["rayClusterConfig"]
    scaled = cluster.get("enableInTreeAutoscaling", False)
    assert ("autoscalerOptions" in cluster) == scaled
    for spec in cluster["workerGroupSpecs"]:
        assert "minReplicas" in spec
        assert "maxReplicas" in spec
        if "idleTimeoutSeconds" in spec:
            assert scaled
            assert cluster["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize("name", OVERLAYS)
def test_tokens_need_a_version_of_ray_that_has_them(name: str) -> None:
    version = tuple(map(int, ray_service(name)["rayClusterConfig"]["rayVersion"].split(".")))
    assert version >= (2, 52, 0)


def test_the_heads_store_has_nothing_of_redis() -> None:
    options = ray_service("ha")["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert options["backend"] == "rocksdb"
    assert set(options) == {"backend", "storage"}
    assert not {"claimName", "existingClaim"} & set(options["storage"]), "KubeRay's own, one for each cluster"
