"""Requests: what is accepted, what is refused, and the error body that names the field."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from actors.front.openai_errors import (
    ApiError,
    context_length_exceeded,
    from_output,
    from_validation,
    internal,
    not_ready,
    overloaded,
    param_of,
)
from actors.front.openai_schema import (
    MAX_PROMPTS,
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from actors.front.request_fields import REFUSED_EVERYWHERE, REFUSED_IN_CHAT
from protos.coordinator_pb2 import FINISH_REASON_ERROR, SequenceOutput
from protos.expert_pb2 import (
    STATUS_CANCELLED,
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OVERLOADED,
    Status,
)

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "p", **fields})


def chat(**fields: Any) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": "m", "messages": HELLO, **fields})


def refusal(kind: type[GenerationRequest], /, **fields: Any) -> ApiError:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(fields)
    return from_validation(caught.value)


def test_everything_but_the_essentials_has_a_default() -> None:
    request = chat()
    assert (request.num_choices, request.stop, request.temperature, request.stream) == (1, [], None, None)
    assert not request.wants_usage_chunk
    assert not request.wants_usage_always
    assert request.unsupported_fields() == {}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2, 3], [[1, 2, 3]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
        (["a", [1]], ["a", [1]]),
    ],
)
def test_all_forms_of_a_prompt(prompt: object, prompts: object) -> None:
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize(
    "prompt",
    [[], [[]], [["a"]], 5, None, {}, [1, "a"], [1.5], [True], [-1], ["a"] * (MAX_PROMPTS + 1), [None]],
)
def test_bad_prompts_name_the_prompt(prompt: object) -> None:
    error = refusal(CompletionRequest, model="m", prompt=prompt)
    assert (error.status, error.param) == (400, "prompt")
    assert "prompt" in error.message


@pytest.mark.parametrize(("stop", "stops"), [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"]), ([], [])])
def test_stop_is_a_list_in_the_end(stop: object, stops: list[str]) -> None:
    assert chat(stop=stop).stop == stops


GOOD: list[tuple[str, Any]] = [
    ("temperature", 0),
    ("temperature", 2),
    ("top_p", 0),
    ("top_k", -1),
    ("seed", -(2**63)),
    ("seed", 2**64 - 1),
    ("n", 128),
    ("min_p", 1.0),
    ("repetition_penalty", 1.3),
    ("presence_penalty", -2),
    ("max_tokens", None),
    ("user", "someone"),
    ("logit_bias", {}),
    ("logit_bias", {"0": -100, "299": 100.0}),
    ("bad_words", []),
    ("bad_words", ["a" * 256] * 128),
    ("allowed_token_ids", [1]),
    ("prompt_logprobs", 20),
    ("truncate_prompt_tokens", -1),
    ("truncation_side", "right"),
    ("priority", -1000),
    ("cache_salt", "s" * 256),
    ("request_id", "Root=1-67891233-abcdef012345678912345678"),
    ("add_special_tokens", False),
    ("spaces_between_special_tokens", True),
    ("thinking_token_budget", -1),
    ("use_beam_search", False),
    ("stream_interval", 1),
    ("documents", []),
    ("tool_choice", "none"),
    ("some_future_field", {"deep": [1]}),
]


@pytest.mark.parametrize(("field", "value"), GOOD)
def test_good_values(field: str, value: Any) -> None:
    assert completion(**{field: value}).unsupported_fields() == {}
    assert chat(**{field: value}).unsupported_fields() == {}


BAD: list[tuple[str, Any, str]] = [
    ("temperature", 2.01, "less than or equal to 2"),
    ("temperature", -0.1, "greater than or equal to 0"),
    ("temperature", "1", "expected a number, but got a string"),
    ("temperature", float("nan"), "finite"),
    ("top_p", 1.1, "less than or equal to 1"),
    ("top_k", 1.5, "expected an integer, but got a decimal"),
    ("top_k", -2, "greater than or equal to -1"),
    ("n", 0, "greater than or equal to 1"),
    ("n", 129, "less than or equal to 128"),
    ("n", True, "expected an integer, but got a boolean"),
    ("seed", 2**64, "less than"),
    ("max_tokens", -1, "greater than or equal to"),
    ("stop", ["a"] * 5, "at most 4 strings"),
    ("stop", [""], "1 to 1024 characters"),
    ("stop", 5, "a string or an array of strings"),
    ("stop", ["a", 5], "a string or an array of strings"),
    ("stop_token_ids", [1] * 65, "at most 64 items"),
    ("presence_penalty", 2.5, "less than or equal to 2"),
    ("repetition_penalty", 0, "greater than or equal to 0.01"),
    ("stream", "yes", "expected a boolean, but got a string"),
    ("model", None, "expected a string, but got null"),
    ("logit_bias", [1], "expected an object, but got an array"),
    ("logit_bias", {"5": 100.1}, "each bias must be a number from -100 to 100"),
    ("logit_bias", {"5": "1"}, "each bias must be a number"),
    ("logit_bias", {"5": True}, "each bias must be a number"),
    ("logit_bias", {"5": float("nan")}, "each bias must be a number"),
    ("logit_bias", {"-1": 1}, "each key must be a token id"),
    ("logit_bias", {"05": 1}, "each key must be a token id"),
    ("logit_bias", {"hello": 1}, "each key must be a token id"),
    ("logit_bias", {"9999999999": 1}, "each key must be a token id"),
    ("logit_bias", {str(n): 0 for n in range(1025)}, "at most 1024 tokens, not 1025"),
    ("bad_words", "word", "expected an array, but got a string"),
    ("bad_words", [""], "each must have 1 to 256 characters"),
    ("bad_words", ["a" * 257], "each must have 1 to 256 characters"),
    ("bad_words", ["a"] * 129, "at most 128 items"),
    ("allowed_token_ids", [], "at least 1 item"),
    ("allowed_token_ids", [1] * 16_385, "at most 16384 items"),
    ("prompt_logprobs", -1, "greater than or equal to 0"),
    ("prompt_logprobs", 21, "less than or equal to 20"),
    ("prompt_logprobs", True, "expected an integer, but got a boolean"),
    ("truncate_prompt_tokens", -2, "greater than or equal to -1"),
    ("truncation_side", "middle", "'left' or 'right'"),
    ("priority", 1001, "less than or equal to 1000"),
    ("priority", 0.5, "expected an integer, but got a decimal"),
    ("cache_salt", "", "1 to 256 bytes"),
    ("cache_salt", "é" * 129, "1 to 256 bytes"),
    ("request_id", "a b", "1 to 64 letters, digits"),
    ("request_id", "x" * 65, "1 to 64 letters, digits"),
    ("user", 5, "expected a string, but got an integer"),
]


@pytest.mark.parametrize(("field", "value", "reason"), BAD)
def test_bad_values_name_the_field_and_the_limit(field: str, value: Any, reason: str) -> None:
    for model, essentials in (
        (CompletionRequest, {"prompt": "p"}),
        (ChatCompletionRequest, {"messages": HELLO}),
    ):
        error = refusal(model, **{"model": "m", **essentials, field: value})
        assert (error.status, error.type, error.param) == (400, "invalid_request_error", field)
        assert f"'{field}'" in error.message
        assert reason in error.message


def test_a_bad_item_is_named_by_its_place() -> None:
    assert refusal(CompletionRequest, model="m", prompt="p", stop_token_ids=[1, -1]).param == "stop_token_ids[1]"
    error = refusal(ChatCompletionRequest, model="m", messages=[*HELLO, {"role": "robot", "content": "x"}])
    assert error.param == "messages[1].role"
    assert "must be one of system" in error.message
    assert param_of(("a", 0, "b", 1)) == "a[0].b[1]"


@pytest.mark.parametrize("field", ["model", "messages"])
def test_what_is_missing_is_named(field: str) -> None:
    fields: dict[str, Any] = {"model": "m", "messages": HELLO}
    del fields[field]
    error = refusal(ChatCompletionRequest, **fields)
    assert error.body()["error"] == {
        "message": f"Missing required parameter: '{field}'.",
        "type": "invalid_request_error",
        "param": field,
        "code": "missing_required_parameter",
    }


def test_messages() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "name": "Ada",
        },
        {"role": "assistant", "content": None},
    ]
    rendered = [message.for_template() for message in chat(messages=messages).messages]
    assert rendered[0] == {"role": "system", "content": "be brief"}
    assert rendered[1] == {"role": "user", "content": "a\nb", "name": "Ada"}
    assert rendered[2] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content"),
        ({"content": "x"}, "messages[0].role"),
        ("hello", "messages[0]"),
    ],
)
def test_bad_messages(message: object, param: str) -> None:
    assert refusal(ChatCompletionRequest, model="m", messages=[message]).param == param
    assert refusal(ChatCompletionRequest, model="m", messages=[]).param == "messages"


def test_fields_that_only_chats_have() -> None:
    wrong: list[tuple[dict[str, Any], str, str]] = [
        ({"chat_template_kwargs": {"x": "y" * 65_536}}, "chat_template_kwargs", "at most 65536 characters as JSON"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs", "expected an object"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "cannot be used with 'add_generation_prompt'",
        ),
        (
            {"continue_final_message": True, "messages": [*HELLO, {"role": "assistant"}]},
            "continue_final_message",
            "the last message must have text",
        ),
    ]
    for fields_, param, reason in wrong:
        error = refusal(ChatCompletionRequest, **{"model": "m", "messages": HELLO, **fields_})
        assert (error.status, error.param) == (400, param)
        assert reason in error.message
    assert chat(chat_template_kwargs={"x": [1, {"y": None}]}, continue_final_message=True).chat_template_kwargs


def test_prompt_scores_are_not_for_streams() -> None:
    error = refusal(CompletionRequest, model="m", prompt="p", prompt_logprobs=1, stream=True)
    assert (error.param, error.code) == ("prompt_logprobs", "invalid_value")
    assert "not available with 'stream'" in error.message


def test_a_field_of_ours_cannot_be_set_from_outside() -> None:
    assert completion(asked_in_vain={"n": "is nothing"}).unsupported_fields() == {}
    assert "asked_in_vain" not in completion().model_dump()


NOT_DONE = sorted({**REFUSED_EVERYWHERE, **REFUSED_IN_CHAT})


@pytest.mark.parametrize("field", NOT_DONE)
def test_what_is_known_and_not_done_is_refused_by_name_and_harmless_values_pass(field: str) -> None:
    harmless, reason = {**REFUSED_EVERYWHERE, **REFUSED_IN_CHAT}[field]
    for value in (None, False, [], {}, "", *harmless):
        assert chat(**{field: value}).unsupported_fields() == {}
    for value in (7, True, {"a": 1}, "x"):
        if value not in harmless:
            assert chat(**{field: value}).unsupported_fields() == {field: reason}


def test_fields_that_need_another() -> None:
    assert refusal(CompletionRequest, model="m", prompt="p", stream_options={}).param == "stream_options"
    error = refusal(ChatCompletionRequest, model="m", messages=HELLO, top_logprobs=2)
    assert error.param == "top_logprobs"
    assert error.message == "Invalid value for 'top_logprobs': it needs 'logprobs' to be true."
    assert chat(logprobs=True, top_logprobs=2, stream=True, stream_options={}).top_logprobs == 2


def test_stream_options() -> None:
    request = chat(stream=True, stream_options={"include_usage": True, "continuous_usage_stats": True})
    assert request.wants_usage_chunk
    assert request.wants_usage_always
    assert not chat(stream=True, stream_options={"continuous_usage_stats": True}).wants_usage_always


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (completion(suffix="end"), "suffix"),
        (completion(best_of=3), "best_of"),
        (completion(use_beam_search=True), "use_beam_search"),
        (chat(chat_template="{{ messages }}"), "chat_template"),
        (chat(echo=True), "echo"),
        (chat(function_call="auto"), "function_call"),
        (chat(functions=[{}]), "functions"),
        (chat(modalities=["audio"]), "modalities"),
    ],
)
def test_what_we_know_and_cannot_do_is_not_ignored(request_: GenerationRequest, field: str) -> None:
    assert list(request_.unsupported_fields()) == [field]


def test_harmless_forms_of_the_same_fields_pass() -> None:
    assert completion(suffix="", best_of=2, n=2).unsupported_fields() == {}
    assert chat(response_format={"type": "text"}, tools=[], modalities=["text"]).unsupported_fields() == {}


# --- errors from elsewhere ---


@pytest.mark.parametrize(
    ("status", "http_status"),
    [
        (STATUS_INVALID, 400),
        (STATUS_OVERLOADED, 429),
        (STATUS_DRAINING, 503),
        (STATUS_CANCELLED, 503),
        (STATUS_DEADLINE_EXCEEDED, 504),
        (STATUS_INTERNAL, 500),
    ],
)
def test_a_coordinators_status_as_http(status: Status, http_status: int) -> None:
    output = SequenceOutput(finish_reason=FINISH_REASON_ERROR, status=status, error="expert-3 at 10.0.0.7 is gone")
    error = from_output(output, 600)
    assert error.status == http_status
    assert ("10.0.0.7" in error.message) == (status == STATUS_INVALID), "only what the client did wrong is repeated"


def test_retry_after_is_whole_seconds_and_at_least_one() -> None:
    output = SequenceOutput(status=STATUS_OVERLOADED, retry_after_ms=2300)
    assert from_output(output, 600).response().headers["retry-after"] == "3"
    assert overloaded(0.1).response().headers["retry-after"] == "1"
    assert not_ready().response().headers["retry-after"] == "2"
    assert "retry-after" not in internal().response().headers


def test_context_length_exceeded_says_what_openai_says() -> None:
    error = context_length_exceeded("messages", 512, 600, 16, exact=True)
    assert error.code == "context_length_exceeded"
    assert error.message == (
        "This model's maximum context length is 512 tokens. However, you requested 616 tokens (600 in the messages, "
        "16 in the completion). Please reduce the length of the messages or completion."
    )
    assert "requested at least 600 tokens" in context_length_exceeded("prompt", 512, 600, 0, exact=False).message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
fields = sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields})


@given(st.dictionaries(st.sampled_from(fields), json_values, max_size=5))
def test_whatever_comes_is_a_request_or_a_400(values: dict[str, Any]) -> None:
    for model, essentials in (
        (CompletionRequest, {"prompt": "p"}),
        (ChatCompletionRequest, {"messages": HELLO}),
    ):
        try:
            model.model_validate({"model": "m", **essentials, **values}).unsupported_fields()
        except ValidationError as caught:
            error = from_validation(caught)
            assert error.status == 400
            assert error.param
            assert error.param.split("[")[0].split(".")[0] in {*values, *essentials}
