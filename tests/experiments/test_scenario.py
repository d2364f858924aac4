"""Scenarios: what is wrong is named with its place and limit, load is what was asked for, both worlds run the same."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from actors.command.added_commands import CommandError
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig
from cluster.service_time import ServiceTime
from cluster.simulate import SimulationResult
from experiments import experiment_cli
from experiments.scenario.calibration import Calibration, Measured, calibrate, measured
from experiments.scenario.fidelity import check, compare, predict, refined
from experiments.scenario.live import live_config
from experiments.scenario.live_run import LiveCluster
from experiments.scenario.load import PhaseLoad, phase_loads, trace_of
from experiments.scenario.schema import Fault, Scenario, ScenarioError, read_scenario
from experiments.scenario.signals import first_replica, slowed, strike
from experiments.scenario.simulated import policy_of, run_simulated
from experiments.scenario.texts import TextSource
from protos.coordinator_pb2 import LayerLoad, SnapshotReply
from tests.support.checkpoints import write_mixtral
from tests.support.still_supervisor import StillSupervisor, status_of
from tests.support.tiny_cluster import tiny_cluster
from tests.support.tokenizers import write_byte_tokenizer

SCENARIOS = sorted((Path(__file__).parents[2] / "experiments" / "scenarios").glob("*.yaml"))
SMALL = """
name: small
model: {layers: 2, experts: 4, layer_mb: 10, skew: 1.2}
hosts: {count: 4, columns: 2, window_s: 2, start_s: 5}
max_num_seqs: 8
phases:
  - {duration_s: 10, concurrency: 4, prompt_tokens: 20, output_tokens: 8}
  - {duration_s: 10, rate: 3, prompt_tokens: 20, output_tokens: 8, text: {code: 1}}
"""


def scenario(tmp_path: Path, text: str = SMALL) -> Scenario:
    file = tmp_path / "s.yaml"
    file.write_text(text)
    return read_scenario(file)


def test_those_that_are_ready_are_sound() -> None:
    assert [path.stem for path in SCENARIOS] == ["day", "fidelity", "hot_expert", "load_shift", "policies"]
    for path in SCENARIOS:
        shown = CliRunner().invoke(experiment_cli.app, [str(path), "--check"])
        assert shown.exit_code == 0, shown.output
        assert re.search(r"\d phases in \d+ s, \d policies", shown.output)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("phases: [{rat: 3}]", "phases[0].rat is not known; the nearest known key is rate"),
        ("zzz: 1", "zzz is not known; the nearest known key is "),
        ("name: x", "phases is missing"),
        ("phases: [{rate: 0}]", "phases[0].rate is 0, but it must be a number from 1e-06 to 100000"),
        ("phases: [{rate: yes}]", "phases[0].rate is True"),
        ("phases: [{rate: .nan}]", "phases[0].rate is nan"),
        ("phases: [{rate: 1, concurrency: 2}]", "phases[0] must have rate or concurrency, and not both"),
        ("phases: [{concurrency: 2, rate_to: 2}]", "phases[0].rate_to is given without rate"),
        ("phases: [{rate: 1, text: {verse: 1}}]", "phases[0].text has 'verse', but it must be of prose, code"),
        ("phases: [{rate: 1, text: {code: 0}}]", "phases[0].text has no weight above 0"),
        ("phases: []", "phases must be a list of 1 to 100"),
        ("phases: [{rate: 1}]\npolicies: [best]", "policies has 'best', but it must be of static, reactive"),
        ("phases: [{rate: 1}]\nfaults: [{kind: melt}]", "faults[0].kind is 'melt', but it must be one of kill, slow"),
        ("phases: [{rate: 1}]\nfaults: [{expert: 8}]", "faults[0].expert is 8, but there are 8"),
        ("phases: [{rate: 1}]\nfaults: [{at_s: 60}]", "faults[0].at_s is 60, but it ends at 60"),
        (
            "phases: [{rate: 1}]\nmodel: {layers: 1.5}",
            "model.layers is 1.5, but it must be a whole number from 1 to 256",
        ),
        ("phases: [{rate: 1}]\nmodel: big", "model is 'big', but it must be a mapping"),
        (
            "phases: [{rate: 1}]\nmax_num_seqs: 600",
            "max_num_seqs is 600, but it must be at most max_num_batched_tokens",
        ),
        (
            "phases: [{rate: 1}]\nhosts: {autoscale: {min: 9}}",
            "hosts.count is 8, but hosts.autoscale goes from 9 to 4096",
        ),
        ("name: a\nname: b", "the key 'name' is given twice"),
        ("a: &x [1]\nb: *x", "an alias (*name) is not taken here"),
        ("[1, 2]", "the scenario is [1, 2], but it must be a mapping"),
        ("{", "is not sound YAML"),
        ("!!python/object/apply:os.getcwd []", "is not sound YAML"),
        ("[" * 5000, "is not sound YAML"),
        ("#" * (1 << 20) + "#", "has more than 1048576 bytes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(ScenarioError, match=re.escape(says)):
        scenario(tmp_path, text)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    done = CliRunner().invoke(experiment_cli.app, [str(tmp_path / "absent.yaml")])
    assert isinstance(done.exception, CommandError)
    assert "\n" not in str(done.exception)


def test_requests_come_as_the_phases_say_and_a_seed_is_a_load(tmp_path: Path) -> None:
    text = "phases: [{duration_s: 1000, rate: 1, rate_to: 5, prompt_tokens: 50, output_tokens: 9}]"
    asked = scenario(tmp_path, text)
    (load,) = phase_loads(asked, 0)
    assert len(load.arrival_s) == pytest.approx(3000, rel=0.1)
    halves = np.histogram(load.arrival_s, bins=2, range=(0, 1000))[0]
    assert halves[1] / halves[0] == pytest.approx(2.0, rel=0.15)
    assert load.prompt_tokens.mean() == pytest.approx(50, rel=0.1)
    assert load.output_tokens.mean() == pytest.approx(9, rel=0.1)
    assert (phase_loads(asked, 0)[0].arrival_s == load.arrival_s).all()
    assert len(phase_loads(asked, 1)[0].arrival_s) != len(load.arrival_s)


def test_each_kind_of_text_has_its_own_popular_experts(tmp_path: Path) -> None:
    asked = scenario(
        tmp_path,
        "model: {layers: 3, skew: 1.5}\nphases:\n  - {rate: 1, text: {prose: 1}}\n  - {rate: 1, text: {code: 1}}\n"
        "  - {rate: 1, text: {prose: 1}}",
    )
    trace, closed = trace_of(asked, 0)
    third = len(trace.experts) // 3
    parts = [trace.counts(i * third, (i + 1) * third) / (2 * third) for i in range(3)]
    moved = [float(np.abs(parts[0] - other).sum(axis=1).mean() / 2) for other in parts[1:]]
    assert moved[0] > 0.2
    assert moved[1] < 0.05
    assert closed == ()


def test_it_runs_simulated_with_faults_and_policies_differ(tmp_path: Path) -> None:
    page = tmp_path / "r.html"
    file = tmp_path / "s.yaml"
    faults = "faults: [{at_s: 5, kind: kill, expert: 1}, {at_s: 12, kind: slow, expert: 2, for_s: 3}]"
    file.write_text(SMALL + faults)
    done = CliRunner().invoke(experiment_cli.app, [str(file), "--html", str(page)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["policy"] for line in lines] == ["static", "incremental"]
    assert all(line["unfinished"] == 0 and line["completed"] > 100 for line in lines)
    html = page.read_text()
    assert "kill expert 1 at 5 s" in html
    assert not re.search(r"<script|src=|href=|url\(", html)


def test_a_lost_host_is_paid_until_it_is_lost_and_from_when_it_is_asked_for(tmp_path: Path) -> None:
    text = SMALL + "faults: [{at_s: 5, kind: kill, expert: 0}]\nseeds: [3]"
    result = run_simulated(scenario(tmp_path, text), "incremental", 3)
    assert result.num_unfinished == 0
    assert result.moved_bytes >= 20e6  # what was lost came back
    assert result.host_seconds == pytest.approx(4 * result.duration_s)
    slow = SMALL + "faults: [{at_s: 5, kind: slow, expert: 0, for_s: 4, factor: 50}]"
    slowed_down, free = (run_simulated(scenario(tmp_path, t), "static", 3) for t in (slow, SMALL))
    assert slowed_down.e2el_s.mean() > free.e2el_s.mean()
    assert slowed_down.num_steps < free.num_steps


def test_hosts_are_scaled_only_where_it_is_said(tmp_path: Path) -> None:
    fixed, scaled = scenario(tmp_path), scenario(tmp_path, SMALL.replace("start_s: 5", "autoscale: {min: 2, max: 9}"))
    assert type(policy_of(scaled, "incremental")).__name__ == "Autoscaled"
    assert type(policy_of(scaled, "static")).__name__ == type(policy_of(fixed, "incremental")).__name__ == "WithPauses"


def test_a_live_cluster_gets_balancing_fields_only_when_a_policy_needs_them(tmp_path: Path) -> None:
    asked = scenario(tmp_path, SMALL + "live: {config: {replicas: 2}}")
    config = live_config(asked, tmp_path, "static")
    assert (config.replicas, config.max_num_seqs, config.prefix_caching) == (2, 8, False)
    assert config.namespace != live_config(asked, tmp_path, "static").namespace, "runs do not meet"
    cached = scenario(tmp_path, SMALL + "live: {config: {prefix_caching: true}}")
    assert live_config(cached, tmp_path, "static").prefix_caching is True
    if "balance" in ClusterConfig.__slots__:
        assert getattr(live_config(asked, tmp_path, "incremental"), "balance") == "on"  # noqa: B009
    else:
        with pytest.raises(ScenarioError, match="this version does not balance live"):
            live_config(asked, tmp_path, "incremental")
    for name, says in (("replica", "not a field"), ("model", "chosen by the scenario")):
        with pytest.raises(ScenarioError, match=f"live.config.{name} is {says}"):
            live_config(scenario(tmp_path, SMALL + f"live: {{config: {{{name}: 2}}}}"), tmp_path, "static")


def test_faults_reach_the_first_ready_replica_of_the_expert() -> None:
    status = status_of(("b", [1], 12, "ready"), ("a", [1], 11, "loading"), ("c", [0, 1], 13, "ready"))
    assert first_replica(status, 1) == 12
    assert first_replica(status, 0) == 13
    assert first_replica(status, 2) is None


def test_a_process_is_killed_or_slowed_and_let_go() -> None:
    async def play(pid: int) -> None:
        task = asyncio.ensure_future(slowed(pid, 20.0, 60.0))
        _, status = await asyncio.to_thread(os.waitpid, pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

        async def found() -> ClusterStatus:
            return status_of(("a", [0], pid, "ready"))

        await strike(Fault(kind="kill", expert=0), found, time.monotonic())

    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        asyncio.run(play(process.pid))
        assert process.wait(60) == -signal.SIGKILL
        asyncio.run(slowed(process.pid, 2.0, 1.0))  # gone: no error
    finally:
        process.kill()
        process.wait()


POINTS = [(0.004, 2e-4, 3e-3, 5e-5, n) for n in (1, 4, 16, 64)]


def point(own: float, own_token: float, call: float, token: float, num: int, steps: int = 50) -> Measured:
    """A step of `num` tokens, top 1, all in every layer at expert 0."""
    load_LE = np.zeros((3, 4))
    load_LE[:, 0] = num * steps
    own_s, wait_s = own + own_token * num, 3 * (call + token * num)
    return Measured(steps=steps, own_s=steps * own_s, wait_s=steps * wait_s, load_LE=load_LE)


def test_constants_are_found_again() -> None:
    found = calibrate([point(*p) for p in POINTS], 1)
    assert (found.step_cost.a_s, found.step_cost.b_s) == (pytest.approx(0.004), pytest.approx(2e-4))
    assert (found.cost.a_s, found.cost.b_s) == (pytest.approx(3e-3), pytest.approx(5e-5))
    assert found.popularity_LE.tolist() == [[1, 0, 0, 0]] * 3
    falling = calibrate([point(0.01, -1e-5, 0.01, 0.0, n) for n in (1, 100)], 1)
    assert falling.step_cost.b_s == 0
    steep = calibrate([point(-0.001, 0.01, 0.01, 0.0, n) for n in (1, 100)], 1)
    assert steep.step_cost.a_s == 0
    with pytest.raises(ValueError, match="no measurement"):
        calibrate([], 1)


def test_what_was_measured_is_the_difference() -> None:
    def snapshot(steps: int, tokens: int) -> SnapshotReply:
        load = [LayerLoad(tokens=[tokens, 2 * tokens])] if tokens else []
        return SnapshotReply(steps_total=steps, step_s_total=steps * 0.3, expert_wait_s_total=steps * 0.2, load=load)

    found = measured(snapshot(10, 100), snapshot(20, 300))
    assert (found.steps, found.own_s, found.wait_s) == (10, pytest.approx(1.0), pytest.approx(2.0))
    assert found.load_LE.tolist() == [[200, 400]]
    assert found.busiest == 40
    assert measured(snapshot(0, 0), snapshot(1, 5)).load_LE.tolist() == [[5, 10]]
    assert measured(snapshot(10, 100), snapshot(20, 300), 3.5).own_s == pytest.approx(1.5), "busy between steps too"
    assert measured(snapshot(10, 100), snapshot(20, 300), 2.5).own_s == pytest.approx(1.0), "steps are known better"
    with pytest.raises(ValueError, match="no step"):
        measured(snapshot(1, 5), snapshot(1, 5))


def test_a_world_that_is_the_simulators_own_is_calibrated_to_its_constants(tmp_path: Path) -> None:
    """Steps wait for the busiest expert of each, not for the one that is busiest on average."""
    phases = "".join(
        f"  - {{duration_s: 30, concurrency: {num}, prompt_tokens: 24, output_tokens: 12}}\n" for num in (1, 4, 16, 8)
    )
    asked = scenario(tmp_path, f"max_num_seqs: 16\nmax_num_batched_tokens: 64\nphases:\n{phases}")
    popularity_LE = np.tile(np.array([0.2, 0.15, 0.15, 0.1, 0.1, 0.1, 0.1, 0.1]), (4, 1))  # nobody is always busiest
    truth = Calibration(ServiceTime(1e-3, 4e-4), ServiceTime(4e-3, 1e-4), popularity_LE)
    loads = phase_loads(asked, 0)

    def simulated(load: PhaseLoad, constants: Calibration) -> SimulationResult:
        return predict(asked, load, constants, 2, 1, 0)

    def as_measured(load: PhaseLoad) -> Measured:
        result = simulated(load, truth)
        steps, tokens = result.num_steps, result.num_tokens
        return Measured(
            steps=steps,
            own_s=truth.step_cost.a_s * steps + truth.step_cost.b_s * tokens,
            wait_s=truth.cost.a_s * 4 * steps + truth.cost.b_s * result.waited_rows,
            load_LE=popularity_LE * 2 * tokens,
        )

    loads = [replace(load, begin_s=0.0) for load in loads]
    points = [as_measured(load) for load in loads[:3]]
    found = refined(loads[:3], points, 2, simulated)
    assert (found.cost.a_s, found.cost.b_s) == (pytest.approx(1e-3, rel=0.05), pytest.approx(4e-4, rel=0.05))
    real, ours, mean = (simulated(loads[3], one).num_tokens for one in (truth, found, calibrate(points, 2)))
    assert ours == pytest.approx(real, rel=0.03)
    assert abs(mean - real) > 2 * abs(ours - real), "which the mean step's busiest expert does not tell"


def test_a_prediction_costs_what_the_constants_say(tmp_path: Path) -> None:
    asked = scenario(tmp_path, "phases:\n  - {duration_s: 20, concurrency: 1, prompt_tokens: 1, output_tokens: 8}\n")
    constants = calibrate([point(*p) for p in POINTS], 1)
    (load,) = phase_loads(asked, 0)
    result = predict(asked, load, constants, 1, 1, 0)
    assert result.duration_s / result.num_steps == pytest.approx(0.0042 + 3 * 0.00305, rel=0.01)
    assert result.host_seconds == pytest.approx(4 * result.duration_s)


def test_fidelity_needs_something_to_predict_and_no_faults(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"live.calibrate is 2, but it must leave a phase"):
        check(scenario(tmp_path, SMALL + "live: {calibrate: 2}"))
    with pytest.raises(ScenarioError, match="faults are given"):
        check(scenario(tmp_path, SMALL + "faults: [{at_s: 1}]"))


def test_the_worlds_are_compared_on_a_real_coordinator(tmp_path: Path) -> None:
    model = tmp_path / "model"
    write_mixtral(model)
    write_byte_tokenizer(model)
    phases = "".join(
        f"  - {{duration_s: 0.5, {load}, prompt_tokens: 12, output_tokens: 6}}\n"
        for load in ("concurrency: 1", "concurrency: 4", "concurrency: 2", "rate: 20")
    )
    asked = scenario(tmp_path, f"hosts: {{window_s: 0.2}}\nlive: {{calibrate: 2}}\nphases:\n{phases}")

    async def play() -> Any:
        async with tiny_cluster(model) as cluster:
            live = LiveCluster(cluster.client, TextSource(model, 0, 512), StillSupervisor())
            return await compare(live, asked, top_k=2, replicas=1)

    constants, comparisons = asyncio.run(play())
    assert constants.popularity_LE.shape == (2, 4)
    assert constants.popularity_LE.sum(axis=1) == pytest.approx(1)
    assert constants.cost.seconds(4) > 0
    for one, load in zip(comparisons, ({"concurrency": 2}, {"rate": 20}), strict=True):
        told = one.to_json()
        assert load.items() <= told.items()
        figure = told["output_throughput"]
        assert figure["error"] == pytest.approx(figure["simulated"] / figure["live"] - 1)


def test_phases_on_a_real_coordinator(tmp_path: Path) -> None:
    """The live side but for Ray: open and closed phases, a sampler beside them, figures as a simulation's."""
    model = tmp_path / "model"
    write_mixtral(model)
    write_byte_tokenizer(model)
    asked = scenario(
        tmp_path,
        "hosts: {window_s: 0.5}\nphases:\n  - {duration_s: 1, concurrency: 3, prompt_tokens: 12, output_tokens: 4}\n"
        "  - {duration_s: 1, rate: 8, prompt_tokens: 12, output_tokens: 4, text: {code: 1}}",
    )

    async def play() -> Any:
        async with tiny_cluster(model) as cluster:
            live = LiveCluster(cluster.client, TextSource(model, 0, 512), StillSupervisor())
            return await live.run(asked, phase_loads(asked, 0))

    result = asyncio.run(play())
    assert result.num_unfinished == 0
    assert len(result.e2el_s) > 8
    assert (result.ttft_s > 0).all()
    assert (result.e2el_s >= result.ttft_s).all()
    assert result.timeline.hosts[0] == 4
    assert 0 < sum(result.timeline.tokens) <= result.num_tokens + 3 + 8, "of those under way the last is counted too"
    assert 0 < result.timeline.balancedness[0] <= 1
    assert 1.9 < result.duration_s < 60
    assert result.host_seconds == pytest.approx(4 * result.duration_s, rel=0.3)
