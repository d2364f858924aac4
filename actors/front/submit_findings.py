"""What the validator finds wrong with a `Submit`, in the words of HTTP: the client's own parameter and OpenAI's codes.

The rules are `actors.coordinator.submit_check`'s, the same for what comes by gRPC.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from actors.coordinator.submit_check import InvalidSubmit
from actors.front.openai_errors import ApiError, context_length_exceeded, invalid

_PROMPT = "prompt_token_ids"


@contextmanager
def as_http(
    prompt_param: str = "prompt", *, limit: int = 0, num_prompt: int = 0, max_tokens: int = 0
) -> Iterator[None]:
    """Raises the block's InvalidSubmit as ApiError 400.

    The client wrote its prompt as `prompt_param`; it has `num_prompt` tokens, and `max_tokens` are to follow in a
    context of `limit`.
    """
    try:
        yield
    except InvalidSubmit as error:
        if error.too_long:
            raise context_length_exceeded(prompt_param, limit, num_prompt, max_tokens, exact=True) from None
        raise _named(error, prompt_param) from None


def _named(error: InvalidSubmit, prompt_param: str) -> ApiError:
    """`sampling.top_p` is `top_p` here, and a prompt's token is the prompt's fault."""
    problem = error.problem
    if error.field.startswith(_PROMPT):
        param, place = prompt_param, error.field.removeprefix(_PROMPT).strip("[]")
        problem = f"token {place} {problem}" if place else f"it {problem}"
    else:
        param = error.field.removeprefix("sampling.")
        problem = f"it {problem}"
    return invalid(param, f"Invalid value for '{param}': {problem}.")
