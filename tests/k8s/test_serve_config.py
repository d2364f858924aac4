"""What a RayService hands to Serve is the overlay's own file, and Serve and Octavo both take it."""

import shutil
from pathlib import Path

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from actors.ingress import parse_args
from tests.support.manifests import (
    K8S,
    ON_GPUS,
    OVERLAYS,
    cluster_args,
    groups,
    kustomize,
    of_kind,
    one_of_kind,
    overlay,
    ray_service,
    ray_start_params,
    serve_config,
    with_components,
)

TLS_FIELDS = {"tls_cert", "tls_key", "tls_ca"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_file_arrives_byte_for_byte(name: str) -> None:
    text = (K8S / "overlays" / name / "serve-config.yaml").read_text()
    assert ray_service(name)["serveConfigV2"] == text
    (held,) = [one for one in of_kind(overlay(name), "ConfigMap") if "serve-config" in one["metadata"]["name"]]
    assert held["data"] == {"serve-config.yaml": text}
    (volume,) = [one for one in groups(name)["head"]["template"]["spec"]["volumes"] if one["name"] == "config"]
    assert volume["configMap"]["name"] == held["metadata"]["name"], "with the hash"


def test_a_changed_file_is_a_changed_cluster(tmp_path: Path) -> None:
    """A supervisor that runs keeps its configuration: only a new cluster takes another."""

    def cluster(text: str) -> object:
        copy = tmp_path / "k8s"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(K8S, copy)
        (copy / "overlays" / "ha" / "serve-config.yaml").write_text(text)
        objects = tuple(yaml.safe_load_all(kustomize(copy / "overlays" / "ha")))
        service = one_of_kind(objects, "RayService")["spec"]
        assert service["serveConfigV2"] == text
        return service["rayClusterConfig"]

    text = (K8S / "overlays" / "ha" / "serve-config.yaml").read_text()
    same, other = cluster(text), cluster(text.replace("max_model_len: 16384", "max_model_len: 8192"))
    assert same == ray_service("ha")["rayClusterConfig"]
    assert same != other


@pytest.mark.parametrize("name", OVERLAYS)
def test_serve_and_octavo_take_it(name: str) -> None:
    config = serve_config(name)
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert application.route_prefix == "/"
    assert [one.name for one in application.deployments] == ["ingress"], "the name that build_app gives"
    parsed = parse_args(cluster_args(name))
    assert parsed.auth_token is None, "drawn at start, written nowhere"
    assert parsed.bind_host == "node"
    assert schema.http_options.host == "0.0.0.0"


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_key_is_one_that_serve_knows(name: str) -> None:
    """Serve ignores keys that it does not know; here they would be misspelt ones."""
    written, known = serve_config(name), ServeDeploySchema.model_validate(serve_config(name))
    assert set(written) <= known.model_fields_set
    assert set(written["http_options"]) <= set(type(known.http_options).model_fields)
    application = known.applications[0]
    assert set(written["applications"][0]) <= set(type(application).model_fields)
    deployment = written["applications"][0]["deployments"][0]
    assert set(deployment) <= set(type(application.deployments[0]).model_fields)
    assert set(deployment["ray_actor_options"]) <= {"num_cpus", "num_gpus", "resources"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_front_door_fits_on_the_coordinators_pods_and_nowhere_else(name: str) -> None:
    (application,) = serve_config(name)["applications"]
    wanted = application["deployments"][0]["ray_actor_options"]["num_cpus"]
    offers = {group: int(ray_start_params(spec)["num-cpus"]) for group, spec in groups(name).items()}
    assert wanted > 0
    assert offers.pop("coordinators") > wanted
    assert set(offers.values()) == {0}
    if cluster_args(name)["ingresses"] > 1:
        assert application["deployments"][0]["max_replicas_per_node"] == 1
        assert groups(name)["coordinators"]["replicas"] >= cluster_args(name)["ingresses"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_the_grpc_plane_asks_for_certificates_that_are_mounted(name: str) -> None:
    args = cluster_args(name)
    for group, spec in groups(name).items():
        pod = spec["template"]["spec"]
        (mount,) = [m for m in pod["containers"][0]["volumeMounts"] if m["name"] == "tls"]
        (volume,) = [v for v in pod["volumes"] if v["name"] == "tls"]
        assert mount["readOnly"], group
        assert {str(Path(args[field]).parent) for field in TLS_FIELDS} == {mount["mountPath"]}
        assert volume["secret"]["secretName"] == "octavo-grpc-tls"
    assert {Path(args[field]).name for field in TLS_FIELDS} == {"tls.crt", "tls.key", "ca.crt"}


@pytest.mark.parametrize("name", OVERLAYS)
def test_cert_manager_makes_that_very_secret(name: str) -> None:
    certificates = [one for one in with_components(name, "components/cert-manager") if one["kind"] == "Certificate"]
    (grpc,) = [one["spec"] for one in certificates if one["spec"]["secretName"] == "octavo-grpc-tls"]
    assert cluster_args(name)["tls_server_name"] in grpc["dnsNames"]
    assert {"server auth", "client auth"} <= set(grpc["usages"]), "both sides show it"
    assert grpc["issuerRef"]["name"] == "octavo-grpc-ca"


def test_overlays_differ_only_where_they_must() -> None:
    own = {"model", "device", "experts_device", "replicas", "coordinators", "ingresses", "max_model_len"}
    own |= {"balance", "min_expert_hosts", "max_expert_hosts", "min_coordinators", "max_coordinators"}
    common = [{key: value for key, value in cluster_args(name).items() if key not in own} for name in OVERLAYS]
    assert all(one == common[0] for one in common)


def test_no_more_is_asked_of_the_autoscaler_than_it_may_start() -> None:
    """Ray's autoscaler does nothing at all where it cannot do everything."""
    args, workers = cluster_args("autoscale"), groups("autoscale")
    assert args["balance"] == "on"
    for kind, group in (("expert_hosts", "experts"), ("coordinators", "coordinators")):
        assert args[f"min_{kind}"] >= workers[group]["minReplicas"]
        assert args[f"max_{kind}"] <= workers[group]["maxReplicas"]


@pytest.mark.parametrize("name", ON_GPUS)
def test_devices_are_said_where_there_are_gpus(name: str) -> None:
    """`auto` looks once, at start, when the pods with GPUs may not be there yet."""
    args = cluster_args(name)
    assert (args["device"], args["experts_device"]) == ("cuda", "cuda")
