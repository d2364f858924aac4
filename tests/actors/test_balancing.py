"""The balancing loop over a supervised cluster: what a policy wants is done and told; bad ones hurt nobody."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import actors.supervision.asking as asking_module
import actors.supervision.mover as mover_module
import actors.supervision.supervisor as supervisor_module
from actors.ray_runtime import RuntimeFailure
from actors.supervision.host_control import HostControlError
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.status import ClusterStatus
from cluster.config import ClusterConfig, ConfigError
from cluster.policy import Copy
from tests.support import policies
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.held_copies import HeldCopies
from tests.support.supervised import NODES, asking, by_id, config_of, exactly, ready, supervised, until
from tests.support.tokenizers import write_byte_tokenizer

EACH = tuple(f"expert-{e}-r0" for e in range(4))
POLICIES = "tests.support.policies"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=2, experts=4, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)


def says(words: str) -> Callable[[ClusterStatus], bool]:
    return lambda status: any(words in event for event in status.events)


def paced(model: Path, policy: str) -> ClusterConfig:
    """A policy of the tests' own; copies load at a pace, so that they can be held, and fit into a round's budget."""
    return config_of(model, balance="on", balance_policy=f"{POLICIES}:{policy}", balance_bytes_per_s=1 << 23)


class FullMachine(InProcessRuntime):
    """A coordinator and one replica of each expert can be started, and nobody else."""

    def spawn(self, actor_class: type, **options: Any) -> Any:
        if len(self.spawned) > len(EACH):
            raise RuntimeFailure("the machine is full")
        return super().spawn(actor_class, **options)


class Hosts:
    """Host control that does as told, and says no more often than yes."""

    def __init__(self, refusals: int = 0) -> None:
        self.asked: list[tuple[str, Any]] = []
        self._refusals = refusals

    async def add(self, num: int) -> None:
        self._note("add", num)

    async def drain(self, node_id: str) -> None:
        self._note("drain", node_id)

    async def keep(self, node_id: str) -> None:
        self._note("keep", node_id)

    async def remove(self, node_id: str) -> None:
        self._note("remove", node_id)

    async def pending(self) -> int:
        return 0

    def _note(self, *call: Any) -> None:
        self.asked.append(call)
        if len(self.asked) <= self._refusals:
            raise HostControlError("the cloud is empty")


def test_a_copy_that_the_policy_wants_is_made_and_told(model: Path) -> None:
    config = config_of(model, balance="on", balance_policy=f"{POLICIES}:copy_the_first")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                after = await until(one, exactly(*EACH, "expert-0-r1"))
                rows = by_id(after)
                assert rows["expert-0-r1"].node != rows["expert-0-r0"].node
                after = await until(one, lambda status: len(status.balance.done) == 1)
                (move,) = after.balance.done
                assert (move["kind"], move["what"], move["node_id"]) == ("copy", "expert 0", rows["expert-0-r1"].node)
                assert (move["reason"], move["num_bytes"]) == ("a test wants it", after.balance.moved_bytes_total)
                assert after.balance.moves_total == 1
                assert after.balance.moved_bytes_total > 0
                assert says("balancing: copy expert 0 to node-1: a test wants it")(after) or says("to node-2")(after)

    run(work())


def test_a_part_of_a_group_moves_and_the_rest_stays_where_it_was(model: Path) -> None:
    config = config_of(
        model, balance="on", balance_policy=f"{POLICIES}:move_the_first", experts_per_actor=2, balance_layer_ranges=2
    )

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly("experts-0-1-r0", "experts-2-3-r0"))
            home = by_id(first)["experts-0-1-r0"].node
            async with asking(first) as client:
                names = ("expert-0-l0-0-r0", "expert-1-l0-0-r0", "experts-0-1-l1-1-r0", "experts-2-3-r0")
                rows = by_id(await until(one, exactly(*names)))
                assert rows[names[0]].node != home
                assert {rows[name].node for name in names[1:3]} == {home}
                after = await until(one, lambda status: status.balance.moves_total == 2)
                assert [move["kind"] for move in after.balance.done] == ["copy", "drop"]
                assert after.balance.done[0]["what"] == "expert 0 in layers 0-0"
                await client.more()

    run(work())


def test_a_dry_run_only_tells(model: Path) -> None:
    config = config_of(model, balance="dry_run", balance_policy=f"{POLICIES}:copy_the_first")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                await until(one, says("balancing would copy expert 0 to node-"))
                plan = await one.balance(True)
                assert plan["moves"] == [], "its state says that it has spoken"
            status = await until(one, ready)
            assert exactly(*EACH)(status)
            assert (status.balance.mode, status.balance.done) == ("dry_run", [])

    run(work())


def test_asking_by_hand_changes_nothing_until_it_is_meant(model: Path) -> None:
    config = config_of(model, balance_policy=f"{POLICIES}:copy_the_first")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await client.more(30)
                plans = [await one.balance(True) for _ in range(2)]
                assert [[move["what"] for move in plan["moves"]] for plan in plans] == [["expert 0"]] * 2
                assert plans[0]["moved_bytes"] > 0
                assert plans[0]["busiest_share_before"] > 0
                assert plans[0]["busiest_share_after"] > 0
                assert 0 < plans[0]["balancedness_before"] <= 1
                done = await one.balance(False)
                assert [move["what"] for move in done["moves"]] == ["expert 0"]
                assert done["failed"] == []
                assert exactly(*EACH, "expert-0-r1")(await until(one, ready)), "it returned when it was done"

    run(work())


def test_a_copy_that_cannot_load_is_taken_back_and_the_policy_hears_of_it(model: Path) -> None:
    runtime = FullMachine(NODES)
    config = config_of(model, balance_policy=f"{POLICIES}:copy_the_first")

    async def work() -> None:
        async with supervised(config, runtime) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await client.more(30)
                await one.switch_balance("on")
                after = await until(one, lambda status: len(status.balance.failed) >= 1)
                assert "the machine is full" in after.balance.failed[0]["error"]
                assert says("balancing could not copy expert 0 to node-")(after)
                after = await until(one, exactly(*EACH))
                assert (after.balance.moves_total, after.balance.proposed) == (0, [])
                # This policy keeps what it is told in its own half of the state; the other half is the house's pauses.
                await until(one, lambda status: bool(one._balancing._state[1]))
                (told,) = one._balancing._state[1]
                assert isinstance(told, Copy)
                assert told.unit == 0

    run(work())


def test_nodes_load_side_by_side_and_what_was_to_follow_a_failure_is_left_undone(model: Path) -> None:
    runtime = FullMachine(NODES)
    config = config_of(model, balance_policy=f"{POLICIES}:copy_three_to_two_nodes")

    async def work() -> None:
        async with supervised(config, runtime) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await client.more(30)
                await one.switch_balance("on")
                after = await until(one, lambda status: len(status.balance.failed) == 2)
                assert {move["what"] for move in after.balance.failed} == {"expert 0", "expert 1"}
                assert len({move["node_id"] for move in after.balance.failed}) == 2
                after = await until(one, exactly(*EACH))
                assert (len(after.balance.failed), after.balance.moves_total) == (2, 0)

    run(work())


def test_all_copies_of_a_round_are_made(model: Path) -> None:
    config = config_of(model, balance="on", balance_policy=f"{POLICIES}:copy_three_to_two_nodes")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                await until(one, exactly(*EACH, "expert-0-r1", "expert-1-r1", "expert-2-r1"))
                after = await until(one, lambda status: len(status.balance.done) == 3)
                assert {move["what"] for move in after.balance.done} == {"expert 0", "expert 1", "expert 2"}
                assert (len(after.balance.failed), after.balance.moves_total) == (0, 3)

    run(work())


def test_a_copy_does_not_wait_for_what_happens_elsewhere(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldCopies(monkeypatch, lambda expert, _: expert == 0)
    config = paced(model, "move_one_and_copy_another")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                after = await until(one, lambda status: len(status.balance.done) == 1)
                assert (after.balance.done[0]["kind"], after.balance.done[0]["what"]) == ("copy", "expert 1")
                assert by_id(after)["expert-0-r0"].state == "ready", "nobody else has it yet"
                held.go()
                after = await until(one, exactly(*EACH[1:], "expert-0-r1", "expert-1-r1"))
                done = (await until(one, lambda status: len(status.balance.done) == 3)).balance.done
                assert [(move["kind"], move["what"]) for move in done[1:]] == [
                    ("copy", "expert 0"),
                    ("drop", "expert 0"),
                ]
                await client.more()

    run(work())


def test_nodes_of_one_machine_load_one_after_another(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldCopies(monkeypatch, lambda expert, _: expert == 0)
    one_machine = InProcessRuntime(tuple(replace(node, address="127.0.0.1") for node in NODES))
    config = paced(model, "copy_three_to_two_nodes")

    async def work() -> None:
        async with supervised(config, one_machine) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await until(one, lambda status: "expert-0-r1" in by_id(status))
                await client.more(10)
                assert set(by_id(await until(one, ready))) == {*EACH, "expert-0-r1"}
                held.go()
                after = await until(one, lambda status: len(status.balance.done) == 3)
                assert [move["what"] for move in after.balance.done] == ["expert 0", "expert 1", "expert 2"]

    run(work())


def test_who_changes_what_is_desired_ends_the_round(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldCopies(monkeypatch, lambda expert, _: expert == 0)
    config = paced(model, "move_one_and_copy_another")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                await until(one, lambda status: len(status.balance.done) == 1)
                by_hand = await one.replicate(3, None, None, None)
                held.go()
                after = await until(one, lambda status: status.balance.proposed == [])
                await until(one, exactly(*EACH, "expert-0-r1", "expert-1-r1", by_hand["replica_id"]))
                assert [move["kind"] for move in after.balance.done] == ["copy", "copy"], "expert 0 is not dropped"

    run(work())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("raise_an_error", "the policy raised ZeroDivisionError: the policy's own mistake"),
        ("talk_nonsense", "the policy's answer is refused: it returned ('copy everything everywhere'"),
        ("think_long", "the policy did not answer within 0.1 s"),
    ],
)
def test_a_policy_that_misbehaves_is_skipped_and_said(
    model: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    timeout_s = 0.1 if name == "think_long" else 200.0
    monkeypatch.setattr(asking_module.Asker.__init__, "__kwdefaults__", {"timeout_s": timeout_s})
    policies.THOUGHT.clear()
    config = config_of(model, balance="on", balance_policy=f"{POLICIES}:{name}")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                status = await until(one, says(f"balancing skips a round: {words}"))
                with pytest.raises(RuntimeFailure, match="the policy"):
                    await one.balance(True)
                await client.more()
                assert status.state == "ready"
                await one.switch_balance("off")

    try:
        run(work())
    finally:
        policies.THOUGHT.set()


def test_the_last_copy_is_not_dropped_whoever_says_so(model: Path) -> None:
    config = config_of(model, balance="on", balance_policy=f"{POLICIES}:drop_the_last")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await client.more(30)
                assert (await one.balance(True))["moves"] == []
            assert exactly(*EACH)(await until(one, ready))

    run(work())


def test_hosts_are_asked_for_and_a_refusal_is_told(model: Path) -> None:
    hosts = Hosts(refusals=1)
    config = config_of(model, balance="on", balance_policy=f"{POLICIES}:ask_for_hosts")

    async def work() -> None:
        async with supervised(config, hosts=hosts) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                status = await until(one, lambda status: len(status.balance.done) >= 2)
                assert hosts.asked[:3] == [("add", 1)] * 3
                assert status.balance.failed[0]["error"] == "the cloud is empty"
                assert status.balance.done[0] | {"at": 0} == {
                    "kind": "add_hosts",
                    "what": "1 hosts",
                    "node_id": "",
                    "source": "",
                    "num_bytes": 0,
                    "reason": "more is more",
                    "at": 0,
                }
                assert status.balance.moves_total == 0

    run(work())


def test_without_host_control_that_is_said(model: Path) -> None:
    config = config_of(model, balance="on", balance_policy=f"{POLICIES}:ask_for_hosts")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first):
                await until(one, says("no host control: 1 more nodes would help"))

    run(work())


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("clever", "balance_policy is 'clever', but must be one of static, reactive"),
        (f"{POLICIES}:nothing", "which cannot be loaded"),
        ("no.such.module:policy", "which cannot be loaded"),
        (f"{POLICIES}:not_a_function", "which is int, not a function"),
    ],
)
def test_a_policy_that_there_is_not_ends_the_start(model: Path, policy: str, words: str) -> None:
    async def work() -> None:
        with pytest.raises(ConfigError, match=words):
            async with supervised(config_of(model, balance_policy=policy)):
                pass

    run(work())


def test_a_move_has_a_time_limit(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover_module, "START_S", 0.0)
    config = config_of(model, balance_policy=f"{POLICIES}:copy_the_first")

    async def work() -> None:
        async with supervised(config) as one:
            first = await until(one, exactly(*EACH))
            async with asking(first) as client:
                await client.more(30)
                done = await one.balance(False)
                assert done["failed"][0]["error"] == "not done within 0 s"
                await until(one, exactly(*EACH))

    run(work())
