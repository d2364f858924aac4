"""From a validated request to deltas: one submission per choice, run side by side, closed together.

Both endpoints share this file. Turning text into prompts is `actors.front.prompts`' work, deltas into responses
that of `actors.front.completions` and `actors.front.chat_completions`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from actors.front.choice_text import ChoiceText, Delta, TextRules
from actors.front.coordinator_client import CoordinatorLost
from actors.front.front_door import FrontDoor
from actors.front.openai_errors import (
    ApiError,
    context_length_exceeded,
    from_output,
    invalid,
    model_not_found,
    not_ready,
    timed_out,
    unsupported,
)
from actors.front.openai_schema import GenerationRequest
from actors.front.prompts import PromptTokens
from model.text.detokenizer import IncrementalDetokenizer
from protos.coordinator_pb2 import (
    FINISH_REASON_CANCELLED,
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    Sampling,
    SequenceOutput,
    Submit,
)
from protos.expert_pb2 import STATUS_OVERLOADED

_SMALLEST_TOP_P = 1e-6
_MAX_UINT32 = 2**32 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the endpoints word differently. None for `max_tokens` means `default_max_tokens`; None there, what
    fits. With `continues_prompt` the text goes on where the prompt's ends; without it is a text of its own.
    """

    prompt_param: str
    max_tokens: int | None
    default_max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None = None
    continues_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to one prompt; `index` counts over all prompts, `is_first` is true for a prompt's first."""

    index: int
    is_first: bool
    prompt: PromptTokens
    submit: Submit


@dataclass(frozen=True, slots=True)
class Plan:
    """All choices of one request and what holds for their text."""

    choices: tuple[Choice, ...]
    rules: TextRules
    skip_special_tokens: bool
    continues_prompt: bool

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts, each counted once however many choices it has."""
        return sum(len(choice.prompt.token_ids) for choice in self.choices if choice.is_first)


def check_request(front: FrontDoor, request: GenerationRequest, num_prompts: int) -> None:
    """What can be refused before any text is read. Raises ApiError."""
    if request.model != front.model_id:
        raise model_not_found(request.model)
    for param, reason in request.unsupported_fields().items():
        raise unsupported(param, reason)
    if num_prompts * request.num_choices > front.limits.max_choices:
        raise invalid("n", f"Invalid value for 'n': prompts times n must be at most {front.limits.max_choices}.")
    for place, token in enumerate(request.stop_token_ids or ()):
        if token >= front.vocab_size:
            param = f"stop_token_ids[{place}]"
            raise invalid(param, f"Invalid value for '{param}': token ids must be below {front.vocab_size}.")


def plan(front: FrontDoor, request: GenerationRequest, prompts: Sequence[PromptTokens], wish: Wish) -> Plan:
    """One choice per prompt and `n`, in OpenAI's order; choice i of a prompt samples with seed + i.

    Raises ApiError when a prompt does not fit or `min_tokens` exceeds what may be generated.
    """
    seed = front.draw_seed() if request.seed is None else request.seed
    deadline_unix_us = int((front.wall_clock() + front.request_timeout_s) * 1e6)
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(front, prompt, wish)
        if (request.min_tokens or 0) > max_tokens:
            raise invalid("min_tokens", f"Invalid value for 'min_tokens': it must be at most {max_tokens} here.")
        for i in range(request.num_choices):
            submit = _submit(front, request, prompt, wish, max_tokens)
            submit.sampling.CopyFrom(_sampling(request, (seed + i) % 2**64))
            submit.deadline_unix_us = deadline_unix_us
            choices.append(Choice(len(choices), i == 0, prompt, submit))
    rules = TextRules(
        stops=tuple(request.stop),
        include_stop=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
    )
    return Plan(tuple(choices), rules, request.skip_special_tokens is not False, wish.continues_prompt)


def _max_tokens(front: FrontDoor, prompt: PromptTokens, wish: Wish) -> int:
    """Tokens to generate after `prompt`. Raises ApiError with code context_length_exceeded."""
    limit, asked, length = front.max_model_len, wish.max_tokens, len(prompt.token_ids)
    room = limit - length
    needed = 1 if asked is None else asked
    if needed > room:
        raise context_length_exceeded(wish.prompt_param, limit, length, needed, exact=True)
    if asked is not None:
        return asked
    return room if wish.default_max_tokens is None else min(room, wish.default_max_tokens)


def _submit(front: FrontDoor, request: GenerationRequest, prompt: PromptTokens, wish: Wish, max_tokens: int) -> Submit:
    return Submit(
        request_id=front.next_request_id(),
        prompt_token_ids=prompt.token_ids,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=bool(request.ignore_eos),
        logprobs=wish.logprobs,
        prompt_logprobs=wish.prompt_logprobs,
    )


def _sampling(request: GenerationRequest, seed: int) -> Sampling:
    """OpenAI's defaults. A top_p of 0 keeps only the most likely token, which top_k says exactly."""
    top_p = 1.0 if request.top_p is None else request.top_p
    top_k = max(0, request.top_k or 0)
    if top_p < _SMALLEST_TOP_P:
        top_p, top_k = 1.0, 1
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=top_p,
        top_k=min(top_k, _MAX_UINT32),
        min_p=request.min_p or 0.0,
        seed=seed,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
    )


async def run(front: FrontDoor, plan: Plan) -> AsyncGenerator[Delta, None]:
    """Deltas of all choices as they come; closing it cancels what is still running. Raises ApiError."""
    arrived = asyncio.get_running_loop().time()
    streams = [_deltas(front, plan, choice, arrived) for choice in plan.choices]
    async with aclosing(merge(streams)) as deltas:
        async for delta in deltas:
            yield delta
    front.metrics.e2e.observe(asyncio.get_running_loop().time() - arrived)


async def merge(streams: Sequence[AsyncGenerator[Delta, None]]) -> AsyncGenerator[Delta, None]:
    """Several streams as one, in order of arrival. When it ends, however it ends, all of them are closed."""
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
    detokenizer = IncrementalDetokenizer(front.tokenizer, context, skip_special=plan.skip_special_tokens)
    text = ChoiceText(choice.index, detokenizer, plan.rules, front.eos_ids)
    async with aclosing(_outputs(front, choice, arrived)) as outputs:
        async for output in outputs:
            delta = text.feed(output)
            front.metrics.generation_tokens.inc(len(delta.token_ids))
            yield delta
            if delta.finish_reason is not None:
                front.metrics.finished.labels(delta.finish_reason).inc()
                return
    raise not_ready("The coordinator ended the request early. Please retry.")


async def _outputs(front: FrontDoor, choice: Choice, arrived: float) -> AsyncGenerator[SequenceOutput, None]:
    """The coordinator's outputs of one choice, timed; what is no output but a failure raises ApiError."""
    submit = choice.submit
    if submit.max_tokens == 0 and not submit.HasField("prompt_logprobs"):
        yield SequenceOutput(finish_reason=FINISH_REASON_LENGTH)
        return
    loop = asyncio.get_running_loop()
    give_up_at = arrived + front.request_timeout_s + front.limits.deadline_grace_s
    last: float | None = None
    try:
        async with aclosing(front.coordinators.generate(submit)) as outputs:
            while True:
                async with asyncio.timeout_at(give_up_at):
                    output = await anext(outputs, None)
                if output is None:
                    return
                if output.finish_reason in (FINISH_REASON_ERROR, FINISH_REASON_CANCELLED):
                    raise await _failure(front, output)
                now = loop.time()
                _observe(front, choice, now - (last or arrived), first=last is None)
                last = now
                yield output
    except TimeoutError:
        raise timed_out(front.request_timeout_s) from None
    except CoordinatorLost as error:
        raise not_ready("The connection to the model was lost. Please retry.") from error


def _observe(front: FrontDoor, choice: Choice, waited_s: float, *, first: bool) -> None:
    (front.metrics.ttft if first else front.metrics.itl).observe(waited_s)
    if first and choice.is_first:
        front.metrics.prompt_tokens.inc(len(choice.prompt.token_ids))


async def _failure(front: FrontDoor, output: SequenceOutput) -> ApiError:
    """A coordinator that is loading refuses like one that is full; to a client it is not ready."""
    if output.status == STATUS_OVERLOADED and not await front.coordinators.is_ready():
        return not_ready()
    return from_output(output, front.request_timeout_s)
