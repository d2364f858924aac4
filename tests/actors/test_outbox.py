"""The outbox: merged per request, bounded, and cut into messages of bounded size without losing anything."""

import asyncio
import random

import pytest

from actors.coordinator import outbox as outbox_module
from actors.coordinator.outbox import MAX_PENDING_ANSWERS, Outbox, OutboxOverflow, cut, entries, positions
from protos.coordinator_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    PositionLogprobs,
    SequenceOutput,
    TokenLogprob,
)
from protos.outputs import is_last

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def place(token: int, alternatives: int = 0) -> PositionLogprobs:
    return PositionLogprobs(
        chosen=TokenLogprob(token_id=token, logprob=-1.0, rank=1),
        top=[TokenLogprob(token_id=one, rank=one + 1) for one in range(alternatives)],
    )


def output(request_id: int, *tokens: int, **fields: object) -> SequenceOutput:
    return SequenceOutput(request_id=request_id, token_ids=tokens, **fields)  # type: ignore[arg-type]


async def test_what_nobody_took_is_merged_by_request_in_order_of_arrival() -> None:
    box = Outbox()
    box.push([output(1, 10), output(2, 20)])
    box.push([output(1, 11), output(2, 21, finish_reason=FINISH_REASON_LENGTH)])
    reply = box.take()
    assert [(one.request_id, list(one.token_ids)) for one in reply.outputs] == [(1, [10, 11]), (2, [20, 21])]
    assert [is_last(one) for one in reply.outputs] == [False, True]
    assert len(box.take().outputs) == 0


async def test_a_refusal_is_never_merged_with_a_request_of_the_same_id() -> None:
    box = Outbox()
    box.push([output(1, 10)])
    box.answer(output(1, finish_reason=FINISH_REASON_ERROR))
    box.push([output(1, 11)])
    reply = box.take()
    assert [list(one.token_ids) for one in reply.outputs] == [[], [10, 11]]
    assert [is_last(one) for one in reply.outputs] == [True, False]


async def test_waiting_ends_with_something_to_take_or_with_the_close() -> None:
    box = Outbox()
    waiting = asyncio.create_task(box.wait())
    await asyncio.sleep(0)
    assert not waiting.done()
    box.push([output(1, 10)])
    assert await waiting
    box.close()
    assert await box.wait(), "what is left is still said"
    box.take()
    assert not await box.wait()


async def test_too_many_requests_unread_stop_the_reading_of_more() -> None:
    box = Outbox(max_requests=2)
    box.push([output(1, 10)])
    box.answer(output(2))
    waiting = asyncio.create_task(box.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    box.take()
    await waiting


async def test_too_many_refusals_unread_stop_the_reading_of_more() -> None:
    box = Outbox()
    for number in range(MAX_PENDING_ANSWERS - 1):
        box.answer(output(number))
    await box.wait_for_room()
    box.answer(output(0))
    waiting = asyncio.create_task(box.wait_for_room())
    await asyncio.sleep(0)
    assert not waiting.done()
    box.take()
    await waiting


async def test_too_much_unread_is_an_overflow() -> None:
    box = Outbox(max_entries=10)
    box.push([output(1, *range(10))])
    with pytest.raises(OutboxOverflow, match="11 unread tokens and alternatives, at most 10"):
        box.push([output(1, 10)])
    box.take()
    box.push([output(1, *range(10))])


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
async def test_a_long_story_is_cut_into_bounded_messages_and_nothing_is_lost(limit: int) -> None:
    draw = random.Random(limit)
    box = Outbox()
    whole = {
        request_id: SequenceOutput(
            request_id=request_id,
            token_ids=range(count := draw.randint(0, 9)),
            logprobs=[place(token, alternatives=2) for token in range(count)],
            prompt_logprobs=[place(token, alternatives=1) for token in range(draw.randint(0, 9))],
            finish_reason=FINISH_REASON_LENGTH,
            num_prompt_tokens=5,
        )
        for request_id in range(8)
    }
    for one in whole.values():
        copy = SequenceOutput()
        copy.CopyFrom(one)
        box.push([copy])
    told: dict[int, SequenceOutput] = {}
    while (reply := box.take(limit)).outputs:
        assert sum(map(positions, reply.outputs)) <= limit
        for part in reply.outputs:
            assert not is_last(told.get(part.request_id, SequenceOutput())), "nothing comes after the end"
            told.setdefault(part.request_id, SequenceOutput()).MergeFrom(part)
    assert told == whole


@pytest.mark.parametrize("limit", [1, 3, 7, 1000])
@pytest.mark.parametrize("routed_bytes", [4, 12, 1 << 20])
async def test_experts_come_with_the_tokens_that_they_precede(
    limit: int, routed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever loses the rest has, with n tokens, the experts of all positions before the n-th, and no others."""
    monkeypatch.setattr(outbox_module, "MAX_REPLY_ROUTED_BYTES", routed_bytes)
    draw = random.Random(limit)
    box = Outbox()
    prompts = {request_id: draw.randint(1, 9) for request_id in range(8)}
    wholes: dict[int, SequenceOutput] = {}
    for request_id, prompt in prompts.items():
        tokens = draw.randint(1, 9)
        rows = [bytes([request_id, row, 0, 0]) for row in range(prompt + tokens - 1)]
        wholes[request_id] = output(request_id, *range(tokens), routed_experts=rows, finish_reason=FINISH_REASON_LENGTH)
        first = output(request_id, 0, routed_experts=rows[:prompt])
        rest = output(request_id, *range(1, tokens), routed_experts=rows[prompt:], finish_reason=FINISH_REASON_LENGTH)
        box.push([first])
        box.push([rest])
    told: dict[int, SequenceOutput] = {}
    while (reply := box.take(limit)).outputs:
        assert sum(len(row) for one in reply.outputs for row in one.routed_experts) <= routed_bytes
        for part in reply.outputs:
            so_far = told.setdefault(part.request_id, SequenceOutput())
            so_far.MergeFrom(part)
            if so_far.token_ids:
                assert len(so_far.routed_experts) == prompts[part.request_id] + len(so_far.token_ids) - 1
    assert told == wholes


async def test_room_is_counted_back_exactly_when_parts_are_taken() -> None:
    box = Outbox(max_entries=30)
    for _ in range(5):
        one = output(1, *range(10))
        one.logprobs.extend(place(token, alternatives=2) for token in range(10))
        assert entries(one) == 30
        box.push([one])
        while box.take(3).outputs:
            pass


async def test_cutting_takes_the_prompt_first_and_leaves_the_end() -> None:
    one = output(1, 7, 8, finish_reason=FINISH_REASON_LENGTH)
    one.logprobs.extend([place(7), place(8)])
    one.prompt_logprobs.extend([place(1), place(2)])
    part = cut(one, 3)
    assert [len(part.prompt_logprobs), list(part.token_ids), len(part.logprobs)] == [2, [7], 1]
    assert not is_last(part)
    assert [len(one.prompt_logprobs), list(one.token_ids), len(one.logprobs)] == [0, [8], 1]
    assert is_last(one)
