"""Every field of a Submit that can be wrong is refused by name, and nothing else is."""

import math
from collections.abc import Callable

import pytest

from actors.coordinator.submit_check import InvalidSubmit, SubmitLimits, check_submit
from protos.coordinator_pb2 import Sampling, Submit

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


def check(submit: Submit) -> object:
    return check_submit(submit, LIMITS, now_s=1000.0, now_unix_s=5000.0)


def test_a_valid_submit_becomes_the_request_it_says() -> None:
    submit = valid(
        stop_token_ids=[9, 9, 8], ignore_eos=True, min_tokens=2, logprobs=0, prompt_logprobs=20,
        deadline_unix_us=5_010_000_000,
    )  # fmt: skip
    request = check_submit(submit, LIMITS, now_s=1000.0, now_unix_s=5000.0)
    assert request.prompt_ids == (5, 6, 7)
    assert request.max_tokens == 4
    assert request.min_tokens == 2
    assert request.stop_token_ids == {8, 9}
    assert request.ignore_eos
    assert (request.num_logprobs, request.num_prompt_logprobs) == (0, 20)
    assert request.deadline_s == pytest.approx(1010.0)
    assert request.sampling.temperature == 0.5
    assert request.sampling.seed == 2**64 - 1


def test_what_is_absent_is_off() -> None:
    request = check_submit(valid(), LIMITS, now_s=1000.0, now_unix_s=5000.0)
    assert (request.num_logprobs, request.num_prompt_logprobs) == (None, None)
    assert request.deadline_s == 1600.0


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
        ({"stop_token_ids": [5] * 65}, "stop_token_ids has 65 tokens, but must have at most 64"),
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
