"""Policies in both worlds: what a live run tells is found again, and the simulation begins where it began."""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.supervision.status import ClusterStatus, ReplicaStatus
from cluster.ids import NodeId
from cluster.layout import Grain, Host, Layout
from cluster.policy import Observation, moved_bytes
from cluster.simulate import SimulationResult, Timeline
from experiments.scenario import ranking
from experiments.scenario.calibration import Measured, drawing_weights, measured
from experiments.scenario.copying import CopyCost
from experiments.scenario.learning import LEAST_TOKENS, Fit, Recorded, learn, steady
from experiments.scenario.live import live_config
from experiments.scenario.prediction import Known, as_live, predict
from experiments.scenario.schema import Scenario, ScenarioError, read_scenario
from experiments.scenario.slow_process import slow_down
from experiments.scenario.spreading import Spread
from experiments.simulation.synthetic_routing import RoutingModel, route
from model.experts import ExpertColumn
from model.storage.checkpoint import Checkpoint
from protos.coordinator_pb2 import LayerLoad, ReplicaTimes, SnapshotReply
from tests.support.checkpoints import write_mixtral
from tests.support.still_supervisor import status_of

LAYERS, EXPERTS, TOP_K = 2, 4, 2
CALL_S, ROW_S, STEP_S, STEP_TOKEN_S = 0.002, 0.0005, 0.004, 0.0001
PLACES = {0: "a", 1: "a", 2: "b", 3: "c"}
BUSIEST_CALLS, BUSIEST_SHARE = 2, 0.7
COPY_SLOWS = 1.5
BUSY = 0.9
SHARES = np.array([0.45, 0.25, 0.15, 0.15])
OPEN = {"concurrency: 2,": "rate: 1,", "concurrency: 16,": "rate: 8,"}
TEXT = """
max_num_seqs: 16
max_num_batched_tokens: 64
live: {calibrate: 1, config: {expert_slots: 3, balance_interval_s: 2.0}}
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


def wait_s(tokens: float) -> float:
    """What a step of so many tokens waits for experts on hosts as in PLACES."""
    return LAYERS * (CALL_S * BUSIEST_CALLS + ROW_S * BUSIEST_SHARE * tokens * TOP_K)


def step_s(tokens: float) -> float:
    return STEP_S + STEP_TOKEN_S * tokens + wait_s(tokens)


def snapshot(seconds: float, tokens: float) -> SnapshotReply:
    """After so many seconds of steps of `tokens` tokens each; between steps passes a tenth of them."""
    steps = round(BUSY * seconds / step_s(tokens))
    return SnapshotReply(
        steps_total=steps,
        step_s_total=steps * step_s(tokens),
        expert_wait_s_total=steps * wait_s(tokens),
        load=[LayerLoad(tokens=[round(row * steps) for row in SHARES * tokens * TOP_K])] * LAYERS,
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
    return replace(status_of(), replicas=rows)


def recorded(tokens_per_s: float, copies: int = EXPERTS) -> Recorded:
    """Ten seconds at two tokens a step, thirty at sixteen; the result says `tokens_per_s` in the second phase."""
    early = snapshot(10, 2)
    late = plus(early, snapshot(30, 16))
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
    snapshots = ((0.0, SnapshotReply()), (10.0, early), (40.0, late))
    return Recorded(result, snapshots, status(), CopyCost((2.0,), slows=COPY_SLOWS))


def test_what_a_run_tells_is_found_again(tmp_path: Path, model: Path) -> None:
    asked = scenario(tmp_path, opened(TEXT))
    static, run = live_config(asked, model, "static"), recorded(1.0)
    known = learn(asked, static, run, TOP_K)
    assert [known.step_cost.a_s, known.step_cost.b_s] == pytest.approx([STEP_S, STEP_TOKEN_S], rel=0.02)
    assert known.cost.a_s == pytest.approx(CALL_S, rel=0.05)
    assert 0.7 * ROW_S < known.cost.b_s < ROW_S, "single steps' busiest hosts have more rows than the mean step's"
    assert dict(known.places) == PLACES
    assert known.weights_WLE.shape == (2, LAYERS, EXPERTS)
    empty = Recorded(run.result, ((0.0, SnapshotReply()), (1.0, SnapshotReply())), status(), run.copy)
    with pytest.raises(ValueError, match="nothing was served"):
        learn(asked, static, empty, TOP_K)


def long_steps(row_s: float) -> tuple[tuple[float, SnapshotReply], ...]:
    """A step's rows are counted when it sends them, its time when it ends; windows are half a short step."""
    rng, window_s = np.random.default_rng(0), 0.5 * step_s(4)
    lines = [ReplicaTimes(replica_id=f"r{e}", tokens_total=9, b_us=row_s * 1e6) for e in range(EXPERTS)]
    snapshots, begun, ended, seconds, waits, at_s = [(0.0, SnapshotReply())], np.zeros(EXPERTS), 0, 0.0, 0.0, 0.0
    while at_s < 39:
        tokens = int(rng.choice([4, 60]))
        begun = begun + SHARES * tokens * TOP_K
        at_s += step_s(tokens) / BUSY
        while snapshots[-1][0] + window_s < at_s:
            now = SnapshotReply(
                steps_total=ended,
                step_s_total=seconds,
                expert_wait_s_total=waits,
                load=[LayerLoad(tokens=[round(rows) for rows in begun])] * LAYERS,
                replica_times=lines,
            )
            snapshots.append((snapshots[-1][0] + window_s, now))
        ended, seconds, waits = ended + 1, seconds + step_s(tokens), waits + wait_s(tokens)
    return tuple(snapshots)


def test_of_steps_longer_than_a_window_experts_tell_what_a_row_takes(tmp_path: Path, model: Path) -> None:
    asked, run = scenario(tmp_path, opened(TEXT)), recorded(1.0)
    static = live_config(asked, model, "static")
    told, guessed = (
        learn(asked, static, replace(run, snapshots=long_steps(row_s)), TOP_K).cost for row_s in (ROW_S, 0.0)
    )
    assert told.b_s == pytest.approx(ROW_S, rel=0.01)
    assert told.a_s == pytest.approx(CALL_S, rel=0.3)
    assert guessed.b_s < 0.5 * ROW_S, "else their word would not be needed"


def test_popularity_is_of_enough_tokens_and_of_one_phase(tmp_path: Path, model: Path) -> None:
    asked, run = scenario(tmp_path, opened(TEXT)), recorded(1.0)
    early, late = snapshot(10, 2), [snapshot(seconds, 16) for seconds in np.linspace(0.0, 30.0, 61)]
    snapshots = (
        (0.0, SnapshotReply()),
        (10.0, early),
        *((10 + i / 2, plus(early, one)) for i, one in enumerate(late) if i),
    )
    known = learn(asked, live_config(asked, model, "static"), replace(run, snapshots=snapshots), TOP_K)
    ends_s = known.window_end_s.tolist()
    assert ends_s[0] == 10, "the first phase has few tokens, and they are of that phase"
    assert ends_s[-1] == 40
    tokens = sum(late[-1].load[0].tokens) / TOP_K
    assert LEAST_TOKENS <= tokens / (len(ends_s) - 1) <= 1.5 * LEAST_TOKENS


def test_what_messages_and_answers_cost_is_found_again(tmp_path: Path, model: Path) -> None:
    """Of a world that is the simulator's own: what copies bring there tells the two apart from the rest."""
    asked = scenario(tmp_path, TEXT.replace("calibrate: 1,", "calibrate: 1, own_devices: true,"))
    static, run = live_config(asked, model, "static"), recorded(1.0)
    copies = [ReplicaStatus(replica_id=f"copy-{n}", expert_ids=[0], state="ready", node=n) for n in "bc"]
    kept = replace(status(), replicas=[*status().replicas, *copies])
    nothing = learn(asked, static, run, TOP_K)
    assert (nothing.message_s, nothing.answer_s) == (0, 0), "nobody said what copies bring"
    windows = [measured(run.snapshots[i][1], run.snapshots[i + 1][1], s) for i, s in ((0, 10.0), (1, 30.0))]
    fit = Fit.of(asked, static, run.first, TOP_K, nothing, windows)

    def seen(world: Known, at: ClusterStatus) -> Measured:
        result = steady(asked, static, world, at, TOP_K)
        own_s = world.step_cost.a_s * result.num_steps + world.step_cost.b_s * result.num_tokens
        own_s += world.message_s * result.num_messages
        load_LE = np.tile(SHARES * TOP_K * result.num_tokens, (LAYERS, 1))
        return Measured(result.num_steps, own_s, result.duration_s - own_s, load_LE, result.num_messages)

    def helps(calm: Measured, kept: Measured) -> float:
        return kept.token_s / calm.token_s

    for message_s, answer_s in ((3e-4, 0.0), (2e-4, 2e-3)):
        world = fit.refined(replace(nothing, message_s=message_s, answer_s=answer_s))
        spread = Spread(seen(world, run.first), seen(world, kept), kept)
        found = learn(asked, static, replace(run, spread=spread), TOP_K)
        assert found.message_s == pytest.approx(message_s, abs=3e-5)
        again = helps(seen(found, run.first), seen(found, kept))
        assert again == pytest.approx(helps(spread.calm, spread.kept), rel=0.03)
        # As long as answers hardly ever meet, their time makes no difference.
        assert found.answer_s == pytest.approx(answer_s, rel=0.2, abs=8e-4)


def test_noise_is_not_taken_for_what_messages_cost(tmp_path: Path, model: Path) -> None:
    """Of the demo model copies made for hardly more messages, and a slower minute became 9 ms for each."""
    asked, run = scenario(tmp_path), recorded(1.0)
    static = live_config(asked, model, "static")
    load_LE = np.tile(SHARES * TOP_K * 16 * 100, (LAYERS, 1))
    calm = Measured(100, 100 * STEP_S, 100 * wait_s(16), load_LE, 800)

    def message_s(own_s: float, messages: int) -> float:
        kept = Measured(100, own_s, 100 * wait_s(16), load_LE, messages)
        return learn(asked, static, replace(run, spread=Spread(calm, kept, status())), TOP_K).message_s

    assert message_s(3 * calm.own_s, 810) == 0
    assert message_s(3 * calm.own_s, 900) == pytest.approx(calm.own_s / calm.messages), "it cannot be more than all"
    assert message_s(0.5 * calm.own_s, 1600) == 0
    assert message_s(1.1 * calm.own_s, 1600) == pytest.approx(0.1 * calm.own_s / 800)


def test_between_steps_the_coordinator_is_at_work_where_clients_wait_for_answers(tmp_path: Path, model: Path) -> None:
    run = recorded(1.0)
    closed, opened_too = (
        learn(asked, live_config(asked, model, "static"), run, TOP_K).step_cost
        for asked in (scenario(tmp_path), scenario(tmp_path, opened(TEXT)))
    )
    for tokens in (2, 16):
        assert closed.seconds(tokens) - opened_too.seconds(tokens) == pytest.approx(
            step_s(tokens) * (1 / BUSY - 1), rel=0.05
        )


def opened(text: str) -> str:
    for closed, rate in OPEN.items():
        text = text.replace(closed, rate)
    return text


def test_the_run_that_told_the_constants_is_predicted_as_it_was(tmp_path: Path, model: Path) -> None:
    asked, run = scenario(tmp_path), recorded(1.0)
    static = live_config(asked, model, "static")
    predicted = predict(asked, static, learn(asked, static, run, TOP_K), run.first, TOP_K)
    found = predicted.timeline
    assert 0.9 * predicted.num_tokens < sum(found.tokens) <= predicted.num_tokens
    assert found.tokens[-2] / 2.0 == pytest.approx(BUSY * 16 / step_s(16), rel=0.2), "prompts: larger steps"
    assert set(found.copies) == {EXPERTS}, "it begins as it was found, and stays"


def test_copies_help_once_they_are_there_and_slow_steps_until_then(tmp_path: Path, model: Path) -> None:
    asked, run = scenario(tmp_path, TEXT.replace("calibrate: 1,", "calibrate: 1, own_devices: true,")), recorded(1.0)
    static, moving = (live_config(asked, model, policy) for policy in asked.policies)
    known = learn(asked, static, run, TOP_K)
    still = predict(asked, static, known, run.first, TOP_K)
    free, dear = (
        predict(asked, moving, replace(known, copy=CopyCost((2.0,), slows)), run.first, TOP_K) for slows in (1.0, 4.0)
    )
    assert free.timeline.copies[-1] > EXPERTS
    assert free.num_tokens > 1.1 * still.num_tokens
    assert dear.num_tokens < free.num_tokens


def test_figures_of_both_worlds_stand_side_by_side(tmp_path: Path, model: Path) -> None:
    asked = scenario(tmp_path, TEXT + "seeds: [7]\n")
    runs = {"static": recorded(700.0), "incremental": recorded(900.0, copies=5)}
    found = ranking.compare(asked, model, runs)
    constants, *policies = found.lines
    assert (constants["copy_s"], constants["copy_slows"]) == (2.0, COPY_SLOWS)
    for line in policies:
        live = line["live"]
        assert line["windows"]["live"][1] == [20.0, live["tokens_per_s"], live["copy_seconds_per_s"], 0]
        for name, error in line["error"].items():
            assert error == pytest.approx(line["simulated"][name] / line["live"][name] - 1)
    assert policies[0]["live"] == {"tokens_per_s": 700.0, "copy_seconds_per_s": EXPERTS}
    assert {line["seed"] for line in found.lines} == {7} == {found.seed}
    assert set(found.results) == {f"{policy} {world} #7" for policy in runs for world in ("live", "simulated")}


def round_of(seed: int, **rates: tuple[float, float]) -> ranking.Round:
    """Live and simulated tokens a second by policy."""
    figures = {
        policy: ({"tokens_per_s": live, "copy_seconds_per_s": 8.0}, {"tokens_per_s": told, "copy_seconds_per_s": 9.0})
        for policy, (live, told) in rates.items()
    }
    return ranking.Round(seed, (), figures, {})


def test_orders_are_by_medians_and_only_clear_ones_can_disagree() -> None:
    rounds = [
        round_of(0, static=(100.0, 90.0), incremental=(150.0, 160.0)),
        round_of(1, static=(400.0, 100.0), incremental=(180.0, 170.0)),
        round_of(2, static=(110.0, 120.0), incremental=(140.0, 155.0)),
    ]
    line, text = ranking.rank(rounds)
    static = line["policies"]["static"]
    assert (static["live"]["tokens_per_s"], static["simulated"]["tokens_per_s"]) == (110.0, 100.0)
    assert static["error"] == pytest.approx({"tokens_per_s": -1 / 11, "copy_seconds_per_s": 1 / 8})
    assert static["live_tokens_per_s_range"] == [100.0, 400.0]
    assert line["live"] == line["simulated"] == ["incremental", "static"]
    assert (line["seeds"], line["disagree"]) == ([0, 1, 2], [])
    assert "incremental > static" in text
    line, text = ranking.rank([round_of(0, static=(900.0, 100.0), incremental=(600.0, 150.0))])
    assert line["disagree"] == ["static and incremental"]
    assert "another order: static and incremental" in text
    line, _ = ranking.rank([round_of(0, static=(900.0, 100.0), incremental=(880.0, 150.0))])
    assert line["disagree"] == [], "live they are about equal"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("calibrate: 1", "own_devices: 1"), "own_devices is 1, but it must be true or false"),
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


def test_no_more_is_done_at_a_time_than_live(tmp_path: Path, model: Path) -> None:
    """EPLB wants to rearrange everything; what a live round would not carry out is cut off here, too."""
    asked, run = scenario(tmp_path, TEXT.replace("incremental", "eplb")), recorded(1.0)
    grain = Grain.even(LAYERS, EXPERTS, layer_bytes=1 << 20)
    at = Layout(
        grain,
        tuple(Host(node_id=NodeId(name), slots=3, memory_bytes=1 << 40) for name in "abc"),
        np.array([[PLACES[expert] == name for name in "abc"] for expert in range(EXPERTS)]),
    )
    seen = Observation(now_s=0.0, layout=at, work_LE=np.array([[0.9, 0.1, 0.1, 0.1]] * LAYERS))
    config = live_config(asked, model, "eplb")
    few = replace(config, balance_bytes_per_s=LAYERS << 19)
    bytes_moved = [moved_bytes(as_live(each, grain)(seen, None)[0]) for each in (config, few)]
    assert bytes_moved[0] > bytes_moved[1] == LAYERS << 20
    static = live_config(asked, model, "static")
    found = predict(asked, config, learn(asked, static, run, TOP_K), run.first, TOP_K)
    assert found.moved_bytes > 0


def test_where_each_expert_has_a_device_a_step_waits_for_the_busiest_expert(tmp_path: Path, model: Path) -> None:
    """The same counters: the waits are the busiest expert's then, not those of its node with another one."""
    run = recorded(1.0)
    shared, own = (
        learn(asked, live_config(asked, model, "static"), run, TOP_K)
        for asked in (
            scenario(tmp_path, opened(TEXT)),
            scenario(tmp_path, opened(TEXT).replace("calibrate: 1,", "calibrate: 1, own_devices: true,")),
        )
    )
    assert own.cost.a_s == pytest.approx(shared.cost.a_s * BUSIEST_CALLS, rel=0.05)
    assert own.cost.b_s > 1.2 * shared.cost.b_s, "for fewer rows"
