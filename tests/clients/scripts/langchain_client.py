"""langchain-openai: its chat and completion models. Runs in an environment of its own (see `tests.clients`)."""

import asyncio
from typing import Literal

import openai
import pydantic
from checking import Server, Unsupported, failure_of, main
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI, OpenAI

MESSAGES = [SystemMessage("You are brief."), HumanMessage("Name three rivers.")]


class Paint(pydantic.BaseModel):
    """A colour."""

    colour: Literal["red", "green"]
    dark: bool


def model_of(server, **changes):
    base = {"model": server.model, "base_url": server.v1, "api_key": "none", "max_retries": 0, "timeout": 120}
    return ChatOpenAI(**{**base, "max_tokens": 16, "temperature": 0.7, "seed": 3, **changes})


def check_invoke_gives_a_message_with_usage(server: Server) -> None:
    message = model_of(server).invoke(MESSAGES)
    assert isinstance(message, AIMessage)
    assert message.content
    usage = message.usage_metadata
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens"] <= 16
    assert message.response_metadata["finish_reason"] in ("length", "stop")
    assert message.response_metadata["model_name"] == server.model


def check_a_stream_adds_up_to_the_message(server: Server) -> None:
    model = model_of(server, stream_usage=True)
    whole = model.invoke(MESSAGES)
    pieces = list(model.stream(MESSAGES))
    assert len(pieces) > 2
    total = pieces[0]
    for piece in pieces[1:]:
        total += piece
    assert total.content == whole.content
    assert total.usage_metadata["output_tokens"] == whole.usage_metadata["output_tokens"]


def check_a_batch_is_what_each_gives_alone(server: Server) -> None:
    model = model_of(server)
    questions = ["Name a river.", "Name a mountain.", "Name a sea.", "Name a city."]
    together = [message.content for message in model.batch(questions)]
    assert together == [model.invoke(question).content for question in questions]


def check_async_is_the_same(server: Server) -> None:
    model = model_of(server)

    async def work():
        whole = await model.ainvoke(MESSAGES)
        return whole.content, "".join([piece.content async for piece in model.astream(MESSAGES)])

    whole, streamed = asyncio.run(work())
    assert whole == streamed == model.invoke(MESSAGES).content


def check_stop_and_logprobs_can_be_bound(server: Server) -> None:
    model = model_of(server, temperature=0)
    text = model.invoke(MESSAGES).content
    stop = text[4:6]
    assert model.bind(stop=[stop]).invoke(MESSAGES).content == text[: text.index(stop)]
    message = model.bind(logprobs=True, top_logprobs=2).invoke(MESSAGES)
    entries = message.response_metadata["logprobs"]["content"]
    assert len(entries) == message.usage_metadata["output_tokens"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in entries)


def check_the_completions_model_works(server: Server) -> None:
    model = OpenAI(
        model=server.model, base_url=server.v1, api_key="none", max_retries=0, max_tokens=8, seed=1, temperature=0
    )
    text = model.invoke("The river")
    assert text
    assert "".join(model.stream("The river")) == text


def check_errors_are_openais(server: Server) -> None:
    for changes, kind in (({"model": "none"}, openai.NotFoundError), ({"temperature": 5}, openai.BadRequestError)):
        error = failure_of(lambda changes=changes: model_of(server, **changes).invoke(MESSAGES))
        assert isinstance(error, kind), repr(error)


def check_structured_output_is_of_its_class(server: Server) -> None:
    model = model_of(server, max_tokens=400).with_structured_output(Paint, method="json_schema")
    assert isinstance(if_supported("response_format", lambda: model.invoke(MESSAGES)), Paint)


def check_a_bound_tool_is_called(server: Server) -> None:
    model = model_of(server, max_tokens=400).bind_tools([Paint], tool_choice="Paint")
    message = if_supported("tools", lambda: model.invoke(MESSAGES))
    assert [call["name"] for call in message.tool_calls] == ["Paint"]
    Paint(**message.tool_calls[0]["args"])


def if_supported(param, call):
    """What `call` gives, unless the server says that it does not do it."""
    try:
        return call()
    except openai.BadRequestError as error:
        if error.param and error.param.startswith(param) and "support" in error.message:
            raise Unsupported(error.message) from None
        raise


if __name__ == "__main__":
    main(globals())
