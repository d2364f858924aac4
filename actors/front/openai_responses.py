"""The JSON that goes back: token names, log-probabilities in both of OpenAI's forms, usage, and the bodies' heads.

Plain dictionaries, because OpenAI tells absent from null and a stream writes many of them. What fills them is
left to `actors.front.completions` and `actors.front.chat_completions`.
"""

import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.front.choice_text import Delta, TokenEntry
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
    def make(cls, front: FrontDoor, prefix: str, object_name: str) -> "Head":
        """A head with a new id."""
        created = int(front.wall_clock())
        return cls(
            f"{prefix}-{secrets.token_hex(12)}",
            object_name,
            created,
            front.model_id,
            front.system_fingerprint,
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

    def count(self, delta: Delta) -> None:
        """Takes note of a delta."""
        self._by_choice[delta.index] = delta.num_tokens

    def usage(self) -> Json:
        """OpenAI's usage object so far."""
        generated = sum(self._by_choice.values())
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": generated,
            "total_tokens": self.num_prompt_tokens + generated,
        }


class TokenNames:
    """How log-probabilities call a token: its text, or `bytes:\\xe2` where it is part of a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def raw(self, token_id: int) -> bytes:
        """The token's bytes; tokens that only the model knows have none."""
        return self._tokenizer.token_bytes(token_id) if token_id < self._tokenizer.vocab_size else b""

    def name(self, token_id: int) -> str:
        """The token as text."""
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


def _alternatives(position: PositionLogprobs, names: TokenNames) -> dict[str, float]:
    """The most likely tokens, and always the chosen one. Of two tokens with one name the likelier counts."""
    alternatives: dict[str, float] = {}
    for token in (*position.top, position.chosen):
        alternatives.setdefault(names.name(token.token_id), finite(token.logprob))
    return alternatives


def finite(logprob: float) -> float:
    """JSON has no infinity."""
    return logprob if logprob > LOWEST_LOGPROB else LOWEST_LOGPROB
