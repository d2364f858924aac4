"""From a plan to deltas: its choices run side by side, and are closed together.

The plan is `actors.front.planning`'s, this file's door to both endpoints. Deltas become responses in
`actors.front.completions` and `actors.front.chat_completions`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from actors.front.choice_text import ChoiceText, Delta
from actors.front.coordinator_client import CoordinatorLost
from actors.front.event_ids import Stage
from actors.front.front_door import FrontDoor
from actors.front.openai_errors import OVERLOADED_RETRY_AFTER_S, ApiError, from_output, not_ready, timed_out
from actors.front.planning import Choice, Plan, Wish, check_request, plan
from actors.front.proxy_hold import BY_COORDINATOR
from actors.front.request_trace import current as current_trace
from actors.front.resume import Untold
from model.text.detokenizer import IncrementalDetokenizer
from protos.coordinator_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_UNSPECIFIED,
    SequenceOutput,
)
from protos.expert_pb2 import STATUS_INVALID, STATUS_OVERLOADED
from protos.outputs import is_last

__all__ = ["Choice", "Plan", "Wish", "check_request", "merge", "plan", "run"]

READY_WAIT_S = 0.05  # a refusal must be quick


async def run(front: FrontDoor, plan: Plan) -> AsyncGenerator[Delta, None]:
    """Deltas of all choices as they come; closing it cancels what is still running. Raises ApiError."""
    arrived = asyncio.get_running_loop().time()
    streams = [_deltas(front, plan, choice, arrived) for choice in plan.choices if choice.told.stage is not Stage.ENDED]
    trace = current_trace()
    async with aclosing(merge(streams)) as deltas:
        async for delta in deltas:
            if trace is not None:
                trace.note(delta)
            yield delta
    front.metrics.e2e.observe(asyncio.get_running_loop().time() - arrived)


async def merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Several streams as one, in order of arrival. When it ends, however it ends, all of them are closed."""
    if len(streams) == 1:  # most are, and a task for every token would be work for nothing
        async with aclosing(streams[0]) as only:
            async for one in only:
                yield one
        return
    pending = {asyncio.ensure_future(_next(stream)): stream for stream in streams}
    try:
        while pending:
            await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in [task for task in pending if task.done()]:
                stream = pending.pop(task)
                delta = task.result()
                if delta is not None:
                    pending[asyncio.ensure_future(_next(stream))] = stream
                    yield delta
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _next(stream: AsyncGenerator[Delta, None]) -> Delta | None:
    return await anext(stream, None)


async def _deltas(front: FrontDoor, plan: Plan, choice: Choice, arrived: float) -> AsyncGenerator[Delta, None]:
    """One choice's deltas, the last of them with a finish reason. Raises ApiError."""
    context = choice.prompt.token_ids if plan.continues_prompt else ()
    detokenizer = IncrementalDetokenizer(
        front.tokenizer, context, skip_special=plan.skip_special_tokens, verbatim=choice.form is not None
    )
    calls = None if plan.tools is None else plan.tools.parser()
    text = ChoiceText(choice.index, detokenizer, plan.rules, front.eos_ids, calls)
    told = Untold(text, choice.index, choice.told)
    async with aclosing(_all_outputs(front, plan, choice, arrived)) as outputs:
        async for output in outputs:
            delta = told.feed(output)
            if delta is None:
                continue
            front.metrics.generation_tokens.inc(len(delta.token_ids))
            plan.caller.use(len(delta.token_ids))
            yield delta
            if delta.finish_reason is not None:
                front.metrics.choice_ended(delta.finish_reason, len(choice.prompt.token_ids), delta.num_tokens)
                return
    raise not_ready("The coordinator ended the request early. Please retry.")


async def _all_outputs(
    front: FrontDoor, plan: Plan, choice: Choice, arrived: float
) -> AsyncGenerator[SequenceOutput, None]:
    """What is remembered of the choice, as one output, then what comes from a coordinator. Raises ApiError."""
    known = None if plan.record is None else plan.record.choices[choice.index].copy()
    if known is not None and known.token_ids:
        yield SequenceOutput(
            token_ids=known.token_ids, finish_reason=known.finish_reason, num_cached_tokens=known.num_cached_tokens
        )
        if known.finish_reason != FINISH_REASON_UNSPECIFIED:
            return
        choice.submit.generated_token_ids.extend(known.token_ids)
    first = True
    async with aclosing(_outputs(front, plan, choice, arrived)) as outputs:
        async for output in outputs:
            if plan.record is not None:
                plan.record.note(choice.index, output)
            if first and choice.is_first:
                plan.caller.use(len(choice.prompt.token_ids))
            first = False
            if known is not None and known.token_ids:  # whoever goes on with it may find others
                output.num_cached_tokens = known.num_cached_tokens
            yield output


async def _outputs(
    front: FrontDoor, plan: Plan, choice: Choice, arrived: float
) -> AsyncGenerator[SequenceOutput, None]:
    """The coordinator's outputs of one choice, timed; what is no output but a failure raises ApiError."""
    submit = choice.submit
    if submit.max_tokens == 0 and not submit.HasField("prompt_logprobs"):
        yield SequenceOutput(finish_reason=FINISH_REASON_LENGTH)
        return
    loop = asyncio.get_running_loop()
    give_up_at = arrived + front.request_timeout_s + front.limits.deadline_grace_s
    first: float | None = None
    last: float | None = None
    num_tokens = 0
    try:
        async with aclosing(front.coordinators.generate(submit)) as outputs:
            while True:
                async with asyncio.timeout_at(give_up_at):
                    output = await anext(outputs, None)
                if output is None:
                    return
                if output.finish_reason in (FINISH_REASON_ERROR, FINISH_REASON_CANCELLED):
                    raise await _failure(front, plan, choice, output)
                now = loop.time()
                _observe(front, choice, now - (last or arrived), first=last is None)
                first, last = first or now, now
                num_tokens += len(output.token_ids)
                if not choice.is_first:  # a prompt counts once, however many choices it has
                    output.num_cached_tokens = 0
                if is_last(output) and num_tokens > 1:
                    front.metrics.tpot.observe((now - first) / (num_tokens - 1))
                yield output
    except TimeoutError:
        raise timed_out(front.request_timeout_s) from None
    except CoordinatorLost as error:
        raise not_ready("The connection to the model was lost. Please retry.") from error


def _observe(front: FrontDoor, choice: Choice, waited_s: float, *, first: bool) -> None:
    (front.metrics.ttft if first else front.metrics.itl).observe(waited_s)
    if first and choice.is_first:
        front.metrics.prompt_tokens.inc(len(choice.prompt.token_ids))


async def _takes_requests(front: FrontDoor) -> bool:
    """False where all coordinators say that they do not; one that is too busy to say anything is full, not loading."""
    if front.coordinators.was_ready:
        return True
    try:
        async with asyncio.timeout(READY_WAIT_S):
            return await front.coordinators.is_ready()
    except TimeoutError:
        return True


async def _failure(front: FrontDoor, plan: Plan, choice: Choice, output: SequenceOutput) -> ApiError:
    """A coordinator that is loading refuses like one that is full; to a client it is not ready."""
    held: dict[str, str] = {}
    if output.status == STATUS_OVERLOADED:
        if not await _takes_requests(front):
            return not_ready()
        if choice.index == 0:  # not even one choice found room
            retry_s = output.retry_after_ms / 1000 or OVERLOADED_RETRY_AFTER_S
            front.overload.note_refused(retry_s, choice.submit.tenant, len(choice.submit.prompt_token_ids))
            held = front.hold(plan.caller, BY_COORDINATOR)
    if choice.form is not None and output.status == STATUS_INVALID:
        blamed = choice.form.blamed(output.error)
        if blamed is not None:
            return blamed
    error = from_output(output, front.request_timeout_s)
    error.headers.update(held)
    return error
