"""POST /v1/completions: prompts in, text out, as one body or as a stream of chunks; with echo and log-probabilities."""

import functools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from actors.front.caller import NOBODY, Caller
from actors.front.choice_text import Answer, Delta, TokenEntry
from actors.front.event_ids import Stage
from actors.front.front_door import FrontDoor
from actors.front.generation import Choice, Plan, Wish, check_request, plan, run
from actors.front.openai_responses import Head, Json, TokenNames, UsageCount, prompt_logprobs, text_logprobs
from actors.front.openai_schema import COMPLETIONS_DEFAULT_MAX_TOKENS, CompletionRequest
from actors.front.prompts import completion_prompts
from actors.front.request_ids import UNNAMED, RequestName
from actors.front.resume import Beginning, begin
from actors.front.streaming import Event
from actors.front.structured import wanted_form
from actors.front.token_rules import token_rules
from model.text.detokenizer import IncrementalDetokenizer
from protos.coordinator_pb2 import PositionLogprobs


class Completion:
    """One request on its way. Make it with `prepare`, then use either `body` or `chunks`."""

    def __init__(self, front: FrontDoor, request: CompletionRequest, work: Plan, beginning: Beginning) -> None:
        self._front = front
        self._request = request
        self._plan = work
        self._beginning = beginning
        self._names = TokenNames(front.tokenizer, as_ids=bool(request.return_tokens_as_token_ids))
        self._head = Head.make(front, "cmpl", "text_completion", beginning.key)
        self._usage = UsageCount.after(work.num_prompt_tokens, beginning.told)
        self._echo_chars: dict[int, int] = {}
        # A stream tells a prompt's tokens with the first chunk of each choice only.
        self._prompt_told = {i for i, told in enumerate(beginning.told) if told.stage is not Stage.NOTHING}

    @classmethod
    async def prepare(
        cls,
        front: FrontDoor,
        request: CompletionRequest,
        last_event_id: str | None = None,
        *,
        name: RequestName = UNNAMED,
        caller: Caller = NOBODY,
    ) -> "Completion":
        """Reads the prompts, and where a cut stream goes on. Raises ApiError."""
        check_request(front, request, len(request.prompt))
        prompts = await completion_prompts(front, request)
        wish = Wish(
            prompt_param="prompt",
            max_tokens=request.max_tokens,
            default_max_tokens=COMPLETIONS_DEFAULT_MAX_TOKENS,
            logprobs=request.logprobs,
            prompt_logprobs=_most(request.prompt_logprobs, request.logprobs if request.echo else None),
            continues_prompt=True,
            form=wanted_form(request),
        )
        rules = await token_rules(front, request)
        beginning = begin(front, request, prompts, last_event_id, name)
        return cls(front, request, plan(front, request, prompts, wish, beginning, rules, caller), beginning)

    async def body(self) -> Json:
        """The whole response. Raises ApiError."""
        answers = [Answer() for _ in self._plan.choices]
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                answers[delta.index].add(delta)
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return self._head.body(choices, usage=self._usage.usage())

    async def chunks(self) -> AsyncGenerator[Event, None]:
        """The response piece by piece, or what is left of it. Raises ApiError."""
        ids = self._beginning.event_ids(self._front)
        usage: dict[str, Any] = {"usage": None} if self._request.wants_usage_chunk else {}
        async with aclosing(self._deltas()) as deltas:
            async for delta in deltas:
                if not (delta.text or delta.entries or delta.finish_reason or self._request.return_token_ids):
                    continue
                if self._request.wants_usage_always:
                    usage = {"usage": self._usage.usage()}
                chunk = self._head.body([self._choice(delta.index, Answer.of(delta))], **usage)
                stage = Stage.OPEN if delta.finish_reason is None else Stage.ENDED
                yield Event(chunk, ids.at(delta.index, delta.num_tokens, stage))
        if self._request.wants_usage_chunk and not self._beginning.usage_told:
            yield Event(self._head.body([], usage=self._usage.usage()), ids.with_usage())

    async def _deltas(self) -> AsyncGenerator[Delta, None]:
        """The generation's deltas, each choice's first one with the echo in front."""
        async with aclosing(run(self._front, self._plan)) as deltas:
            async for delta in deltas:
                self._usage.count(delta.index, delta.num_tokens, delta.num_cached_tokens)
                yield await self._with_echo(delta) if self._request.echo else delta

    async def _with_echo(self, delta: Delta) -> Delta:
        echo, told = "", tuple[TokenEntry, ...]()
        if delta.index not in self._echo_chars:
            choice = self._plan.choices[delta.index]
            work = functools.partial(self._echo, choice, delta.prompt_logprobs)
            echo, told = await self._front.text_work(len(choice.prompt.token_ids), work)
            self._echo_chars[delta.index] = len(echo)
            if choice.told.stage is not Stage.NOTHING:
                echo = ""
        shift = self._echo_chars[delta.index]
        own = tuple(replace(entry, start=entry.start + shift, end=entry.end + shift) for entry in delta.entries)
        return replace(delta, text=echo + delta.text, entries=told + own)

    def _echo(self, choice: Choice, logprobs: tuple[PositionLogprobs, ...]) -> tuple[str, tuple[TokenEntry, ...]]:
        """The prompt's text, and its tokens where log-probabilities are wanted."""
        detokenizer = IncrementalDetokenizer(self._front.tokenizer, skip_special=self._plan.skip_special_tokens)
        pieces = [detokenizer.push([token]) for token in choice.prompt.token_ids]
        text = choice.prompt.text if choice.prompt.text is not None else "".join((*pieces, detokenizer.flush()))
        if self._request.logprobs is None or choice.told.stage is not Stage.NOTHING:
            return text, ()
        entries, end = [], 0
        positions = (None, *(_at_most(place, self._request.logprobs) for place in logprobs))
        for token, piece, position in zip(choice.prompt.token_ids, pieces, positions, strict=True):
            start, end = end, end + len(piece)
            entries.append(TokenEntry(token, position, start, end))
        return text, tuple(entries)

    def _choice(self, index: int, answer: Answer) -> Json:
        wanted = self._request.logprobs is not None
        choice: Json = {
            "index": index,
            "text": answer.text,
            "logprobs": text_logprobs(answer.entries, self._names) if wanted else None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
            **self._plan.routed_experts(self._front, index, answer),
        }
        if self._request.prompt_logprobs is not None:
            places = [_at_most(place, self._request.prompt_logprobs) for place in answer.prompt_logprobs]
            choice["prompt_logprobs"] = prompt_logprobs(places, self._names)
        if self._request.return_token_ids:
            choice["token_ids"] = answer.token_ids
            if index not in self._prompt_told:
                choice["prompt_token_ids"] = list(self._plan.choices[index].prompt.token_ids)
                self._prompt_told.add(index)
        return choice


def _most(*numbers: int | None) -> int | None:
    """The largest of those that are given."""
    return max((number for number in numbers if number is not None), default=None)


def _at_most(place: PositionLogprobs, num: int) -> PositionLogprobs:
    """With no more alternatives than that."""
    return place if len(place.top) <= num else PositionLogprobs(chosen=place.chosen, top=place.top[:num])
