"""A request's own rules about tokens as the wire says them: bias, allowed tokens, and bad words as series of ids.

Their mathematics is `model.sampling`'s. Form and size were checked by `actors.front.request_fields`, which knows no
vocabulary.
"""

import functools
from dataclasses import dataclass

from actors.front.front_door import FrontDoor
from actors.front.openai_errors import invalid
from actors.front.openai_schema import GenerationRequest
from model.text.tokenizer import Tokenizer
from protos.coordinator_pb2 import Sampling, TokenIds

MAX_BAD_WORD_TOKENS = 4096
"""Of all bad words together, both spellings counted."""


@dataclass(frozen=True, slots=True)
class TokenRules:
    """What is added to each choice's `Sampling`."""

    bias: tuple[tuple[int, float], ...] = ()
    allowed: tuple[int, ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()

    def add_to(self, sampling: Sampling) -> None:
        """Says so on the wire."""
        if self.bias:
            ids, values = zip(*self.bias, strict=True)
            sampling.logit_bias_ids.extend(ids)
            sampling.logit_bias_values.extend(values)
        sampling.allowed_token_ids.extend(self.allowed)
        sampling.bad_words.extend(TokenIds(ids=word) for word in self.bad_words)


NONE = TokenRules()


async def token_rules(front: FrontDoor, request: GenerationRequest) -> TokenRules:
    """The request's rules. Raises ApiError for a token that the model does not have and for words with too many."""
    if not request.logit_bias and not request.allowed_token_ids and not request.bad_words:
        return NONE
    bias = tuple((int(token), float(value)) for token, value in (request.logit_bias or {}).items())
    if any(token >= front.vocab_size for token, _ in bias):
        raise invalid("logit_bias", f"Invalid value for 'logit_bias': token ids must be below {front.vocab_size}.")
    return TokenRules(bias, tuple(request.allowed_token_ids or ()), await _bad_words(front, request.bad_words or []))


async def _bad_words(front: FrontDoor, words: list[str]) -> tuple[tuple[int, ...], ...]:
    if not words:
        return ()
    work = functools.partial(_spellings, front.tokenizer, words)
    series = await front.text_work(sum(map(len, words)), work)
    if series is None:
        raise invalid("bad_words", "Invalid value for 'bad_words': each word must have at least one token.")
    num_tokens = sum(map(len, series))
    if num_tokens > MAX_BAD_WORD_TOKENS:
        reason = f"the words must have at most {MAX_BAD_WORD_TOKENS} tokens in all, not {num_tokens}"
        raise invalid("bad_words", f"Invalid value for 'bad_words': {reason}.")
    return series


def _spellings(tokenizer: Tokenizer, words: list[str]) -> tuple[tuple[int, ...], ...] | None:
    """Each word as it is read where a text begins and after a space, as in vLLM; None where one has no tokens."""
    series: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip() or word
        found = [tuple(tokenizer.encode(prefix + bare, add_bos=False)) for prefix in ("", " ")]
        if not any(found):
            return None
        series.update(dict.fromkeys(one for one in found if one))
    return tuple(series)
