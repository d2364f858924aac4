"""From a validated request and its prompts to one submission per choice: the last checks, those that need the model.

Both endpoints share this file. Turning text into prompts is `actors.front.prompts`' work, the request's own rules about
tokens `actors.front.token_rules`', running what is planned `actors.front.generation`'s.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from actors.coordinator.submit_check import check_room, check_submit, check_tokens
from actors.front.caller import NOBODY, Caller
from actors.front.choice_text import Answer, TextRules
from actors.front.event_ids import Position, Stage
from actors.front.front_door import FrontDoor
from actors.front.openai_errors import invalid, model_not_found, unsupported
from actors.front.openai_schema import GenerationRequest
from actors.front.prompts import PromptTokens
from actors.front.request_trace import current as current_trace
from actors.front.resume import HEADER, Beginning
from actors.front.routed_experts import wants_routed_experts
from actors.front.stream_memory import StreamRecord
from actors.front.structured import Form
from actors.front.submit_findings import as_http
from actors.front.token_rules import NONE, TokenRules
from actors.front.tools.asked import ToolUse
from protos.coordinator_pb2 import Sampling, Submit

_SMALLEST_TOP_P = 1e-6
_MAX_UINT32 = 2**32 - 1
MAX_PROMPT_SCORES = 1 << 20
"""Tokens and alternatives that the scores of one request's prompts may have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What the endpoints word differently. None for `max_tokens` means `default_max_tokens`; None there, what
    fits. With `continues_prompt` the text goes on where the prompt's ends; without it is a text of its own. With
    `scores_once` only a prompt's first choice scores it.
    """

    prompt_param: str
    max_tokens: int | None
    default_max_tokens: int | None
    logprobs: int | None
    prompt_logprobs: int | None = None
    continues_prompt: bool = False
    form: Form | None = None
    tools: ToolUse | None = None
    scores_once: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer to one prompt; `index` counts over all prompts, `is_first` is true for a prompt's first.

    `told` is how far it was told before, when a cut stream goes on; `form` is what the answer has to have, if any.
    """

    index: int
    is_first: bool
    prompt: PromptTokens
    submit: Submit
    told: Position
    form: Form | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """All choices of one request and what holds for their text. What comes is noted in `record`, if there is one.

    `caller` is charged for the tokens.
    """

    choices: tuple[Choice, ...]
    rules: TextRules
    skip_special_tokens: bool
    continues_prompt: bool
    record: StreamRecord | None
    caller: Caller = NOBODY
    tools: ToolUse | None = None

    def routed_experts(self, front: FrontDoor, index: int, answer: Answer) -> dict[str, str | None]:
        """The field of an answer whose request wants it."""
        choice = self.choices[index]
        if front.routed_shape is None or not choice.submit.return_routed_experts:
            return {}
        num_prompt, num_tokens = len(choice.prompt.token_ids), len(answer.token_ids)
        return {"routed_experts": front.routed_shape.encode(answer.routed_experts, num_prompt, num_tokens)}

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
    wants_routed_experts(request, front.routed_shape)
    if num_prompts * request.num_choices > front.limits.max_choices:
        raise invalid("n", f"Invalid value for 'n': prompts times n must be at most {front.limits.max_choices}.")
    with as_http():
        check_tokens("stop_token_ids", request.stop_token_ids or (), front.submit_limits)
        check_tokens("allowed_token_ids", request.allowed_token_ids or (), front.submit_limits)


def plan(
    front: FrontDoor,
    request: GenerationRequest,
    prompts: Sequence[PromptTokens],
    wish: Wish,
    beginning: Beginning,
    rules: TokenRules = NONE,
    caller: Caller = NOBODY,
) -> Plan:
    """One choice per prompt and `n`, in OpenAI's order; choice i of a prompt samples with seed + i.

    Raises ApiError when a prompt does not fit, `min_tokens` exceeds what may be generated, or the caller may not use
    so many tokens now.
    """
    deadline_unix_us = int((front.wall_clock() + front.request_timeout_s) * 1e6)
    choices: list[Choice] = []
    for prompt in prompts:
        max_tokens = _max_tokens(front, prompt, wish)
        with _as_http(front, wish, len(prompt.token_ids), max_tokens):  # before it is a message, which has fewer bits
            check_room(len(prompt.token_ids), max_tokens, request.min_tokens or 0, front.submit_limits)
        common = _submit(front, request, prompt, wish, max_tokens)
        common.sampling.CopyFrom(_sampling(request))
        rules.add_to(common.sampling)
        common.tenant = caller.tenant
        _check(front, common, wish)
        for i in range(request.num_choices):
            submit = Submit()
            submit.CopyFrom(common)
            submit.request_id = front.next_request_id()
            submit.sampling.seed = (beginning.key.seed + i) % 2**64
            submit.deadline_unix_us = deadline_unix_us
            told = beginning.told[len(choices)]
            _check_told(told, common.max_tokens)
            if told.stage is not Stage.NOTHING or (wish.scores_once and i > 0):
                submit.ClearField("prompt_logprobs")
            if wish.form is not None:
                submit.grammar.CopyFrom(wish.form.wire())
            choices.append(Choice(len(choices), i == 0, prompt, submit, told, wish.form))
    _check_scores(choices, request)
    caller.reserve(sum(len(prompt.token_ids) for prompt in prompts) + (wish.max_tokens or 0) * len(choices))
    text_rules = TextRules(
        stops=tuple(request.stop),
        include_stop=bool(request.include_stop_str_in_output),
        min_tokens=request.min_tokens or 0,
    )
    made = Plan(
        tuple(choices),
        text_rules,
        request.skip_special_tokens is not False and not (wish.tools is not None and wish.tools.marked_by_special),
        wish.continues_prompt,
        _record(front, request, wish, beginning),
        caller,
        wish.tools,
    )
    trace = current_trace()
    if trace is not None:
        trace.planned(request, front.model_id, made.num_prompt_tokens, [choice.submit for choice in choices])
    return made


def _check_scores(choices: Sequence[Choice], request: GenerationRequest) -> None:
    """All scores of a body are in memory at one time."""
    submits = [choice.submit for choice in choices if choice.submit.HasField("prompt_logprobs")]
    num_scores = sum(len(submit.prompt_token_ids) * (submit.prompt_logprobs + 1) for submit in submits)
    if num_scores > MAX_PROMPT_SCORES:
        param = "logprobs" if request.prompt_logprobs is None else "prompt_logprobs"
        reason = f"the prompts of all choices must have at most {MAX_PROMPT_SCORES} scores, not {num_scores}"
        raise invalid(param, f"Invalid value for '{param}': {reason}.")


def _check_told(told: Position, max_tokens: int) -> None:
    if told.num_tokens > max_tokens:
        raise invalid(HEADER, f"Invalid header '{HEADER}': a choice has at most {max_tokens} tokens.")


def _record(front: FrontDoor, request: GenerationRequest, wish: Wish, beginning: Beginning) -> StreamRecord | None:
    """Only streams can be resumed; one with log-probabilities, which take much room, is computed again."""
    if not request.stream or wish.logprobs is not None or wish.prompt_logprobs is not None:
        return None
    return front.memory.begin(str(beginning.key), len(beginning.told))


def _max_tokens(front: FrontDoor, prompt: PromptTokens, wish: Wish) -> int:
    """Tokens to generate after `prompt`; one at least, where the client does not say how many."""
    if wish.max_tokens is not None:
        return wish.max_tokens
    room = max(1, front.max_model_len - len(prompt.token_ids))
    return room if wish.default_max_tokens is None else min(room, wish.default_max_tokens)


def _as_http(front: FrontDoor, wish: Wish, num_prompt: int, max_tokens: int) -> AbstractContextManager[None]:
    return as_http(wish.prompt_param, limit=front.max_model_len, num_prompt=num_prompt, max_tokens=max_tokens)


def _check(front: FrontDoor, submit: Submit, wish: Wish) -> None:
    """Holds a prompt's submission, from which its others differ in the seed only, to what the coordinator will.

    Raises ApiError.
    """
    if submit.max_tokens or wish.prompt_logprobs is not None:  # else nothing is to be generated, nor sent
        with _as_http(front, wish, len(submit.prompt_token_ids), submit.max_tokens):
            check_submit(submit, front.submit_limits, now_s=0.0, now_unix_s=0.0)


def _submit(front: FrontDoor, request: GenerationRequest, prompt: PromptTokens, wish: Wish, max_tokens: int) -> Submit:
    return Submit(
        prompt_token_ids=prompt.token_ids,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        stop_token_ids=request.stop_token_ids or (),
        ignore_eos=bool(request.ignore_eos),
        logprobs=wish.logprobs,
        prompt_logprobs=wish.prompt_logprobs,
        return_routed_experts=wants_routed_experts(request, front.routed_shape),
        priority=request.priority or 0,
        cache_salt=(request.cache_salt or "").encode(),
    )


def _sampling(request: GenerationRequest) -> Sampling:
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
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
    )
