"""Prometheus finds what it should read, is let in to it, and gets the very rules and dashboard that lie beside."""

import pytest

from tests.support.manifests import (
    Object,
    groups,
    of_kind,
    one_of_kind,
    overlay,
    ray_container,
    with_components,
)
from tests.support.prometheus_rule import OBSERVABILITY, RULES, WRAPPED, wrapped


def objects() -> tuple[Object, ...]:
    return with_components("cpu-demo", "observability")


def test_the_rules_are_wrapped_as_they_are() -> None:
    again = "python -m tests.support.prometheus_rule makes it again"
    assert WRAPPED.read_text() == wrapped(RULES.read_text()), again
    assert one_of_kind(objects(), "PrometheusRule")["spec"]["groups"]


def test_the_dashboard_arrives_byte_for_byte() -> None:
    (found,) = [one for one in of_kind(objects(), "ConfigMap") if one["metadata"]["name"] == "octavo-dashboard"]
    assert found["data"] == {path.name: path.read_text() for path in OBSERVABILITY.glob("*dashboard.json")}
    assert found["metadata"]["labels"] == {"grafana_dashboard": "1"}


def test_monitors_read_ports_that_their_pods_have() -> None:
    for monitor in of_kind(objects(), "PodMonitor"):
        wanted = monitor["spec"]["selector"]["matchLabels"]
        pods = [g for g in groups("cpu-demo").values() if wanted.items() <= g["template"]["metadata"]["labels"].items()]
        assert pods
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for pod in pods:
                assert endpoint["port"] in {one["name"] for one in ray_container(pod)["ports"]}


def test_prometheus_is_let_in_to_the_same_ports() -> None:
    (policy,) = [one for one in of_kind(objects(), "NetworkPolicy") if one["metadata"]["name"] == "octavo-metrics"]
    (rule,) = policy["spec"]["ingress"]
    read = {e["port"] for m in of_kind(objects(), "PodMonitor") for e in m["spec"]["podMetricsEndpoints"]}
    assert {one["port"] for one in rule["ports"]} == read


@pytest.mark.parametrize("name", ["gpu", "ha", "autoscale"])
def test_clusters_that_are_meant_to_last_are_watched(name: str) -> None:
    assert {one["metadata"]["name"] for one in of_kind(overlay(name), "PodMonitor")} == {"octavo", "octavo-ray"}
