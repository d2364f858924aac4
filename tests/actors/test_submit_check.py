"""Every field of a Submit that can be wrong is refused by name, and nothing else is."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch

from actors.coordinator.submit_check import InvalidSubmit, SubmitLimits, check_submit, grammar_of
from actors.coordinator.token_masks import token_masks
from cluster.prefix_hash import COMMON_ROOT, root_key
from model.grammar.spec import GrammarKind, GrammarSpec
from protos.coordinator_pb2 import (
    GRAMMAR_KIND_CHOICE,
    GRAMMAR_KIND_JSON_SCHEMA,
    GRAMMAR_KIND_LARK,
    GRAMMAR_KIND_REGEX,
    Grammar,
    Sampling,
    Submit,
    TokenIds,
)

LIMITS = SubmitLimits(vocab_size=300, max_model_len=64, request_timeout_s=600.0)


def valid(**changes: object) -> Submit:
    fields: dict[str, object] = {
        "request_id": 1,
        "prompt_token_ids": [5, 6, 7],
        "max_tokens": 4,
        "sampling": Sampling(temperature=0.5, top_p=0.5, seed=2**64 - 1, repetition_penalty=1.0),
        **changes,
    }
    return Submit(**fields)  # type: ignore[arg-type]


def rules(**sampling: object) -> dict[str, object]:
    return {"sampling": Sampling(temperature=0.5, top_p=0.5, repetition_penalty=1.0, **sampling)}  # type: ignore[arg-type]


def check(submit: Submit) -> object:
    return check_submit(submit, LIMITS, now_s=1000.0, now_unix_s=5000.0)


def test_a_valid_submit_becomes_the_request_it_says() -> None:
    submit = valid(
        stop_token_ids=[9, 9, 8], ignore_eos=True, min_tokens=2, logprobs=0, prompt_logprobs=20,
        deadline_unix_us=5_010_000_000, generated_token_ids=[7, 8, 7],
    )  # fmt: skip
    request = check_submit(submit, LIMITS, now_s=1000.0, now_unix_s=5000.0)
    assert request.prompt_ids == (5, 6, 7)
    assert request.max_tokens == 4
    assert request.min_tokens == 2
    assert request.stop_token_ids == {8, 9}
    assert request.ignore_eos
    assert request.generated_ids == (7, 8, 7)
    assert (request.num_logprobs, request.num_prompt_logprobs) == (0, 20)
    assert request.deadline_s == pytest.approx(1010.0)
    assert request.sampling.temperature == 0.5
    assert request.sampling.seed == 2**64 - 1


def test_rules_about_tokens_become_bias_and_masks() -> None:
    submit = valid(
        **rules(
            logit_bias_ids=[7, 5], logit_bias_values=[-1.5, 100.0], allowed_token_ids=[3, 4, 5],
            bad_words=[TokenIds(ids=[4]), TokenIds(ids=[9, 5])],
        )
    )  # fmt: skip
    request = check_submit(submit, LIMITS, now_s=1000.0, now_unix_s=5000.0)
    assert request.sampling.logit_bias == ((7, -1.5), (5, 100.0))
    row = torch.zeros(8)
    for mask in token_masks(submit.sampling):
        mask.apply(row, [9])
    assert row.isfinite().nonzero().flatten().tolist() == [3]


def test_whose_turn_it_is_passes_within_bounds() -> None:
    request = check_submit(valid(tenant="team", priority=-1000), LIMITS, now_s=0.0, now_unix_s=0.0)
    assert (request.tenant, request.priority) == ("team", -1000)
    for wrong, message in (
        ({"priority": 1001}, "priority is 1001, but must be from -1000 to 1000"),
        ({"priority": -(2**31)}, "priority is -2147483648"),
        ({"tenant": "t" * 65}, "tenant has 65 characters, but must have at most 64"),
    ):
        with pytest.raises(InvalidSubmit, match=message):
            check(valid(**wrong))


def test_what_is_absent_is_off() -> None:
    submit = valid()
    request = check_submit(submit, LIMITS, now_s=1000.0, now_unix_s=5000.0)
    assert token_masks(submit.sampling) == ()
    assert request.sampling.logit_bias == ()
    assert (request.tenant, request.priority) == ("", 0)
    assert (request.num_logprobs, request.num_prompt_logprobs) == (None, None)
    assert request.deadline_s == 1600.0


def test_experts_are_told_only_where_the_coordinator_was_started_for_it() -> None:
    with pytest.raises(InvalidSubmit, match="return_routed_experts is true, but enable_return_routed_experts is off"):
        check(valid(return_routed_experts=True))
    willing = dataclasses.replace(LIMITS, routed_experts=True)
    assert check_submit(valid(return_routed_experts=True), willing, now_s=0.0, now_unix_s=0.0).return_routed_experts
    assert not check_submit(valid(), willing, now_s=0.0, now_unix_s=0.0).return_routed_experts


def test_tenant_and_salt_say_with_whom_blocks_are_shared() -> None:
    def root(**changes: object) -> bytes:
        return check_submit(valid(**changes), LIMITS, now_s=0.0, now_unix_s=0.0).prefix_root

    assert root() == COMMON_ROOT
    assert root(tenant="a", cache_salt=b"b") == root_key("a", b"b")
    assert len({root(), root(tenant="a"), root(cache_salt=b"a"), root(tenant="a", cache_salt=b"a")}) == 4
    root(tenant="a" * 64, cache_salt=b"\xff" * 256)


def test_no_deadline_is_later_than_the_coordinators_own_limit() -> None:
    request = check_submit(valid(deadline_unix_us=2**63), LIMITS, now_s=1000.0, now_unix_s=5000.0)
    assert request.deadline_s == 1600.0


def test_a_prompt_and_its_output_may_fill_the_context_exactly() -> None:
    check(valid(prompt_token_ids=[5] * 60))
    check(valid(prompt_token_ids=[5] * 64, max_tokens=0, prompt_logprobs=0))


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt_token_ids": []}, "prompt_token_ids is empty"),
        ({"cache_salt": b"s" * 257}, "cache_salt has 257 bytes, but must have at most 256"),
        ({"tenant": "ä" * 65}, "tenant has 65 characters, but must have at most 64"),
        ({"prompt_token_ids": [5, 300]}, r"prompt_token_ids\[1\] is 300, but the vocabulary has 300"),
        ({"prompt_token_ids": [2**32 - 1]}, r"prompt_token_ids\[0\] is 4294967295"),
        (
            {"prompt_token_ids": [5] * 64},
            "prompt_token_ids has 64 tokens, but prompt and output must fit in 64",
        ),
        ({"prompt_token_ids": [5] * 65, "max_tokens": 0, "prompt_logprobs": 1}, "prompt_token_ids has 65"),
        ({"max_tokens": 62}, "max_tokens is 62, but 61 tokens are left of 64 after a prompt of 3"),
        ({"max_tokens": 2**32 - 1}, "max_tokens is 4294967295"),
        ({"max_tokens": 0}, "max_tokens is 0, but must be at least 1 where prompt_logprobs"),
        ({"min_tokens": 5}, r"min_tokens is 5, but must be at most max_tokens \(4\)"),
        ({"stop_token_ids": [300]}, r"stop_token_ids\[0\] is 300"),
        ({"generated_token_ids": [5, 300]}, r"generated_token_ids\[1\] is 300, but the vocabulary has 300"),
        (
            {"generated_token_ids": [5] * 4},
            r"generated_token_ids has 4 tokens, but must have fewer than max_tokens \(4\)",
        ),
        (
            {"generated_token_ids": [5], "max_tokens": 0, "prompt_logprobs": 1},
            r"generated_token_ids has 1 tokens, but must have fewer than max_tokens \(0\)",
        ),
        ({"stop_token_ids": [5] * 65}, "stop_token_ids has 65 tokens, but must have at most 64"),
        (
            rules(logit_bias_ids=[5], logit_bias_values=[1.0, 2.0]),
            r"sampling.logit_bias_ids has 1 tokens, but logit_bias_values has 2",
        ),
        (rules(logit_bias_ids=[300], logit_bias_values=[1.0]), r"sampling.logit_bias_ids\[0\] is 300"),
        (rules(logit_bias_ids=[5, 5], logit_bias_values=[1.0, 1.0]), "sampling.logit_bias: has an id twice"),
        (rules(logit_bias_ids=[5], logit_bias_values=[101.0]), "sampling.logit_bias: must be at least -100"),
        (rules(logit_bias_ids=[5], logit_bias_values=[math.nan]), "sampling.logit_bias: must be a finite"),
        (
            rules(logit_bias_ids=[5] * 1025, logit_bias_values=[1.0] * 1025),
            "sampling.logit_bias_ids has 1025 tokens, but must have at most 1024",
        ),
        (rules(allowed_token_ids=[5, 300]), r"sampling.allowed_token_ids\[1\] is 300"),
        (rules(allowed_token_ids=[5] * 16_385), "sampling.allowed_token_ids has 16385 tokens"),
        (rules(bad_words=[TokenIds(ids=[5]), TokenIds()]), r"sampling.bad_words\[1\] is empty"),
        (rules(bad_words=[TokenIds(ids=[5, 300])]), r"sampling.bad_words\[0\]\[1\] is 300"),
        (rules(bad_words=[TokenIds(ids=[5])] * 257), "sampling.bad_words has 257 words, but must have at most 256"),
        (rules(bad_words=[TokenIds(ids=[5] * 4097)]), "sampling.bad_words has 4097 tokens in all"),
        ({"logprobs": 21}, "logprobs is 21, but must be at most 20"),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21, but must be at most 20"),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_its_limit(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(InvalidSubmit, match=complaint):
        check(valid(**changes))


def set_field(name: str, value: float) -> Callable[[Submit], None]:
    return lambda submit: setattr(submit.sampling, name, value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("min_p", -1.0),
        ("min_p", math.nan),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", math.inf),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
    ],
)
def test_a_wrong_sampling_parameter_is_named(name: str, value: float) -> None:
    submit = valid()
    set_field(name, value)(submit)
    with pytest.raises(InvalidSubmit, match=f"^sampling.{name}: must be"):
        check(submit)


def test_sampling_cannot_be_left_out() -> None:
    submit = valid()
    submit.ClearField("sampling")
    with pytest.raises(InvalidSubmit, match="sampling is missing"):
        check(submit)


@pytest.mark.parametrize(
    ("wire", "kind"),
    [
        (GRAMMAR_KIND_JSON_SCHEMA, GrammarKind.JSON_SCHEMA),
        (GRAMMAR_KIND_REGEX, GrammarKind.REGEX),
        (GRAMMAR_KIND_CHOICE, GrammarKind.CHOICE),
        (GRAMMAR_KIND_LARK, GrammarKind.LARK),
    ],
)
def test_a_grammar_is_what_it_says(wire: int, kind: GrammarKind) -> None:
    assert grammar_of(valid(grammar=Grammar(kind=wire, text="{}"))) == GrammarSpec(kind, "{}")  # type: ignore[arg-type]


def test_a_grammar_of_no_kind_or_beyond_the_limits_is_refused() -> None:
    assert grammar_of(valid()) is None
    for grammar, words in (
        (Grammar(text="a"), "grammar.kind is 0"),
        (Grammar(kind=77, text="a"), "grammar.kind is 77"),  # type: ignore[arg-type]
        (Grammar(kind=GRAMMAR_KIND_REGEX), "grammar: it is empty"),
        (
            Grammar(kind=GRAMMAR_KIND_REGEX, text="a" * 20000),
            "grammar: it has 20000 bytes",
        ),
    ):
        with pytest.raises(InvalidSubmit, match=words):
            grammar_of(valid(grammar=grammar))
