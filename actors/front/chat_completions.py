"""POST /v1/chat/completions: a conversation in, the assistant's message out, as one body or as a stream of chunks."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from actors.front.choice_text import Answer, Delta
from actors.front.front_door import FrontDoor
from actors.front.generation import Plan, Wish, check_request, plan, run
from actors.front.openai_responses import Head, Json, TokenNames, UsageCount, chat_logprobs
from actors.front.openai_schema import ChatCompletionRequest
from actors.front.prompts import chat_prompt


class ChatCompletion:
    """One request on its way. Make it with `prepare`, then use either `body` or `chunks`."""

    def __init__(self, front: FrontDoor, request: ChatCompletionRequest, work: Plan) -> None:
        self._front = front
        self._request = request
        self._plan = work
        self._names = TokenNames(front.tokenizer)
        self._usage = UsageCount(work.num_prompt_tokens)

    @classmethod
    async def prepare(cls, front: FrontDoor, request: ChatCompletionRequest) -> "ChatCompletion":
        """Renders and reads the conversation. Raises ApiError."""
        check_request(front, request, 1)
        prompt = await chat_prompt(front, request)
        newer = request.max_completion_tokens
        wish = Wish(
            prompt_param="messages",
            max_tokens=request.max_tokens if newer is None else newer,
            default_max_tokens=None,
            logprobs=(request.top_logprobs or 0) if request.logprobs else None,
        )
        return cls(front, request, plan(front, request, [prompt], wish))

    async def body(self) -> Json:
        """The whole response. Raises ApiError."""
        head = Head.make(self._front, "chatcmpl", "chat.completion")
        answers = [Answer() for _ in self._plan.choices]
        async with aclosing(run(self._front, self._plan)) as deltas:
            async for delta in deltas:
                self._usage.count(delta)
                answers[delta.index].add(delta)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return head.body(choices, usage=self._usage.usage(), **self._prompt_ids())

    async def chunks(self) -> AsyncGenerator[Json, None]:
        """The response piece by piece: the role, text, the end, for each choice; then the usage. Raises ApiError."""
        head = Head.make(self._front, "chatcmpl", "chat.completion.chunk")
        greeted: set[int] = set()
        async with aclosing(run(self._front, self._plan)) as deltas:
            async for delta in deltas:
                self._usage.count(delta)
                usage = self._chunk_usage()
                if delta.index not in greeted:
                    greeted.add(delta.index)
                    greeting = {"role": "assistant", "content": ""}
                    first = {"index": delta.index, "delta": greeting, "logprobs": None, "finish_reason": None}
                    yield head.body([first], **self._prompt_ids(), **usage)
                if delta.text or delta.entries or self._request.return_token_ids:
                    yield head.body([self._piece(delta.index, Answer.of(delta))], **usage)
                if delta.finish_reason is not None:
                    yield head.body([_end(delta)], **usage)
        if self._request.wants_usage_chunk:
            yield head.body([], usage=self._usage.usage())

    def _choice(self, index: int, answer: Answer) -> Json:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self._logprobs(answer),
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **self._token_ids(answer),
        }

    def _piece(self, index: int, answer: Answer) -> Json:
        return {
            "index": index,
            "delta": {"content": answer.text},
            "logprobs": self._logprobs(answer),
            "finish_reason": None,
            **self._token_ids(answer),
        }

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


def _end(delta: Delta) -> Json:
    return {
        "index": delta.index,
        "delta": {},
        "logprobs": None,
        "finish_reason": delta.finish_reason,
        "stop_reason": delta.stop_reason,
    }
