"""litellm: one interface to many servers, and its own names for errors. Runs in an environment of its own."""

import asyncio

import litellm
from checking import Server, failure_of, main

CHAT = [{"role": "user", "content": "Name three rivers."}]


def options(server, **changes):
    base = {"model": f"openai/{server.model}", "api_base": server.v1, "api_key": "none", "num_retries": 0}
    return {**base, "messages": CHAT, "max_tokens": 12, "seed": 5, "timeout": 120, **changes}


def raised(kind, call):
    """The exception of exactly that class which `call` raises."""
    error = failure_of(call)
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    return error


def check_a_completion_has_text_and_usage(server: Server) -> None:
    answer = litellm.completion(**options(server))
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.model.endswith(server.model)


def check_a_stream_is_the_whole_answer(server: Server) -> None:
    whole = litellm.completion(**options(server))
    chunks = list(litellm.completion(**options(server, stream=True, stream_options={"include_usage": True})))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    usage = [chunk.usage for chunk in chunks if getattr(chunk, "usage", None)]
    assert usage[-1].completion_tokens == whole.usage.completion_tokens
    rebuilt = litellm.stream_chunk_builder(chunks, messages=CHAT)
    assert rebuilt.choices[0].message.content == whole.choices[0].message.content


def check_n_and_stop_are_kept(server: Server) -> None:
    several = litellm.completion(**options(server, n=2, temperature=1.0))
    assert len({one.message.content for one in several.choices}) == 2
    text = litellm.completion(**options(server, temperature=0)).choices[0].message.content
    stopped = litellm.completion(**options(server, temperature=0, stop=[text[4:6]]))
    assert stopped.choices[0].message.content == text[: text.index(text[4:6])]
    assert stopped.choices[0].finish_reason == "stop"


def check_async_completions_are_the_same(server: Server) -> None:
    async def work():
        whole = await litellm.acompletion(**options(server))
        stream = await litellm.acompletion(**options(server, stream=True))
        pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(pieces)

    whole, streamed = asyncio.run(work())
    assert whole == streamed == litellm.completion(**options(server)).choices[0].message.content


def check_text_completions_work(server: Server) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{server.model}",
        prompt="The river",
        api_base=server.v1,
        api_key="none",
        max_tokens=6,
        temperature=0,
    )
    assert answer.choices[0].text
    assert answer.usage.completion_tokens <= 6


def check_errors_have_litellms_names(server: Server) -> None:
    raised(litellm.NotFoundError, lambda: litellm.completion(**options(server, model="openai/none")))
    raised(litellm.BadRequestError, lambda: litellm.completion(**options(server, temperature=5)))
    long = [{"role": "user", "content": "word " * server.facts["context"]}]
    raised(litellm.ContextWindowExceededError, lambda: litellm.completion(**options(server, messages=long)))


def check_a_crowd_is_told_of_the_limit(server: Server) -> None:
    crowd = 3 * (server.facts["max_num_seqs"] + server.facts["max_waiting"])
    asked = options(server, max_tokens=200, ignore_eos=True, max_retries=0)

    async def work():
        return await asyncio.gather(*(litellm.acompletion(**asked) for _ in range(crowd)), return_exceptions=True)

    answers = asyncio.run(work())
    refused = [one for one in answers if isinstance(one, Exception)]
    assert {type(one) for one in refused} == {litellm.RateLimitError}, {repr(one)[:300] for one in refused}
    assert len(answers) - len(refused) >= server.facts["max_num_seqs"]


if __name__ == "__main__":
    main(globals())
