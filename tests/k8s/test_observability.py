"""The dashboard and the alert rules against what the code shows, and against a real Prometheus where there is one."""

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml

from actors.front.coordinator_pool import CoordinatorPool
from actors.front.http_app import create_app
from actors.front.metrics import FrontMetrics
from actors.front.resubmission import Verdict
from actors.front.scrape import StatusWatch
from actors.metrics.cluster import ClusterMetrics
from actors.metrics.coordinators import CoordinatorMetrics
from protos.coordinator_pb2 import LayerLoad, ReplicaHealth, SnapshotReply
from tests.support.checkpoints import write_mixtral
from tests.support.front import MODEL, make_front, run, serving
from tests.support.scripted_coordinator import ScriptedCoordinator, saying
from tests.support.served_cluster import free_port
from tests.support.statuses import status

ROOT = Path(__file__).resolve().parents[2]
OBSERVABILITY = ROOT / "k8s" / "observability"
RULE_TESTS = Path(__file__).with_name("octavo_rules_test.yaml")
RULES: list[dict[str, Any]] = yaml.safe_load((OBSERVABILITY / "rules.yaml").read_text())["groups"][0]["rules"]
DASHBOARD: dict[str, Any] = json.loads((OBSERVABILITY / "octavo-dashboard.json").read_text())

SELECTOR = re.compile(r"\b((?:octavo_|vllm:)\w+)\s*(?:\{([^}]*)\})?")
PROMTOOL = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt-get install prometheus)"
)
PROMETHEUS = pytest.mark.skipif(
    shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt-get install prometheus)"
)


def snapshot() -> SnapshotReply:
    loads = [LayerLoad(tokens=[3, 1]), LayerLoad(tokens=[2, 2])]
    return SnapshotReply(
        coordinator_id="coordinator-0",
        state="ready",
        load=loads,
        window_load=loads,
        replica_health=[ReplicaHealth(replica_id="expert-0-r0", state="healthy")],
        kv_blocks_total=10,
        kv_blocks_free=5,
    )


def shown() -> dict[str, frozenset[str]]:
    """Names of all samples, and of the families that wait for their first one, with their labels."""
    metrics = FrontMetrics(MODEL, lambda: {"a": snapshot()}, lambda: {Verdict.LOST: 1}, status)
    metrics.requests.labels("/v1/completions", "200").inc()
    metrics.choice_ended("stop", 3, 4)
    labels: dict[str, frozenset[str]] = {}
    for ours in (*CoordinatorMetrics().families([]), *ClusterMetrics().families(None)):
        labels[ours.name + ("_total" if ours.kind == "counter" else "")] = frozenset(ours.labels)
    for family in metrics.families():
        for sample in family.samples:
            labels[sample.name] = labels.get(sample.name, frozenset()) | sample.labels.keys()
    return labels


def dashboard_expressions() -> Iterator[tuple[str, str]]:
    """Title and PromQL, with values where Grafana puts its variables."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m").replace("$instance", ".*")
            assert "$" not in expression, f"{panel['title']}: an unknown variable in {expression}"
            yield panel["title"], expression


def expressions() -> list[str]:
    return [rule["expr"] for rule in RULES] + [expression for _, expression in dashboard_expressions()]


def test_every_metric_and_label_that_is_asked_for_is_shown() -> None:
    known = shown()
    asked = {match for expression in expressions() for match in SELECTOR.findall(expression)}
    assert len(asked) > 40
    for name, matchers in sorted(asked):
        assert name in known, f"nobody shows {name}"
        for label in re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers):
            assert label == "instance" or label in known[name], f"{name} has no label {label}"


def test_labels_that_are_summed_by_are_labels() -> None:
    known = shown()
    for expression in expressions():
        names = {name for name, _ in SELECTOR.findall(expression)}
        have = frozenset[str]().union(*(known[name] for name in names))
        for by in re.findall(r"by \(([^)]*)\)", expression):
            wanted = {label.strip() for label in by.split(",")}
            assert wanted <= have, f"{wanted - have} in {expression}"


def test_what_the_cluster_shows_is_reduced_over_ingresses_first() -> None:
    """Each ingress shows all coordinators: a bare sum would count them once for each."""
    of_cluster = {name for name, labels in shown().items() if "coordinator" in labels or "engine" in labels}
    for expression in expressions():
        for name in {name for name, _ in SELECTOR.findall(expression)} & of_cluster:
            before = expression[: expression.index(name)]
            last = re.findall(r"\b(max|min|sum|absent)\b", before)[-1]
            assert last in ("max", "min", "absent"), f"{name} is summed over ingresses in {expression}"


def test_alerts_say_what_is_wrong_and_how_bad_it_is() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["alert"].startswith("Octavo")
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert rule["annotations"]["summary"].endswith(".")


def test_every_alert_fires_in_the_rule_tests() -> None:
    told = [one for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for one in test["alert_rule_test"]]
    fired = {one["alertname"] for one in told if one["exp_alerts"]}
    assert fired == {rule["alert"] for rule in RULES}


def test_panels_are_whole() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


@PROMTOOL
def test_promtool_reads_the_rules_and_they_fire_when_they_should(tmp_path: Path) -> None:
    for file in (OBSERVABILITY / "rules.yaml", RULE_TESTS):
        shutil.copy(file, tmp_path)
    for command in (["check", "rules", "rules.yaml"], ["test", "rules", RULE_TESTS.name]):
        done = subprocess.run(["promtool", *command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@PROMTOOL
def test_promtool_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"panel:{at}", "expr": one} for at, (_, one) in enumerate(dashboard_expressions())]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@PROMETHEUS
def test_a_real_prometheus_finds_data_for_the_panels(tmp_path: Path) -> None:
    """Scrapes a real front door, and answers every panel's question; those about what happened here with data."""

    async def work() -> None:
        write_mixtral(tmp_path / "model")
        coordinator = ScriptedCoordinator(saying([65] * 40))
        coordinator.reply = snapshot()
        pool, watch = CoordinatorPool([coordinator]), StatusWatch(_status)
        metrics = FrontMetrics(MODEL, lambda: pool.last_snapshots, lambda: pool.resubmissions, lambda: watch.last)
        front = make_front(tmp_path / "model", coordinators=pool, status=watch, metrics=metrics)
        async with serving(create_app(front)) as url, httpx2.AsyncClient(timeout=120) as client:
            await client.post(f"{url}/v1/completions", json={"model": MODEL, "prompt": "p", "max_tokens": 8})
            port = free_port()
            process = _prometheus(tmp_path, port, url)
            try:
                await _answers(client, f"http://127.0.0.1:{port}")
            finally:
                process.terminate()
                process.wait(120)

    run(work())


async def _status() -> Any:
    return status()


def _prometheus(directory: Path, port: int, url: str) -> subprocess.Popen[bytes]:
    scrape = {"job_name": "octavo", "static_configs": [{"targets": [url.removeprefix("http://")]}]}
    shutil.copy(OBSERVABILITY / "rules.yaml", directory)
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [scrape],
    }
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with (directory / "prometheus.log").open("wb") as log:
        return subprocess.Popen(
            [
                "prometheus",
                f"--config.file={directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


async def _answers(client: httpx2.AsyncClient, prometheus: str) -> None:
    """A rate needs two scrapes."""
    await _until(client, prometheus, "count_over_time(octavo_model_info[1m]) >= 3")
    silent = []
    for title, expression in dashboard_expressions():
        answer = (await client.get(f"{prometheus}/api/v1/query", params={"query": expression})).json()
        assert answer["status"] == "success", f"{title}: {answer}"
        if not answer["data"]["result"]:
            silent.append(title)
    # Nothing was balanced, nobody measured replicas' times, and no request went elsewhere.
    assert set(silent) <= {"Balancing", "Weights moved", "Busy share of replicas", "Preemptions and resubmissions"}
    while True:  # each group of rules has its own second
        rules = (await client.get(f"{prometheus}/api/v1/rules")).json()["data"]["groups"][0]["rules"]
        if "unknown" not in (found := {rule["health"] for rule in rules}):
            break
        await asyncio.sleep(0.1)
    assert len(rules) == len(RULES)
    assert found == {"ok"}


async def _until(client: httpx2.AsyncClient, prometheus: str, expression: str) -> None:
    """Prometheus tells nobody when it has scraped: it is asked again and again."""
    for _ in range(2400):
        try:
            answer = await client.get(f"{prometheus}/api/v1/query", params={"query": expression})
            if answer.status_code == 200 and answer.json()["data"]["result"]:
                return
        except httpx2.TransportError:
            pass  # it is starting
        await asyncio.sleep(0.1)
    raise AssertionError(f"never true: {expression}")
