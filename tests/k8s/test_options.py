"""What an overlay leaves out, and what is needed to have it: API keys, traces."""

from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from actors.ingress import parse_args
from cluster.config import ClusterConfig
from tests.support.manifests import K8S, OVERLAYS, component, groups, of_kind, one_of_kind, with_components

OPTIONS = {"api_keys_file": "components/api-keys", "otlp_endpoint": "components/tracing"}


def with_option(name: str, option: str) -> str:
    """The overlay's Serve config with one comment taken away."""
    text = (K8S / "overlays" / name / "serve-config.yaml").read_text()
    (line,) = [line for line in text.splitlines() if line.lstrip().startswith(f"# {option}: ")]
    assert line.endswith(f"# with {OPTIONS[option]}")
    return text.replace(line, line.replace("# ", "", 1))


@pytest.mark.parametrize("name", OVERLAYS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_is_one_line_without_its_comment(name: str, option: str) -> None:
    (application,) = yaml.safe_load(with_option(name, option))["applications"]
    assert isinstance(application["args"][option], str)
    assert (K8S / OPTIONS[option] / "kustomization.yaml").is_file()
    if option not in {field.name for field in fields(ClusterConfig)}:
        pytest.skip(f"ClusterConfig has no {option}")
    assert getattr(parse_args(application["args"]), option) == application["args"][option]


@pytest.mark.parametrize("name", OVERLAYS)
def test_keys_are_mounted_where_the_front_door_looks(name: str) -> None:
    args = yaml.safe_load(with_option(name, "api_keys_file"))["applications"][0]["args"]
    objects = with_components(name, *(() if name != "cpu-demo" else ("observability",)), "components/api-keys")
    workers = one_of_kind(objects, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    for group in workers:
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        keys = [one for one in container["volumeMounts"] if one["name"] == "keys"]
        variables = [one for one in container["env"] if one["name"] == "OPENAI_API_KEY"]
        if component(group) != "coordinator":
            assert not keys
            assert not variables, "only where the front door is"
            continue
        (mount,), (variable,) = keys, variables
        assert mount["readOnly"]
        assert "subPath" not in mount, "a changed Secret would not be seen"
        assert mount["mountPath"] == str(Path(args["api_keys_file"]).parent)
        (volume,) = [one for one in pod["volumes"] if one["name"] == "keys"]
        assert volume["secret"]["secretName"] == "octavo-api-keys"
        (monitor,) = [one for one in of_kind(objects, "PodMonitor") if one["metadata"]["name"] == "octavo"]
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["authorization"]["credentials"] == variable["valueFrom"]["secretKeyRef"], "the same key"


def test_keys_can_be_had_without_prometheus() -> None:
    assert not of_kind(with_components("cpu-demo", "components/api-keys"), "PodMonitor")
    assert "keys" not in {one["name"] for one in groups("cpu-demo")["coordinators"]["template"]["spec"]["volumes"]}


def test_spans_are_let_out_to_the_collector_that_is_named() -> None:
    args = yaml.safe_load(with_option("gpu", "otlp_endpoint"))["applications"][0]["args"]
    host, _, port = args["otlp_endpoint"].removeprefix("http://").partition(":")
    policies = of_kind(with_components("gpu", "components/tracing"), "NetworkPolicy")
    (policy,) = [one for one in policies if one["metadata"]["name"] == "octavo-tracing"]
    (rule,) = policy["spec"]["egress"]
    assert rule["to"] == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": host.split(".")[1]}}}]
    assert [one["port"] for one in rule["ports"]] == [int(port)]
