"""Turns a `Submit` into a checked `GenerationRequest`, or says which field is wrong and why.

The one validator of both fronts: the ingress asks it before it sends, the coordinator when a message arrives, whoever
sent it. Nothing that arrives is trusted: an id beyond the vocabulary would read beside the embeddings, a NaN would
spoil a row of logits. What a finding is called over HTTP is `actors.front.submit_findings`' work, whether there is room
for the request the scheduler's question.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from actors.coordinator.engine_io import GenerationRequest
from cluster.prefix_hash import COMMON_ROOT, MAX_SALT_BYTES, BlockKey, root_key
from model.grammar.spec import GrammarError, GrammarKind, GrammarSpec
from model.sampling.params import SamplingParams
from protos.coordinator_pb2 import (
    GRAMMAR_KIND_CHOICE,
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
    Sampling,
    Submit,
)

MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64
MAX_BIASED_TOKENS = 1024
MAX_ALLOWED_TOKENS = 16_384
MAX_BAD_WORDS = 256
MAX_BAD_WORD_TOKENS = 4096
"""Of all bad words together."""
MAX_PRIORITY = 1000
"""Priorities are from minus to plus this."""
MAX_TENANT_CHARS = 64
_KINDS = {
    GRAMMAR_KIND_JSON_SCHEMA: GrammarKind.JSON_SCHEMA,
    GRAMMAR_KIND_REGEX: GrammarKind.REGEX,
    GRAMMAR_KIND_CHOICE: GrammarKind.CHOICE,
    GRAMMAR_KIND_LARK: GrammarKind.LARK,
}
MAX_TEMPERATURE = 2.0
REPETITION_PENALTIES = (0.01, 10.0)


# What a Submit may have beside its token ids: stop tokens, biases, a grammar.
_OTHER_BYTES = 2 << 20
_TOKEN_BYTES = 5  # of a varint
_FP32 = 2.0**-23  # what a number may lose on its way into a message
_FIELD = re.compile(r"[\w.]+(\[\d+\])*")
MAX_TRACEPARENT_CHARS = 128  # W3C's has 55; one that is not one is not followed, and is no error


class InvalidSubmit(ValueError):
    """A field of a Submit is missing, out of range, or contradicts another; the message begins with its name.

    `field` is that name, with the place in a list ("stop_token_ids[3]"), `problem` the rest. `too_long`: prompt and
    output do not fit the context.
    """

    def __init__(self, message: str, *, too_long: bool = False) -> None:
        super().__init__(message)
        named = _FIELD.match(message)
        self.field = "" if named is None else named[0]
        self.problem = message[len(self.field) :].lstrip(": ")
        self.too_long = too_long


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitLimits:
    """What one coordinator serves. `max_model_len` bounds prompt and output together, in tokens.

    `routed_experts`: it was started to say which experts tokens take.
    """

    vocab_size: int
    max_model_len: int
    request_timeout_s: float
    routed_experts: bool = False

    @property
    def max_message_bytes(self) -> int:
        """No message with a valid Submit is larger: what is, need not be parsed."""
        return _OTHER_BYTES + _TOKEN_BYTES * 2 * (self.max_model_len + self.vocab_size)


def check_submit(submit: Submit, limits: SubmitLimits, *, now_s: float, now_unix_s: float) -> GenerationRequest:
    """The request, its deadline on the clock that says `now_s`. Raises InvalidSubmit naming the field.

    Its `masks` are `actors.coordinator.token_masks`' to make, of what was found good here, and its `grammar` others'.
    """
    _check_lengths(submit, limits)  # first, so that a message of millions of tokens costs nothing
    for name in ("prompt_token_ids", "stop_token_ids", "generated_token_ids"):
        check_tokens(name, getattr(submit, name), limits)
    _check_token_rules(submit.sampling, limits)
    for name in ("logprobs", "prompt_logprobs"):
        if submit.HasField(name) and getattr(submit, name) > MAX_LOGPROBS:
            raise InvalidSubmit(f"{name} is {getattr(submit, name)}, but must be at most {MAX_LOGPROBS}")
    _check_turn(submit)
    if submit.return_routed_experts and not limits.routed_experts:
        raise InvalidSubmit("return_routed_experts is true, but enable_return_routed_experts is off here")
    return GenerationRequest(
        prompt_ids=tuple(submit.prompt_token_ids),
        max_tokens=submit.max_tokens,
        sampling=_sampling(submit),
        min_tokens=submit.min_tokens,
        stop_token_ids=frozenset(submit.stop_token_ids),
        ignore_eos=submit.ignore_eos,
        generated_ids=tuple(submit.generated_token_ids),
        num_logprobs=submit.logprobs if submit.HasField("logprobs") else None,
        num_prompt_logprobs=submit.prompt_logprobs if submit.HasField("prompt_logprobs") else None,
        deadline_s=now_s + _seconds_left(submit, limits, now_unix_s),
        return_routed_experts=submit.return_routed_experts,
        prefix_root=_prefix_root(submit),
        tenant=submit.tenant,
        priority=submit.priority,
        traceparent=submit.traceparent if len(submit.traceparent) <= MAX_TRACEPARENT_CHARS else "",
    )


def _prefix_root(submit: Submit) -> BlockKey:
    if not submit.cache_salt and not submit.tenant:
        return COMMON_ROOT
    for name, size in (("cache_salt", len(submit.cache_salt)), ("tenant", len(submit.tenant.encode()))):
        if size > MAX_SALT_BYTES:
            raise InvalidSubmit(f"{name} has {size} bytes, but must have at most {MAX_SALT_BYTES}")
    return root_key(submit.tenant, submit.cache_salt)


def grammar_of(submit: Submit) -> GrammarSpec | None:
    """What the output must follow, not compiled yet. Raises InvalidSubmit."""
    if not submit.HasField("grammar"):
        return None
    kind = _KINDS.get(submit.grammar.kind)
    if kind is None:
        raise InvalidSubmit(f"grammar.kind is {submit.grammar.kind}, which is none that this version knows")
    try:
        return GrammarSpec(kind, submit.grammar.text)
    except GrammarError as error:
        raise InvalidSubmit(f"grammar: {error}") from None


def check_tokens(name: str, tokens: Sequence[int], limits: SubmitLimits) -> None:
    """Raises InvalidSubmit for the first of field `name`'s tokens that is beyond the vocabulary, by however much."""
    if tokens and max(tokens) >= limits.vocab_size:
        place, token = next((i, token) for i, token in enumerate(tokens) if token >= limits.vocab_size)
        raise InvalidSubmit(f"{name}[{place}] is {token}, but the vocabulary has {limits.vocab_size} tokens")


def check_room(prompt: int, max_tokens: int, min_tokens: int, limits: SubmitLimits) -> None:
    """Raises InvalidSubmit where a prompt of so many tokens, and what is to be generated, do not fit."""
    longest = limits.max_model_len
    if not prompt:
        raise InvalidSubmit("prompt_token_ids is empty, but must have at least 1 token")
    if prompt + min(1, max_tokens) > longest:
        raise InvalidSubmit(
            f"prompt_token_ids has {prompt} tokens, but prompt and output must fit in {longest}", too_long=True
        )
    if prompt + max_tokens > longest:
        raise InvalidSubmit(
            f"max_tokens is {max_tokens}, but {longest - prompt} tokens are left "
            f"of {longest} after a prompt of {prompt}",
            too_long=True,
        )
    if min_tokens > max_tokens:
        raise InvalidSubmit(f"min_tokens is {min_tokens}, but must be at most max_tokens ({max_tokens})")


def _check_token_rules(given: Sampling, limits: SubmitLimits) -> None:
    """Bias, allowed tokens and bad words: not too many, and all of the vocabulary."""
    biased, values = len(given.logit_bias_ids), len(given.logit_bias_values)
    if biased != values:
        raise InvalidSubmit(f"sampling.logit_bias_ids has {biased} tokens, but logit_bias_values has {values}")
    _check_count("sampling.logit_bias_ids", biased, "tokens", MAX_BIASED_TOKENS)
    _check_count("sampling.allowed_token_ids", len(given.allowed_token_ids), "tokens", MAX_ALLOWED_TOKENS)
    _check_count("sampling.bad_words", len(given.bad_words), "words", MAX_BAD_WORDS)
    in_words = sum(len(word.ids) for word in given.bad_words)
    _check_count("sampling.bad_words", in_words, "tokens in all", MAX_BAD_WORD_TOKENS)
    for name in ("logit_bias_ids", "allowed_token_ids"):
        check_tokens(f"sampling.{name}", getattr(given, name), limits)
    for place, word in enumerate(given.bad_words):
        if not word.ids:
            raise InvalidSubmit(f"sampling.bad_words[{place}] is empty, but must have at least 1 token")
        check_tokens(f"sampling.bad_words[{place}]", word.ids, limits)


def _check_count(name: str, count: int, what: str, most: int) -> None:
    if count > most:
        raise InvalidSubmit(f"{name} has {count} {what}, but must have at most {most}")


def _check_turn(submit: Submit) -> None:
    if abs(submit.priority) > MAX_PRIORITY:
        raise InvalidSubmit(f"priority is {submit.priority}, but must be from {-MAX_PRIORITY} to {MAX_PRIORITY}")
    if len(submit.tenant) > MAX_TENANT_CHARS:
        raise InvalidSubmit(f"tenant has {len(submit.tenant)} characters, but must have at most {MAX_TENANT_CHARS}")


def _check_lengths(submit: Submit, limits: SubmitLimits) -> None:
    if len(submit.stop_token_ids) > MAX_STOP_TOKENS:
        raise InvalidSubmit(
            f"stop_token_ids has {len(submit.stop_token_ids)} tokens, but must have at most {MAX_STOP_TOKENS}"
        )
    check_room(len(submit.prompt_token_ids), submit.max_tokens, submit.min_tokens, limits)
    if submit.max_tokens == 0 and not submit.HasField("prompt_logprobs"):
        raise InvalidSubmit("max_tokens is 0, but must be at least 1 where prompt_logprobs is not asked for")
    generated = len(submit.generated_token_ids)
    if generated and generated >= submit.max_tokens:
        raise InvalidSubmit(
            f"generated_token_ids has {generated} tokens, but must have fewer than max_tokens ({submit.max_tokens})"
        )


def _sampling(submit: Submit) -> SamplingParams:
    if not submit.HasField("sampling"):
        raise InvalidSubmit("sampling is missing")
    given = submit.sampling
    low, high = REPETITION_PENALTIES
    if given.temperature > MAX_TEMPERATURE:  # NaN and the like are found below
        raise InvalidSubmit(f"sampling.temperature: must be at most {MAX_TEMPERATURE:g}, got {given.temperature:g}")
    if not low * (1 - _FP32) <= given.repetition_penalty <= high:
        raise InvalidSubmit(
            f"sampling.repetition_penalty: must be from {low:g} to {high:g}, got {given.repetition_penalty:g}"
        )
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
            logit_bias=tuple(zip(given.logit_bias_ids, given.logit_bias_values, strict=True)),
        )
    except ValueError as error:
        raise InvalidSubmit(f"sampling.{error}") from None


def _seconds_left(submit: Submit, limits: SubmitLimits, now_unix_s: float) -> float:
    if not submit.deadline_unix_us:
        return limits.request_timeout_s
    return min(limits.request_timeout_s, submit.deadline_unix_us / 1e6 - now_unix_s)
