"""POST /v1/chat/completions: a conversation in, the assistant's message out, as one body or as a stream of chunks."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from actors.front.caller import NOBODY, Caller
from actors.front.choice_text import Answer, Delta
from actors.front.event_ids import Stage
from actors.front.front_door import FrontDoor
from actors.front.generation import Plan, Wish, check_request, plan, run
from actors.front.openai_responses import Head, Json, TokenNames, UsageCount, chat_logprobs, prompt_logprobs
from actors.front.openai_schema import ChatCompletionRequest
from actors.front.prompts import chat_prompt
from actors.front.request_ids import UNNAMED, RequestName
from actors.front.resume import Beginning, begin
from actors.front.streaming import Event
from actors.front.structured import wanted_form
from actors.front.token_rules import token_rules
from actors.front.tools.asked import wanted_tools


class ChatCompletion:
    """One request on its way. Make it with `prepare`, then use either `body` or `chunks`."""

    def __init__(self, front: FrontDoor, request: ChatCompletionRequest, work: Plan, beginning: Beginning) -> None:
        self._front = front
        self._request = request
        self._plan = work
        self._beginning = beginning
        self._names = TokenNames(front.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._usage = UsageCount.after(work.num_prompt_tokens, beginning.told)

    @classmethod
    async def prepare(
        cls,
        front: FrontDoor,
        request: ChatCompletionRequest,
        last_event_id: str | None = None,
        *,
        name: RequestName = UNNAMED,
        caller: Caller = NOBODY,
    ) -> "ChatCompletion":
        """Renders and reads the conversation, and where a cut stream goes on. Raises ApiError."""
        check_request(front, request, 1)
        form = wanted_form(request)
        tools = wanted_tools(front, request, form)
        prompt = await chat_prompt(front, request, () if tools is None else tools.told)
        newer = request.max_completion_tokens
        wish = Wish(
            prompt_param="messages",
            max_tokens=request.max_tokens if newer is None else newer,
            default_max_tokens=None,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
            prompt_logprobs=request.prompt_logprobs,
            continues_prompt=bool(request.continue_final_message),
            scores_once=True,
            form=form if tools is None else tools.form or form,
            tools=tools,
        )
        rules = await token_rules(front, request)
        beginning = begin(front, request, [prompt], last_event_id, name)
        return cls(front, request, plan(front, request, [prompt], wish, beginning, rules, caller), beginning)

    async def body(self) -> Json:
        """The whole response. Raises ApiError."""
        head = self._head("chat.completion")
        answers = [Answer() for _ in self._plan.choices]
        async with aclosing(run(self._front, self._plan)) as deltas:
            async for delta in deltas:
                self._usage.count(delta.index, delta.num_tokens, delta.num_cached_tokens)
                answers[delta.index].add(delta)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        scores: Json = {}
        if self._request.prompt_logprobs is not None:
            scores["prompt_logprobs"] = prompt_logprobs(answers[0].prompt_logprobs, self._names)
        return head.body(choices, usage=self._usage.usage(), **scores, **self._prompt_ids())

    async def chunks(self) -> AsyncGenerator[Event, None]:
        """The response piece by piece, or what is left of it: the role, text, the end, for each choice; then the usage.

        Raises ApiError.
        """
        head, ids = self._head("chat.completion.chunk"), self._beginning.event_ids(self._front)
        greeted = {index for index, told in enumerate(self._beginning.told) if told.stage is not Stage.NOTHING}
        async with aclosing(run(self._front, self._plan)) as deltas:
            async for delta in deltas:
                index, ended = delta.index, delta.finish_reason is not None
                if index not in greeted:
                    greeted.add(index)
                    greeting = head.body([_greeting(index)], **self._prompt_ids(), **self._chunk_usage())
                    yield Event(greeting, ids.at(index, 0, Stage.OPEN))
                self._usage.count(index, delta.num_tokens, delta.num_cached_tokens)
                usage = self._chunk_usage()
                if self._says_something(delta):
                    piece = head.body([self._piece(index, Answer.of(delta))], **usage)
                    yield Event(piece, ids.at(index, delta.num_tokens, Stage.SAID if ended else Stage.OPEN))
                if ended:
                    yield Event(head.body([_end(delta)], **usage), ids.at(index, delta.num_tokens, Stage.ENDED))
        if self._request.wants_usage_chunk and not self._beginning.usage_told:
            yield Event(head.body([], usage=self._usage.usage()), ids.with_usage())

    def _says_something(self, delta: Delta) -> bool:
        """False within what is no content, such as the white space between the parts of a call."""
        asked = self._request
        scored = asked.logprobs and delta.entries
        return bool(delta.text or delta.calls or scored or (asked.return_token_ids and delta.token_ids))

    def _head(self, object_name: str) -> Head:
        return Head.make(self._front, "chatcmpl", object_name, self._beginning.key)

    def _choice(self, index: int, answer: Answer) -> Json:
        return {
            "index": index,
            "message": {
                "role": "assistant",
                "content": None if answer.calls and not answer.text else answer.text,
                "refusal": None,
                **self._calls(index, answer, whole=True),
            },
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **self._token_ids(answer),
            **self._plan.routed_experts(self._front, index, answer),
        }

    def _piece(self, index: int, answer: Answer) -> Json:
        return {
            "index": index,
            "delta": {
                **({} if answer.calls and not answer.text else {"content": answer.text}),
                **self._calls(index, answer, whole=False),
            },
            "logprobs": self._logprobs(answer),
            "finish_reason": None,
            **self._token_ids(answer),
        }

    def _calls(self, index: int, answer: Answer, *, whole: bool) -> Json:
        """OpenAI's tool calls: in a stream, the first piece of each has its id and name."""
        tools = self._plan.tools
        if tools is None or not answer.calls:
            return {}
        calls: list[Json] = []
        for place, piece in answer.calls.items():
            call: Json = {} if whole else {"index": place}
            function: Json = {"arguments": piece.arguments}
            if piece.name is not None:
                call |= {"id": tools.call_id(self._beginning.key, index, place), "type": "function"}
                function = {"name": piece.name, **function}
            calls.append({**call, "function": function})
        return {"tool_calls": calls}

    def _logprobs(self, answer: Answer) -> Json | None:
        return chat_logprobs(answer.entries, self._names) if self._request.logprobs else None

    def _token_ids(self, answer: Answer) -> Json:
        return {"token_ids": answer.token_ids} if self._request.return_token_ids else {}

    def _prompt_ids(self) -> Json:
        ids = self._plan.choices[0].prompt.token_ids
        return {"prompt_token_ids": list(ids)} if self._request.return_token_ids else {}

    def _chunk_usage(self) -> dict[str, Any]:
        if self._request.wants_usage_always:
            return {"usage": self._usage.usage()}
        return {"usage": None} if self._request.wants_usage_chunk else {}


def _greeting(index: int) -> Json:
    return {
        "index": index,
        "delta": {"role": "assistant", "content": ""},
        "logprobs": None,
        "finish_reason": None,
    }


def _end(delta: Delta) -> Json:
    return {
        "index": delta.index,
        "delta": {},
        "logprobs": None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
