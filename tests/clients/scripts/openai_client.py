"""OpenAI's own client. Runs in an environment of its own (see `tests.clients`)."""

import asyncio
import json
import time
import urllib.request

import openai
from checking import Server, Unsupported, failure_of, main

SPECIALS = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CHAT = [{"role": "user", "content": "Name three rivers."}]


def client_of(server, **changes):
    return openai.OpenAI(**{"base_url": server.v1, "api_key": "none", "max_retries": 0, "timeout": 120, **changes})


def raised(kind, call):
    """The exception of exactly that class which `call` raises."""
    error = failure_of(call)
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    return error


def chat(server, **asked):
    base = {"model": server.model, "messages": CHAT, "max_tokens": 12, "seed": 7}
    return client_of(server).chat.completions.create(**{**base, **asked})


def complete(server, **asked):
    base = {"model": server.model, "prompt": "The river", "max_tokens": 12, "seed": 7}
    return client_of(server).completions.create(**{**base, **asked})


def check_models_are_listed_and_found(server: Server) -> None:
    client = client_of(server)
    assert [one.id for one in client.models.list()] == [server.model]
    assert client.models.retrieve(server.model).id == server.model
    error = raised(openai.NotFoundError, lambda: client.models.retrieve("none"))
    assert (error.status_code, error.code) == (404, "model_not_found")


def check_a_chat_answer_is_whole(server: Server) -> None:
    answer = chat(server)
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert answer.model == server.model
    assert answer.system_fingerprint
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("length", "stop")
    usage = answer.usage
    assert usage.completion_tokens == 12 or choice.finish_reason == "stop"
    assert usage.prompt_tokens > 0
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def check_a_chat_stream_is_the_whole_answer_in_pieces(server: Server) -> None:
    whole = chat(server, max_tokens=24)
    chunks = list(chat(server, max_tokens=24, stream=True, stream_options={"include_usage": True}))
    said = [chunk for chunk in chunks if chunk.choices]
    assert said[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in said][-1] == whole.choices[0].finish_reason
    assert all(chunk.choices[0].finish_reason is None for chunk in said[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def check_a_stream_without_usage_has_none(server: Server) -> None:
    assert all(chunk.choices and chunk.usage is None for chunk in chat(server, stream=True))


def check_a_completion_and_its_stream_are_equal(server: Server) -> None:
    whole = complete(server, max_tokens=24)
    assert whole.object == "text_completion"
    pieces = list(complete(server, max_tokens=24, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def check_several_prompts_are_answered_in_order(server: Server) -> None:
    prompts = ["The river", "A mountain", "Seven seas"]
    together = complete(server, prompt=prompts, temperature=0)
    assert [one.index for one in together.choices] == [0, 1, 2]
    alone = [complete(server, prompt=prompt, temperature=0).choices[0].text for prompt in prompts]
    assert [one.text for one in together.choices] == alone


def check_n_gives_so_many_different_choices(server: Server) -> None:
    answer = chat(server, n=3, temperature=1.0)
    texts = [one.message.content for one in answer.choices]
    assert [one.index for one in answer.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert answer.usage.completion_tokens > 12
    assert [one.message.content for one in chat(server, n=3, temperature=1.0).choices] == texts


def check_equal_seeds_are_equal_answers(server: Server) -> None:
    first, again, other = (chat(server, seed=seed).choices[0].message.content for seed in (1, 1, 2))
    assert first == again
    assert first != other


def check_a_stop_string_ends_the_text(server: Server) -> None:
    text = complete(server, temperature=0, max_tokens=32).choices[0].text
    stop = text[8:11]
    answer = complete(server, temperature=0, max_tokens=32, stop=[stop, "never said"])
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def check_chat_logprobs_agree_with_the_choice(server: Server) -> None:
    answer = chat(server, temperature=0, logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert entry.logprob <= 0
        assert [one.logprob for one in entry.top_logprobs] == sorted(
            (o.logprob for o in entry.top_logprobs), reverse=True
        )
        assert entry.top_logprobs[0].token == entry.token
        assert entry.top_logprobs[0].logprob == entry.logprob
    said = b"".join(bytes(entry.bytes) for entry in entries if entry.token not in SPECIALS).decode(errors="replace")
    assert known(said) == known(answer.choices[0].message.content)


def check_completion_logprobs_with_echo_cover_the_prompt(server: Server) -> None:
    answer = complete(server, prompt="Rivers run", echo=True, logprobs=2, max_tokens=3, temperature=0)
    places = answer.choices[0].logprobs
    assert answer.choices[0].text.startswith("Rivers run")
    assert len(places.tokens) == answer.usage.prompt_tokens + 3
    assert places.token_logprobs[0] is None
    assert all(value <= 0 for value in places.token_logprobs[1:])
    alone = complete(server, prompt="Rivers run", logprobs=2, max_tokens=3, temperature=0).choices[0].logprobs
    assert places.token_logprobs[-3:] == alone.token_logprobs
    assert places.text_offset[-1] > places.text_offset[0]


def check_vllms_fields_go_through_extra_body(server: Server) -> None:
    asked = {"top_k": 1, "min_p": 0.1, "ignore_eos": True, "return_token_ids": True, "repetition_penalty": 1.1}
    answer = complete(server, max_tokens=5, extra_body=asked)
    assert len(answer.choices[0].model_dump()["token_ids"]) == 5


def check_a_bad_value_is_named(server: Server) -> None:
    error = raised(openai.BadRequestError, lambda: chat(server, temperature=5))
    assert (error.status_code, error.param, error.type) == (400, "temperature", "invalid_request_error")
    error = raised(openai.BadRequestError, lambda: complete(server, max_tokens=-1))
    assert error.param == "max_tokens"
    error = raised(openai.BadRequestError, lambda: chat(server, messages=[]))
    assert error.param == "messages"


def check_a_prompt_that_is_too_long_says_so(server: Server) -> None:
    context = server.facts["context"]
    error = raised(openai.BadRequestError, lambda: complete(server, prompt="word " * context))
    assert error.code == "context_length_exceeded"
    assert f"maximum context length is {context} tokens" in error.message


def check_an_unknown_model_is_not_found(server: Server) -> None:
    error = raised(openai.NotFoundError, lambda: chat(server, model="none"))
    assert (error.code, error.type) == ("model_not_found", "invalid_request_error")


def check_an_error_before_a_stream_is_no_stream(server: Server) -> None:
    raised(openai.BadRequestError, lambda: chat(server, temperature=5, stream=True))


def check_a_crowd_is_refused_in_part_and_served_in_part(server: Server) -> None:
    crowd = 3 * (server.facts["max_num_seqs"] + server.facts["max_waiting"])

    async def ask(client):
        try:
            return await client.completions.create(
                model=server.model, prompt="x", max_tokens=200, seed=1, extra_body={"ignore_eos": True}
            )
        except openai.APIStatusError as error:
            return error

    async def work():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(ask(client) for _ in range(crowd)))

    answers = asyncio.run(work())
    refused = [one for one in answers if isinstance(one, openai.APIStatusError)]
    served = [one.choices[0].text for one in answers if not isinstance(one, openai.APIStatusError)]
    assert {type(one) for one in refused} == {openai.RateLimitError}, {repr(one) for one in refused}
    assert all(int(one.response.headers["retry-after"]) >= 1 for one in refused)
    assert len(set(served)) == 1
    assert len(served) >= server.facts["max_num_seqs"]


def check_retries_wait_as_long_as_told(server: Server) -> None:
    """The client's own retries, of which it knows nothing but the headers, bring a crowd through."""
    crowd = 2 * (server.facts["max_num_seqs"] + server.facts["max_waiting"])

    async def work():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key="none", max_retries=30, timeout=120) as client:
            asked = {"model": server.model, "prompt": "x", "max_tokens": 40, "seed": 1}
            return await asyncio.gather(*(client.completions.create(**asked) for _ in range(crowd)))

    assert len({answer.choices[0].text for answer in asyncio.run(work())}) == 1


def check_many_at_once_get_what_each_gets_alone(server: Server) -> None:
    asked = [{"model": server.model, "messages": CHAT, "max_tokens": 12, "seed": seed} for seed in range(8)]

    async def work():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=120) as client:
            return await asyncio.gather(*(client.chat.completions.create(**one) for one in asked))

    together = [answer.choices[0].message.content for answer in asyncio.run(work())]
    assert together == [chat(server, seed=seed).choices[0].message.content for seed in range(8)]


def check_an_async_stream_is_the_whole_answer(server: Server) -> None:
    async def work():
        async with openai.AsyncOpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=120) as client:
            stream = await client.chat.completions.create(
                model=server.model, messages=CHAT, max_tokens=12, seed=7, stream=True
            )
            return [chunk.choices[0].delta.content or "" async for chunk in stream]

    assert "".join(asyncio.run(work())) == chat(server).choices[0].message.content


def check_a_stream_that_is_closed_frees_its_place(server: Server) -> None:
    stream = complete(server, max_tokens=900, stream=True, extra_body={"ignore_eos": True})
    for _, _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    deadline = time.monotonic() + 120
    while running(server):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.2)


def check_the_stream_helper_adds_up(server: Server) -> None:
    client = client_of(server)
    helper = getattr(client.chat.completions, "stream", None) or client.beta.chat.completions.stream
    with helper(model=server.model, messages=CHAT, max_tokens=12, seed=7) as stream:
        said = "".join(event.delta for event in stream if event.type == "content.delta")
        snapshot = stream.current_completion_snapshot
    whole = chat(server).choices[0]
    assert said == snapshot.choices[0].message.content == whole.message.content
    assert snapshot.choices[0].finish_reason == whole.finish_reason


def check_raw_responses_have_a_request_id(server: Server) -> None:
    answer = chat(server)
    if answer._request_id is None:
        raise Unsupported("responses have no x-request-id")
    given = client_of(server).chat.completions.with_raw_response.create(
        model=server.model, messages=CHAT, max_tokens=1, extra_headers={"x-request-id": "mine-1"}
    )
    assert given.headers["x-request-id"] == "mine-1"


def check_a_schema_is_kept(server: Server) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "number": {"type": "integer", "minimum": 0, "maximum": 9}},
        "required": ["colour", "number"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "paint", "schema": schema, "strict": True}}
    answer = if_supported("response_format", lambda: chat(server, max_tokens=400, response_format=wanted))
    paint = json.loads(answer.choices[0].message.content)
    assert paint["colour"] in ("red", "green")
    assert paint["number"] in range(10)
    assert set(paint) == {"colour", "number"}


def check_a_parsed_answer_is_an_object_of_its_class(server: Server) -> None:
    from typing import Literal

    import pydantic

    class Paint(pydantic.BaseModel):
        colour: Literal["red", "green"]
        dark: bool

    completions = client_of(server).chat.completions
    parse = getattr(completions, "parse", None) or client_of(server).beta.chat.completions.parse
    answer = if_supported(
        "response_format",
        lambda: parse(model=server.model, messages=CHAT, max_tokens=400, seed=7, response_format=Paint),
    )
    assert isinstance(answer.choices[0].message.parsed, Paint)


def check_a_required_tool_is_called(server: Server) -> None:
    parameters = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}},
        "required": ["colour"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "paint", "parameters": parameters}}
    answer = if_supported(
        "tools",
        lambda: chat(
            server, max_tokens=400, tools=[tool], tool_choice={"type": "function", "function": {"name": "paint"}}
        ),
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.type == "function"
    assert call.function.name == "paint"
    assert json.loads(call.function.arguments)["colour"] in ("red", "green")


def if_supported(param, call):
    """What `call` gives, unless the server says that it does not do it."""
    try:
        return call()
    except openai.BadRequestError as error:
        if error.param and error.param.startswith(param) and "support" in error.message:
            raise Unsupported(error.message) from None
        raise


def known(text):
    """The text without what is no character: random weights say bytes that are none."""
    return text.replace("\ufffd", "")


def running(server):
    """Sequences that the cluster computes now."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=120) as page:
        lines = page.read().decode().splitlines()
    found = [line for line in lines if line.startswith("vllm:num_requests_running{")]
    assert found, "the metric is missing"
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


if __name__ == "__main__":
    main(globals())
