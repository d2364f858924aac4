"""The JSON that goes back: token names, log-probabilities in both of OpenAI's forms, usage, and the bodies' heads.

Plain dictionaries, because OpenAI tells absent from null and a stream writes many of them. What fills them is
left to `actors.front.completions` and `actors.front.chat_completions`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.front.choice_text import TokenEntry
from actors.front.event_ids import Position, StreamKey
from actors.front.front_door import FrontDoor
from model.text.tokenizer import Tokenizer
from protos.coordinator_pb2 import PositionLogprobs, TokenLogprob

LOWEST_LOGPROB = -9999.0

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Head:
    """What the body and every chunk of one response begin with."""

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: str

    @classmethod
    def make(cls, front: FrontDoor, prefix: str, object_name: str, key: StreamKey) -> "Head":
        """The head of the answer that `key` names: the same wherever it goes on."""
        return cls(
            f"{prefix}-{key.label or key.name}", object_name, key.created, front.model_id, front.system_fingerprint
        )

    def body(self, choices: list[Json], **more: Any) -> Json:
        """The body or chunk with these choices."""
        return {
            "id": self.id,
            "object": self.object,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            "choices": choices,
            **more,
        }


@dataclass(slots=True)
class UsageCount:
    """Counts tokens as they come: every generated one, the one that stopped included."""

    num_prompt_tokens: int
    _by_choice: dict[int, int] = field(default_factory=dict)
    _cached: dict[int, int] = field(default_factory=dict)

    @classmethod
    def after(cls, num_prompt_tokens: int, told: Sequence[Position]) -> "UsageCount":
        """Counts on where each choice was told so far."""
        return cls(num_prompt_tokens, {index: position.num_tokens for index, position in enumerate(told)})

    def count(self, index: int, num_tokens: int, num_cached_tokens: int = 0) -> None:
        """Takes note that choice `index` has that many tokens now.

        How many of its prompt's tokens were in the KV cache holds as it was told first: whoever goes on with a choice
        may find others.
        """
        self._by_choice[index] = num_tokens
        self._cached.setdefault(index, num_cached_tokens)

    def usage(self) -> Json:
        """OpenAI's usage object so far."""
        generated = sum(self._by_choice.values())
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.num_prompt_tokens + generated,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
        }


class TokenNames:
    """How log-probabilities call a token: its text, or `bytes:\\xe2` where it is part of a character.

    With `as_ids` `token_id:42`, as vLLM's `return_tokens_as_token_ids` has it.
    """

    def __init__(self, tokenizer: Tokenizer, *, as_ids: bool = False) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def raw(self, token_id: int) -> bytes:
        """The token's bytes; tokens that only the model knows have none."""
        return self._tokenizer.token_bytes(token_id) if token_id < self._tokenizer.vocab_size else b""

    def name(self, token_id: int) -> str:
        """The token as text."""
        if self._as_ids:
            return f"token_id:{token_id}"
        raw = self.raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(entries: Iterable[TokenEntry], names: TokenNames) -> Json:
    """The `logprobs` of a chat choice."""
    content = [
        {
            **_chat_token(entry.logprobs.chosen, names),
            "top_logprobs": [_chat_token(other, names) for other in entry.logprobs.top],
        }
        for entry in entries
        if entry.logprobs is not None
    ]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenLogprob, names: TokenNames) -> Json:
    raw = names.raw(token.token_id)
    return {"token": names.name(token.token_id), "logprob": finite(token.logprob), "bytes": list(raw)}


def text_logprobs(entries: Sequence[TokenEntry], names: TokenNames) -> Json:
    """The `logprobs` of a completions choice. A token without any (a prompt's first) has null."""
    return {
        "tokens": [names.name(entry.token_id) for entry in entries],
        "token_logprobs": [finite(entry.logprobs.chosen.logprob) if entry.logprobs else None for entry in entries],
        "top_logprobs": [_alternatives(entry.logprobs, names) if entry.logprobs else None for entry in entries],
        "text_offset": [entry.start for entry in entries],
    }


def prompt_logprobs(positions: Sequence[PositionLogprobs], names: TokenNames) -> list[Json | None]:
    """vLLM's `prompt_logprobs`: null for the first token, then by id the token that stands there and the likeliest."""
    return [None, *(_by_id(position, names) for position in positions)]


def _by_id(position: PositionLogprobs, names: TokenNames) -> Json:
    return {
        str(token.token_id): {
            "logprob": finite(token.logprob),
            "rank": token.rank,
            "decoded_token": names.raw(token.token_id).decode(errors="replace"),
        }
        for token in (position.chosen, *position.top)
    }


def _alternatives(position: PositionLogprobs, names: TokenNames) -> dict[str, float]:
    """The most likely tokens, and always the chosen one. Of two tokens with one name the likelier counts."""
    alternatives: dict[str, float] = {}
    for token in (*position.top, position.chosen):
        alternatives.setdefault(names.name(token.token_id), finite(token.logprob))
    return alternatives


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
