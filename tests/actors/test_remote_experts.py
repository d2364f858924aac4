"""Remote equals local bit for bit, whoever dies, lies, is full, is slow or comes back meanwhile."""

import asyncio
import signal
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from actors.dispatch.remote_experts import ExpertUnavailable, MapRejected, Patience, RemoteExperts
from actors.expert.actor import ExpertActor
from cluster.expert_map import ExpertMap
from model.dispatch import combine
from model.numerics import same_bits
from protos import expert_pb2 as pb
from tests.support import expert_process
from tests.support.experts import WIDTH, FakeColumn, map_of, run, served
from tests.support.fake_replicas import (
    EXPERTS,
    HIDDEN,
    LAYERS,
    TOGETHER,
    FakeLanes,
    TheFirst,
    actor_arguments,
    entry,
    expected,
    info,
    local,
    plan_of,
    real_plan,
    remote,
    write_model,
)
from tests.support.idle_clock import run_idle

# ---- remote equals local ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("mixtral"))


@pytest.mark.parametrize("lane", [0, HIDDEN], ids=["grpc", "shm"])
@pytest.mark.parametrize("kernel", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("groups", [[[0], [1], [2], [3]], [[0, 2], [1, 3]], [[3, 1, 0, 2]]])
def test_remote_equals_local_bit_for_bit(model: Path, lane: int, kernel: str, groups: list[list[int]]) -> None:
    async def work() -> None:
        oracle = local(model, kernel)
        async with AsyncExitStack() as stack:
            facts = []
            for number, group in enumerate(groups):
                actor = ExpertActor(**actor_arguments(model, f"r{number}", group, kernel))
                await actor.start()
                stack.push_async_callback(actor.stop)
                facts.append(await actor.wait_settled())
            replicas = [entry(fact) for fact in facts]
            async with remote(map_of(*replicas, experts=EXPERTS), lane=lane, attempt_s=100) as experts:
                for tokens in (1, 2, 7, 33):
                    for layer in range(LAYERS):
                        plan = real_plan(tokens, seed=tokens)
                        answers = combine(await experts.run(layer, plan), plan)
                        assert same_bits(answers, combine(oracle.run(layer, plan), plan))
                assert experts.stats.retries == 0
                wire = experts.stats.wire
                assert wire.messages > 0
                assert wire.lane_messages == (wire.messages if lane else 0)
                assert bool(wire.merged_messages) == (lane == 0 and len(groups) < EXPERTS)

    run(work())


@pytest.mark.parametrize("lane", [0, HIDDEN], ids=["grpc", "shm"])
def test_a_process_frozen_or_killed_in_the_middle_of_a_message_changes_no_bit(model: Path, lane: int) -> None:
    async def work() -> None:
        everything = list(range(EXPERTS))
        names = ("a", "b")
        started = await asyncio.gather(
            *(expert_process.spawn(**actor_arguments(model, name, everything)) for name in names)
        )
        processes = [process for process, _ in started]
        replicas = [entry(facts) for _, facts in started]
        oracle, plan = local(model, "fp16"), real_plan(40)
        try:
            # nobody is hedged here: only the end of a connection tells
            async with remote(map_of(*replicas, experts=EXPERTS), lane=lane, attempt_s=100) as experts:
                experts._pool._selector = TheFirst()
                assert same_bits(combine(await experts.run(0, plan), plan), combine(oracle.run(0, plan), plan))
                await expert_process.freeze(processes[0])  # its sockets stay open: only its silence tells
                assert same_bits(combine(await experts.run(0, plan), plan), combine(oracle.run(0, plan), plan))
                assert set(experts.stats.retry_reasons) == {"CONNECTION"}, "long before its answer was overdue"
                processes[0].send_signal(signal.SIGCONT)
                await experts.wait_ready(100, all_replicas=True)
                await expert_process.freeze(processes[0])  # it will have the rows, and not have answered
                running = asyncio.create_task(experts.run(1, plan))
                done, _ = await asyncio.wait({running}, timeout=0.5)
                assert not done
                processes[0].kill()
                assert same_bits(combine(await running, plan), combine(oracle.run(1, plan), plan))
                assert experts.stats.retries >= 2
                assert experts.stats.retry_reasons["CONNECTION"] >= 2
                for layer in range(LAYERS):
                    assert same_bits(
                        combine(await experts.run(layer, plan), plan), combine(oracle.run(layer, plan), plan)
                    )
        finally:
            for process in processes:
                await expert_process.end(process)

    run(work())


# ---- real sockets, simple columns -------------------------------------------------------------------------


def test_a_server_cut_off_in_the_middle_of_a_message_is_replayed_on_the_second() -> None:
    async def work() -> None:
        first, second = FakeColumn(0), FakeColumn(0)
        first.gate.clear()
        async with (
            served(first, experts=[0], replica_id="a") as one,
            served(second, experts=[0], replica_id="b") as two,
            remote(map_of(one.info(), two.info(), experts=1), attempt_s=100) as experts,
        ):
            plan = plan_of([6])
            running = asyncio.create_task(experts.run(1, plan))
            assert await asyncio.to_thread(first.entered.wait, 100)
            stopping = asyncio.create_task(one.server.stop(0))
            assert torch.equal(await running, expected(plan, 1))
            assert second.calls == [(1, 6)]
            assert experts.stats.retries == 1
            first.gate.set()
            await stopping

    run(work())


def test_the_only_replica_gone_and_back_elsewhere_is_waited_for() -> None:
    async def work() -> None:
        plan = plan_of([3, 2])
        async with served(FakeColumn(1), experts=[1], replica_id="b") as other, AsyncExitStack() as stack:
            blocked = FakeColumn(0)
            blocked.gate.clear()
            lost = await stack.enter_async_context(served(blocked, experts=[0], replica_id="a"))
            async with remote(map_of(lost.info(), other.info())) as experts:
                running = asyncio.create_task(experts.run(0, plan))
                assert await asyncio.to_thread(blocked.entered.wait, 100)
                stopping = asyncio.create_task(stack.aclose())
                while not experts.stats.waits:
                    await asyncio.wait({running}, timeout=0.01)
                blocked.gate.set()
                await stopping
                assert not running.done()
                async with served(FakeColumn(0), experts=[0], replica_id="a") as back:
                    assert back.server.address != lost.server.address
                    experts.apply_map(map_of(back.info(), other.info(), epoch=2))
                    assert torch.equal(await running, expected(plan, 0))

    run(work())


def test_a_replica_that_returns_to_its_old_port_is_found_without_a_new_map() -> None:
    async def work() -> None:
        plan = plan_of([3])
        async with AsyncExitStack() as stack:
            there = await stack.enter_async_context(served(FakeColumn(0), experts=[0]))
            async with remote(map_of(there.info(), experts=1)) as experts:
                assert torch.equal(await experts.run(0, plan), expected(plan, 0))
                await stack.aclose()
                running = asyncio.create_task(experts.run(1, plan))
                async with served(FakeColumn(0), experts=[0], port=there.server.port):
                    assert torch.equal(await running, expected(plan, 1))

    run(work())


def test_a_full_replica_is_asked_again_until_it_has_room() -> None:
    async def work() -> None:
        column = FakeColumn(0)
        column.gate.clear()
        async with (
            served(column, experts=[0], max_queue_tokens=4) as there,
            remote(map_of(there.info(), experts=1)) as experts,
        ):
            plans = [plan_of([3], seed) for seed in range(3)]
            running = [asyncio.create_task(experts.run(0, plan)) for plan in plans]
            while experts.stats.retry_reasons["OVERLOADED"] < 3:
                await asyncio.wait(running, timeout=0.01)
            column.gate.set()
            for plan, task in zip(plans, running, strict=True):
                assert torch.equal(await task, expected(plan, 0))
            assert there.replica.counters.tokens_total == 9

    run(work())


def test_a_stale_map_waits_for_the_next_one() -> None:
    async def work() -> None:
        async with (
            served(FakeColumn(0), experts=[0], min_map_epoch=2) as there,
            remote(map_of(there.info(), experts=1)) as experts,
        ):
            plan = plan_of([1])
            running = asyncio.create_task(experts.run(0, plan))
            while not experts.stats.retry_reasons["STALE_EPOCH"]:
                await asyncio.wait({running}, timeout=0.01)
            experts.apply_map(map_of(there.info(), epoch=2, experts=1))
            assert torch.equal(await running, expected(plan, 0))

    run(work())


def test_a_draining_replica_gets_nothing_new() -> None:
    async def work() -> None:
        async with (
            served(FakeColumn(0), experts=[0], replica_id="a") as one,
            served(FakeColumn(0), experts=[0], replica_id="b") as two,
            remote(map_of(one.info(), two.info(), experts=1), attempt_s=100) as experts,
        ):
            await one.service.drain(1)
            for seed in range(5):
                plan = plan_of([2], seed)
                assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert experts.stats.retry_reasons == {"DRAINING": 1}
            assert one.replica.counters.messages_total == 1

    run(work())


# ---- every other way to fail, without sockets -------------------------------------------------------------


def test_one_message_per_expert_with_rows() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), info("b", [1]), info("c", [2]), experts=3), lanes) as experts:
            plan = plan_of([4, 0, 3])
            assert torch.equal(await experts.run(1, plan), expected(plan, 1))
            assert [len(lanes[name].requests) for name in "abc"] == [1, 0, 1]
            request = lanes["a"].requests[0]
            assert (request.layer_id, request.parts[0].expert_id, request.map_epoch) == (1, 0, 1)
            assert (experts.stats.compute_us, experts.stats.queue_us) == (6, 4)

    run_idle(work())


def test_a_plan_without_rows_asks_nobody() -> None:
    async def work() -> None:
        async with remote(None) as experts:
            assert (await experts.run(0, plan_of([0, 0]))).shape == (0, WIDTH)

    run_idle(work())


def test_rows_beyond_one_message_travel_in_several() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        experts = RemoteExperts(lanes, max_message_rows=4)
        experts.apply_map(map_of(info("a", [0, 1])))
        await experts.wait_ready(5)
        plan = plan_of([9, 4])
        assert torch.equal(await experts.run(0, plan), expected(plan, 0))
        assert [request.num_rows for request in lanes["a"].requests] == [4, 4, 1, 4]
        await experts.close()

    run_idle(work())


def test_rows_by_a_lane_are_cut_only_where_a_queue_might_be_too_short() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        lanes.shared = {"a"}
        experts = RemoteExperts(lanes, max_message_rows=4)
        experts.apply_map(map_of(info("a", [0, 1])))
        await experts.wait_ready(5)
        for counts, messages in (([9, 4], [13]), ([5000, 4], [4096, 908]), ([4090, 4090], [4090, 4090])):
            lanes["a"].requests.clear()
            plan = plan_of(counts)
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert [request.num_rows for request in lanes["a"].requests] == messages
        await experts.close()

    run_idle(work())


@pytest.mark.parametrize("refusals", [[], [pb.STATUS_OVERLOADED, pb.STATUS_INTERNAL]], ids=["at once", "in the end"])
def test_rows_of_a_lane_that_is_lost_travel_in_messages_that_fit(refusals: list[pb.Status]) -> None:
    async def work() -> None:
        lanes = FakeLanes()
        lanes.shared = {"a"}
        experts = RemoteExperts(lanes, Patience(deadline_s=20), max_message_rows=4, selector=TOGETHER)
        experts.apply_map(map_of(info("a", [0, 1]), info("b", [0, 1])))
        await experts.wait_ready(5, all_replicas=True)
        lanes["a"].silent = True
        lanes["b"].refuse = list(refusals)
        plan = plan_of([9, 3])
        running = asyncio.create_task(experts.run(0, plan))
        await lanes["a"].arrived.acquire()
        asked, late = lanes["a"].requests[0], lanes["a"].replies[0]
        assert asked.num_rows == 12
        lanes.unreachable = {"a"}
        lanes["a"].fail()
        assert torch.equal(await running, expected(plan, 0))
        late.end(lanes["a"].fine(asked))  # nobody waits
        sizes = [request.num_rows for request in lanes["b"].requests]
        assert len(sizes) >= 3 + len(refusals)
        assert max(sizes) == 4
        assert refusals or sizes == [4, 4, 4]  # the nine rows in pieces, and what is left together with the three
        await experts.close()

    run_idle(work())


def test_every_answer_is_copied_where_it_arrives() -> None:
    """Memory of a lane is used again at once: a turn of the loop later other rows may lie there."""

    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            lanes["a"].refuse = [pb.STATUS_OVERLOADED]
            plan = plan_of([3])
            running = asyncio.create_task(experts.run(0, plan))
            await lanes["a"].arrived.acquire()
            lanes["a"].silent = True
            await lanes["a"].arrived.acquire()  # asked again, by the task that pursues the part
            answered = lanes["a"].fine(lanes["a"].requests[1])
            assert answered.output is not None
            lanes["a"].replies[1].end(answered)
            answered.output.fill_(float("nan"))
            assert torch.equal(await running, expected(plan, 0))
            assert (experts.stats.compute_us, experts.stats.queue_us) == (3, 2)

    run_idle(work())


def test_parts_go_to_the_replica_with_least_in_flight() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), info("b"), experts=1), lanes) as experts:
            lanes["a"].silent = True
            first = asyncio.create_task(experts.run(0, plan_of([5])))
            await lanes["a"].arrived.acquire()
            plan = plan_of([2])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert len(lanes["b"].requests) == 1
            lanes["a"].replies[0].end(lanes["a"].fine(lanes["a"].requests[0]))
            assert (await first).shape == (5, WIDTH)

    run_idle(work())


@pytest.mark.parametrize("status", [pb.STATUS_CORRUPT, pb.STATUS_INTERNAL, pb.STATUS_NOT_HELD, pb.STATUS_INVALID])
def test_a_refusal_is_taken_to_the_other_replica_at_once(status: pb.Status) -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), info("b"), experts=1), lanes) as experts:
            lanes["a"].refuse = [status]
            plan = plan_of([3])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert (len(lanes["a"].requests), len(lanes["b"].requests)) == (1, 1)
            assert (experts.stats.retries, experts.stats.waits) == (1, 0)

    run_idle(work())


@pytest.mark.parametrize("status", [pb.STATUS_CORRUPT, pb.STATUS_DEADLINE_EXCEEDED, pb.STATUS_OVERLOADED])
def test_the_only_replica_is_asked_again_after_a_pause(status: pb.Status) -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            lanes["a"].refuse = [status, status]
            plan = plan_of([3])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert (experts.stats.retries, experts.stats.waits) == (2, 2)

    run_idle(work())


def test_rows_that_every_replica_refuses_are_given_up() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            lanes["a"].refuse = [pb.STATUS_INTERNAL] * 9
            with pytest.raises(ExpertUnavailable, match="expert 0 in layer 1 is unavailable: 4 times INTERNAL"):
                await experts.run(1, plan_of([3]))
            assert len(lanes["a"].requests) == 4

    run_idle(work())


def test_nobody_to_ask_until_the_deadline_is_an_error_with_the_reason() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        lanes.unreachable = {"a"}
        async with remote(None, lanes, deadline_s=0.2) as experts:
            experts.apply_map(map_of(info("a"), experts=1))
            with pytest.raises(ExpertUnavailable, match="a: unreachable as told") as caught:
                await experts.run(1, plan_of([3]))
            assert (caught.value.expert, caught.value.layer) == (0, 1)
            with pytest.raises(ExpertUnavailable, match="a: unreachable as told"):
                await experts.wait_ready(0.05)

    run_idle(work())


def test_without_a_map_nobody_can_be_asked() -> None:
    async def work() -> None:
        async with remote(None, FakeLanes(), deadline_s=0.05) as experts:
            with pytest.raises(ExpertUnavailable, match="no map has been applied"):
                await experts.run(0, plan_of([1]))

    run_idle(work())


def test_the_only_replica_that_is_silent_is_waited_for_until_the_deadline() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes, deadline_s=0.3, attempt_s=0.05) as experts:
            lanes["a"].silent = True
            with pytest.raises(ExpertUnavailable, match="no answer before the deadline"):
                await experts.run(0, plan_of([3]))
            assert len(lanes["a"].requests) == 1  # asking a slow replica twice would make it slower
            assert lanes["a"].replies[0].cancelled()
            lanes["a"].silent = False
            assert (await experts.run(0, plan_of([3]))).shape == (3, WIDTH)

    run_idle(work())


def test_a_silent_replica_is_passed_over_until_it_answers() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), info("b"), experts=1), lanes, attempt_s=0.05) as experts:
            slow, plan = lanes["a"], plan_of([3])
            slow.silent = True
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert experts.stats.retry_reasons == {"SLOW": 1}
            assert torch.equal(await experts.run(1, plan), expected(plan, 1))  # at once, from the other
            assert (len(slow.requests), experts.stats.retries) == (1, 1)
            slow.silent = False
            slow.replies[0].end(slow.fine(slow.requests[0]))
            await asyncio.sleep(0)  # its callbacks run
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert (len(slow.requests), experts.stats.retries) == (2, 1)

    run_idle(work())


def test_a_replica_under_suspicion_is_better_than_none() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), info("b"), experts=1), lanes, attempt_s=0.05) as experts:
            plan = plan_of([3])
            lanes["a"].silent = True
            await experts.run(0, plan)
            lanes["a"].silent = False
            lanes.unreachable = {"b"}
            lanes["b"].fail()
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert len(lanes["a"].requests) == 2

    run_idle(work())


def test_an_answer_after_patience_is_over_still_counts() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes, attempt_s=0.02) as experts:
            lanes["a"].silent = True
            plan = plan_of([3])
            running = asyncio.create_task(experts.run(0, plan))
            await asyncio.wait({running}, timeout=0.1)
            lanes["a"].replies[0].end(lanes["a"].fine(lanes["a"].requests[0]))
            assert torch.equal(await running, expected(plan, 0))
            assert experts.stats.retries == 0

    run_idle(work())


def test_the_deadline_on_the_wire_is_absolute_and_the_same_for_a_replay() -> None:
    async def work() -> None:
        lanes, now = FakeLanes(), 5_000_000_000
        both = map_of(info("a"), info("b"), experts=1)
        async with remote(both, lanes, deadline_s=20.0, wall_us=lambda: now) as experts:
            lanes["a"].refuse = [pb.STATUS_CORRUPT]
            await experts.run(0, plan_of([1]))
            first, second = (lanes[name].requests[0].deadline_unix_us for name in "ab")
            assert first == second == now + 20_000_000

    run_idle(work())


def test_a_cancelled_run_leaves_nothing_behind() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), info("b", [1])), lanes) as experts:
            lanes["a"].silent = True
            lanes["b"].refuse = [pb.STATUS_OVERLOADED] * 99
            before = asyncio.all_tasks()
            running = asyncio.create_task(experts.run(0, plan_of([3, 3])))
            await lanes["a"].arrived.acquire()
            await lanes["b"].arrived.acquire()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            for _ in range(5):  # a cancelled task needs a few turns of the loop to end
                await asyncio.sleep(0)
            assert asyncio.all_tasks() == before
            assert lanes["a"].replies[0].cancelled()

    run_idle(work())


def test_close_ends_a_run_that_waits() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            lanes["a"].silent = True
            running = asyncio.create_task(experts.run(0, plan_of([3])))
            await lanes["a"].arrived.acquire()
            await experts.close()
            with pytest.raises(ExpertUnavailable, match="closed here"):
                await running
            with pytest.raises(MapRejected, match="closed"):
                experts.apply_map(map_of(info("a"), experts=1, epoch=2))

    run_idle(work())


# ---- maps -------------------------------------------------------------------------------------------------


def test_a_new_map_moves_the_work_and_lets_the_old_replica_finish() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            old = lanes["a"]
            old.silent = True
            plan = plan_of([2])
            running = asyncio.create_task(experts.run(0, plan))
            await old.arrived.acquire()
            experts.apply_map(map_of(info("b"), experts=1, epoch=2))
            await experts.wait_ready(5)
            assert torch.equal(await experts.run(1, plan), expected(plan, 1))
            assert lanes["b"].requests[0].map_epoch == 2
            assert not old.closed.is_set()
            old.replies[0].end(old.fine(old.requests[0]))
            assert torch.equal(await running, expected(plan, 0))
            await old.closed.wait()  # idle now, and in no map
            assert experts.alarms == 0

    run_idle(work())


def test_a_map_that_says_the_same_of_a_replica_keeps_its_connection() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            experts.apply_map(map_of(info("a"), info("b"), experts=1, epoch=2))
            await experts.wait_ready(5)
            assert len(lanes.made["a"]) == 1
            experts.apply_map(map_of(info("a", address="elsewhere:1"), experts=1, epoch=3))
            await experts.wait_ready(5)
            await lanes.made["a"][0].closed.wait()
            assert lanes["a"].replica.address == "elsewhere:1"
            assert experts.expert_map is not None
            assert experts.expert_map.epoch == 3

    run_idle(work())


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (map_of(info("a"), experts=1, epoch=4), "epoch 4 is not newer than 5"),
        (map_of(info("b"), experts=1, epoch=5), "epoch 5 is not newer than 5"),
        (map_of(info("a"), experts=2, epoch=6), "lacks 2 places: expert 1 in layer 0, expert 1 in layer 1"),
        (map_of(experts=1, epoch=6), "lacks 2 places: expert 0 in layer 0"),
        (map_of(info("a", [0, 1]), experts=2, epoch=6), "of another model: 2x2, not 2x1"),
    ],
)
def test_a_bad_map_is_rejected_and_the_old_one_stays(bad: ExpertMap, said: str) -> None:
    async def work() -> None:
        lanes = FakeLanes()
        good = map_of(info("a"), experts=1, epoch=5)
        async with remote(good, lanes) as experts:
            with pytest.raises(MapRejected, match=said):
                experts.apply_map(bad)
            assert experts.expert_map == good
            experts.apply_map(good)  # again: nothing happens
            plan = plan_of([2])
            assert torch.equal(await experts.run(0, plan), expected(plan, 0))
            assert len(lanes.made["a"]) == 1

    run_idle(work())


def test_a_lost_connection_is_made_again() -> None:
    async def work() -> None:
        lanes = FakeLanes()
        async with remote(map_of(info("a"), experts=1), lanes) as experts:
            plan = plan_of([2])
            for times in range(1, 4):
                lost = lanes["a"]
                lost.silent, lost.arrived = True, asyncio.Semaphore(0)
                running = asyncio.create_task(experts.run(0, plan))
                await lost.arrived.acquire()
                lost.fail()
                assert torch.equal(await running, expected(plan, 0))
                assert len(lanes.made["a"]) == times + 1
            assert experts.stats.retry_reasons == {"CONNECTION": 3}
            assert experts.alarms == 3, "it may have gone because it had caught itself"

    run_idle(work())


def test_another_numerics_domain_is_an_alarm_and_another_replica_is_none() -> None:
    async def work() -> None:
        async with remote(map_of(info("a"), experts=1), FakeLanes()) as experts:
            experts.apply_map(map_of(info("b"), experts=1, epoch=2))
            assert experts.alarms == 0
            other = replace(info("b"), numerics_domain="another", address="elsewhere:1")
            experts.apply_map(map_of(other, experts=1, epoch=3))
            assert experts.alarms == 1, "the same rows would get other bits now"

    run_idle(work())
