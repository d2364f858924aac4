"""A reply ends once, tells everybody who waits at once, and is ignored by those who do not."""

import asyncio

import pytest

from actors.dispatch.transport import ExpertReply, PendingReply, TransportError
from protos import expert_pb2 as pb
from tests.support.experts import run

FINE = ExpertReply(pb.STATUS_OK)
OTHER = ExpertReply(pb.STATUS_OVERLOADED, "full")


def test_it_ends_once() -> None:
    reply = PendingReply()
    assert not reply.done()
    with pytest.raises(asyncio.InvalidStateError):
        reply.outcome()
    reply.end(FINE)
    reply.end(OTHER)
    reply.cancel()
    assert (reply.done(), reply.cancelled(), reply.outcome()) == (True, False, FINE)


def test_what_comes_after_nobody_waits_is_ignored() -> None:
    reply = PendingReply()
    reply.cancel()
    reply.end(FINE)
    assert (reply.done(), reply.cancelled()) == (True, True)
    with pytest.raises(asyncio.CancelledError):
        reply.outcome()


@pytest.mark.parametrize("ends", [lambda reply: reply.end(FINE), PendingReply.cancel])
def test_callbacks_run_at_once_in_order_and_once(ends: object) -> None:
    assert callable(ends)
    reply, called = PendingReply(), list[int]()
    for number in range(4):
        reply.when_done(lambda one, number=number: called.append(number) if one is reply else None)  # type: ignore[misc]
    assert called == []
    ends(reply)
    assert called == [0, 1, 2, 3]
    reply.when_done(lambda _: called.append(4))
    reply.end(OTHER)
    assert called == [0, 1, 2, 3, 4]


def test_a_callback_sees_the_outcome_and_may_add_another() -> None:
    reply, seen = PendingReply(), list[object]()
    reply.when_done(lambda one: one.when_done(lambda same: seen.append(same.outcome())))
    reply.end(FINE)
    assert seen == [FINE]


def test_awaiting_gives_the_reply_or_raises() -> None:
    async def work() -> None:
        waiting = [PendingReply() for _ in range(3)]
        tasks = [asyncio.create_task(_await(reply)) for reply in waiting]
        await asyncio.sleep(0)  # they wait
        waiting[0].end(FINE)
        waiting[1].end(TransportError("cut"))
        waiting[2].cancel()
        assert await tasks[0] == FINE
        with pytest.raises(TransportError, match="cut"):
            await tasks[1]
        with pytest.raises(asyncio.CancelledError):
            await tasks[2]
        assert await waiting[0] == FINE  # again, and now without waiting

    run(work())


def test_several_may_wait_and_one_who_leaves_does_not_disturb_the_others() -> None:
    async def work() -> None:
        reply = PendingReply()
        tasks = [asyncio.create_task(_await(reply)) for _ in range(3)]
        await asyncio.sleep(0)  # they wait
        tasks[1].cancel()
        await asyncio.wait({tasks[1]})
        assert not reply.done()
        reply.end(FINE)
        assert await asyncio.gather(tasks[0], tasks[2]) == [FINE, FINE]

    run(work())


def test_waiting_ends_with_the_time_or_the_reply() -> None:
    async def work() -> None:
        reply = PendingReply()
        assert not await reply.wait(0.001)
        assert not await reply.wait(0)
        waiting = asyncio.create_task(reply.wait())
        await asyncio.sleep(0)  # it waits
        reply.cancel()
        assert await waiting
        assert await reply.wait(0)

    run(work())


async def _await(reply: PendingReply) -> ExpertReply:
    return await reply
