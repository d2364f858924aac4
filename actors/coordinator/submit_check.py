"""Turns a `Submit` from the wire into a checked `GenerationRequest`, or says which field is wrong and why.

Nothing that arrives is trusted: an id beyond the vocabulary would read beside the embeddings, a NaN would
spoil a row of logits. Whether there is room for the request is the scheduler's question.
"""

from dataclasses import dataclass

from actors.coordinator.engine_io import GenerationRequest
from model.sampling.sampler import SamplingParams
from protos.coordinator_pb2 import Submit

MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64


class InvalidSubmit(ValueError):
    """A field of a Submit is missing, out of range, or contradicts another; the message names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitLimits:
    """What one coordinator serves. `max_model_len` bounds prompt and output together, in tokens."""

    vocab_size: int
    max_model_len: int
    request_timeout_s: float


def check_submit(submit: Submit, limits: SubmitLimits, *, now_s: float, now_unix_s: float) -> GenerationRequest:
    """The request, its deadline on the clock that says `now_s`. Raises InvalidSubmit naming the field."""
    _check_tokens(submit, limits)
    _check_lengths(submit, limits)
    for name in ("logprobs", "prompt_logprobs"):
        if submit.HasField(name) and getattr(submit, name) > MAX_LOGPROBS:
            raise InvalidSubmit(f"{name} is {getattr(submit, name)}, but must be at most {MAX_LOGPROBS}")
    return GenerationRequest(
        prompt_ids=tuple(submit.prompt_token_ids),
        max_tokens=submit.max_tokens,
        sampling=_sampling(submit),
        min_tokens=submit.min_tokens,
        stop_token_ids=frozenset(submit.stop_token_ids),
        ignore_eos=submit.ignore_eos,
        num_logprobs=submit.logprobs if submit.HasField("logprobs") else None,
        num_prompt_logprobs=submit.prompt_logprobs if submit.HasField("prompt_logprobs") else None,
        deadline_s=now_s + _seconds_left(submit, limits, now_unix_s),
    )


def _check_tokens(submit: Submit, limits: SubmitLimits) -> None:
    if not submit.prompt_token_ids:
        raise InvalidSubmit("prompt_token_ids is empty, but must have at least 1 token")
    if len(submit.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidSubmit(
            f"stop_token_ids has {len(submit.stop_token_ids)} tokens, but must have at most {MAX_STOP_TOKENS}"
        )
    for name in ("prompt_token_ids", "stop_token_ids"):
        for place, token in enumerate(getattr(submit, name)):
            if token >= limits.vocab_size:
                raise InvalidSubmit(f"{name}[{place}] is {token}, but the vocabulary has {limits.vocab_size} tokens")


def _check_lengths(submit: Submit, limits: SubmitLimits) -> None:
    prompt, longest = len(submit.prompt_token_ids), limits.max_model_len
    if prompt + min(1, submit.max_tokens) > longest:
        raise InvalidSubmit(f"prompt_token_ids has {prompt} tokens, but prompt and output must fit in {longest}")
    if prompt + submit.max_tokens > longest:
        raise InvalidSubmit(
            f"max_tokens is {submit.max_tokens}, but {longest - prompt} tokens are left "
            f"of {longest} after a prompt of {prompt}"
        )
    if submit.max_tokens == 0 and not submit.HasField("prompt_logprobs"):
        raise InvalidSubmit("max_tokens is 0, but must be at least 1 where prompt_logprobs is not asked for")
    if submit.min_tokens > submit.max_tokens:
        raise InvalidSubmit(f"min_tokens is {submit.min_tokens}, but must be at most max_tokens ({submit.max_tokens})")


def _sampling(submit: Submit) -> SamplingParams:
    if not submit.HasField("sampling"):
        raise InvalidSubmit("sampling is missing")
    given = submit.sampling
    try:
        return SamplingParams(
            temperature=given.temperature,
            top_p=given.top_p,
            top_k=given.top_k,
            min_p=given.min_p,
            seed=given.seed,
            repetition_penalty=given.repetition_penalty,
            presence_penalty=given.presence_penalty,
            frequency_penalty=given.frequency_penalty,
        )
    except ValueError as error:
        raise InvalidSubmit(f"sampling.{error}") from None


def _seconds_left(submit: Submit, limits: SubmitLimits, now_unix_s: float) -> float:
    if not submit.deadline_unix_us:
        return limits.request_timeout_s
    return min(limits.request_timeout_s, submit.deadline_unix_us / 1e6 - now_unix_s)
