"""Policies in both worlds: what a live run tells is found again, and the simulation begins where it began."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.supervision.status import ClusterStatus, LoadStatus, ReplicaStatus
from cluster.simulate import SimulationResult, Timeline
from experiments.scenario import ranking
from experiments.scenario.calibration import drawing_weights
from experiments.scenario.live import live_config
from experiments.scenario.schema import Scenario, ScenarioError, read_scenario
from experiments.scenario.slow_process import slow_down
from experiments.simulation.synthetic_routing import RoutingModel, route
from model.experts import ExpertColumn
from model.storage.checkpoint import Checkpoint
from protos.coordinator_pb2 import LayerLoad, SnapshotReply
from tests.support.checkpoints import write_mixtral

LAYERS, EXPERTS, TOP_K = 2, 4, 2
CALL_S, ROW_S, STEP_S, STEP_TOKEN_S = 0.002, 0.0005, 0.004, 0.0001
PLACES = {0: "a", 1: "a", 2: "b", 3: "c"}
BUSIEST_CALLS, BUSIEST_SHARE = 2, 0.7
SHARES = np.array([0.45, 0.25, 0.15, 0.15])
TEXT = """
max_num_seqs: 16
max_num_batched_tokens: 64
live: {calibrate: 1, copy_s: 2, config: {expert_slots: 3, balance_interval_s: 2.0}}
phases:
  - {duration_s: 10, concurrency: 2, prompt_tokens: 8, output_tokens: 16}
  - {duration_s: 30, concurrency: 16, prompt_tokens: 8, output_tokens: 16}
policies: [static, incremental]
"""


def scenario(tmp_path: Path, text: str = TEXT) -> Scenario:
    path = tmp_path / "scenario.yaml"
    path.write_text(text)
    return read_scenario(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    write_mixtral(path, layers=LAYERS, experts=EXPERTS)
    return path


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32), st.floats(0.3, 5.0), st.integers(3, 8))
def test_experts_are_drawn_as_often_as_they_were_seen(seed: int, evenness: float, num_experts: int) -> None:
    rng = np.random.default_rng(seed)
    drawn = RoutingModel(num_layers=1, num_experts=num_experts, top_k=TOP_K, stickiness=0.0)
    true_1E = rng.dirichlet(np.full(num_experts, evenness), 1) + 1e-3

    def shares(weights_1E: Any) -> Any:
        chosen = route(
            drawn,
            np.random.default_rng(seed),
            np.linspace(0.0, 1.0, 20_000),
            lambda at: np.broadcast_to(weights_1E, (len(at), 1, num_experts)),
        )
        return np.bincount(chosen.ravel(), minlength=num_experts)[None] / chosen.size

    seen_1E = shares(true_1E)
    assert shares(drawing_weights(seen_1E, TOP_K)) == pytest.approx(seen_1E, abs=0.012)


def snapshot(steps: int, tokens: float) -> SnapshotReply:
    """After so many steps of `tokens` tokens each, on hosts as in PLACES."""
    rows_E = SHARES * tokens * TOP_K
    by_host = {host: sum(rows_E[e] for e, at in PLACES.items() if at == host) for host in "abc"}
    wait_s = LAYERS * (CALL_S * BUSIEST_CALLS + ROW_S * max(by_host.values()))
    load = [LayerLoad(tokens=[round(row * steps) for row in rows_E])] * LAYERS
    return SnapshotReply(
        steps_total=steps,
        step_s_total=steps * (STEP_S + STEP_TOKEN_S * tokens + wait_s),
        expert_wait_s_total=steps * wait_s,
        load=load,
    )


def plus(one: SnapshotReply, other: SnapshotReply) -> SnapshotReply:
    rows = [
        [a + b for a, b in zip(mine.tokens, yours.tokens, strict=True)]
        for mine, yours in zip(one.load, other.load, strict=True)
    ]
    return SnapshotReply(
        steps_total=one.steps_total + other.steps_total,
        step_s_total=one.step_s_total + other.step_s_total,
        expert_wait_s_total=one.expert_wait_s_total + other.expert_wait_s_total,
        load=[LayerLoad(tokens=each) for each in rows],
    )


def status() -> ClusterStatus:
    rows = [
        ReplicaStatus(replica_id=f"expert-{e}-r0", expert_ids=[e], state="ready", node=node, weight_bytes=2000)
        for e, node in PLACES.items()
    ]
    return ClusterStatus(
        state="ready",
        model="m",
        model_path="m",
        map_epoch=1,
        system_fingerprint="",
        uptime_s=0.0,
        coordinators=[],
        replicas=rows,
        load=LoadStatus(tokens_per_expert=[], window_tokens_per_expert=[], balancedness_per_layer=[], balancedness=1.0),
        events=[],
    )


def recorded(tokens_per_s: float, copies: int = EXPERTS) -> ranking.Recorded:
    """Ten seconds at two tokens a step, thirty at sixteen; the result says `tokens_per_s` in the second phase."""
    early = snapshot(100, 2)
    late = plus(early, snapshot(300, 16))
    line = Timeline(
        at_s=[10.0, 20.0, 30.0, 40.0],
        hosts=[copies] * 4,
        copies=[copies] * 4,
        tokens=[1, *[int(10 * tokens_per_s)] * 3],
        balancedness=[1.0] * 4,
        worst_balancedness=[1.0] * 4,
        critical_share=[0.5] * 4,
        queue_s=[0.0] * 4,
        moved_bytes=[0] * 4,
    )
    nothing = np.zeros(0)
    result = SimulationResult(
        duration_s=40.0,
        num_steps=0,
        num_tokens=1,
        num_unfinished=0,
        ttft_s=nothing,
        tpot_s=nothing,
        e2el_s=nothing,
        host_seconds=40.0 * copies,
        moved_bytes=0,
        num_copies=0,
        timeline=line,
        log=(),
    )
    return ranking.Recorded(result, ((0.0, SnapshotReply()), (10.0, early), (40.0, late)), status())


def test_what_a_run_tells_is_found_again() -> None:
    known = ranking.learn(recorded(1.0), TOP_K)
    found = [known.step_cost.a_s, known.step_cost.b_s, known.cost.a_s, known.cost.b_s]
    assert found == pytest.approx([STEP_S, STEP_TOKEN_S, CALL_S, ROW_S], rel=0.02)
    assert dict(known.places) == PLACES
    assert known.weights_WLE.shape == (2, LAYERS, EXPERTS)
    empty = ranking.Recorded(recorded(1.0).result, ((0.0, SnapshotReply()), (1.0, SnapshotReply())), status())
    with pytest.raises(ValueError, match="nothing was served"):
        ranking.learn(empty, TOP_K)


def test_static_is_predicted_as_the_constants_say_and_copies_help(tmp_path: Path, model: Path) -> None:
    asked, run = scenario(tmp_path), recorded(1.0)
    known = ranking.learn(run, TOP_K)
    found = {
        policy: ranking.predict(asked, live_config(asked, model, policy), known, run.first, TOP_K)
        for policy in asked.policies
    }
    static = found["static"].timeline
    busiest_rows = BUSIEST_SHARE * 16 * TOP_K
    step_s = STEP_S + STEP_TOKEN_S * 16 + LAYERS * (CALL_S * BUSIEST_CALLS + ROW_S * busiest_rows)
    assert static.tokens[-2] / TOP_K / 2.0 == pytest.approx(16 / step_s, rel=0.2), "prompts make some steps larger"
    assert set(static.copies) == {EXPERTS}, "it begins as it was found, and stays"
    assert found["incremental"].timeline.copies[-1] > EXPERTS
    assert found["incremental"].num_tokens > 1.1 * found["static"].num_tokens


def test_orders_are_compared_and_only_clear_ones_can_disagree(tmp_path: Path, model: Path) -> None:
    asked = scenario(tmp_path)
    runs = {"static": recorded(700.0), "incremental": recorded(900.0, copies=5)}
    ranked = ranking.compare(asked, model, runs)
    constants, *policies, order = ranked.lines
    assert constants["token_us"] == pytest.approx(ROW_S * 1e6, rel=0.02)
    for line in policies:
        for name, error in line["error"].items():
            assert error == pytest.approx(line["simulated"][name] / line["live"][name] - 1)
    assert policies[0]["live"] == {"tokens_per_s": 700.0, "copy_seconds_per_s": EXPERTS}
    assert order == {
        "type": "ranking",
        "live": ["incremental", "static"],
        "simulated": ["incremental", "static"],
        "disagree": [],
    }
    upside_down = {"static": recorded(900.0), "incremental": recorded(600.0, copies=5)}
    assert ranking.compare(asked, model, upside_down).lines[-1]["disagree"] == ["static and incremental"]
    about_equal = {"static": recorded(900.0), "incremental": recorded(880.0, copies=5)}
    assert ranking.compare(asked, model, about_equal).lines[-1]["disagree"] == []
    assert set(ranked.results) == {f"{policy} {world}" for policy in runs for world in ("live", "simulated")}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("policies: [static, incremental]", "policies: [static]"), "at least two different ones"),
        (("policies: [static, incremental]", "policies: [eplb, static]"), r"policies\[0\] is 'eplb'"),
        (("calibrate: 1", "calibrate: 2"), "must leave a phase"),
        (("max_num_seqs: 16", "faults: [{at_s: 1}]"), "faults are given"),
    ],
)
def test_what_cannot_be_ranked_is_refused(tmp_path: Path, change: tuple[str, str], says: str) -> None:
    with pytest.raises(ScenarioError, match=says):
        ranking.check(scenario(tmp_path, TEXT.replace(*change)))


def test_slow_experts_of_a_node_wait_for_each_other(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr(ExpertColumn, "forward", ExpertColumn.forward)  # what it is afterwards again
    column = ExpertColumn.load(Checkpoint.open(model), 0, range(1), "fp32", "cpu")
    rows_MD = torch.ones(3, 64)
    answer = column.forward(0, rows_MD)
    file = tmp_path / "node"
    with file.open("wb") as mine, file.open("wb") as another:
        slow_down(0.001, mine)
        fcntl.flock(another, fcntl.LOCK_EX)
        found: list[torch.Tensor] = []
        thread = threading.Thread(target=lambda: found.append(column.forward(0, rows_MD)))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive(), "another expert of the node is at work"
        fcntl.flock(another, fcntl.LOCK_UN)
        thread.join(120)
    assert torch.equal(found[0], answer)
