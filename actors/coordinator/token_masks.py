"""The masks that a checked `Submit` asks for. Only who computes makes them: they hold tensors."""

from model.sampling.masks import BadWords, OnlyTokens, TokenMask
from protos.coordinator_pb2 import Sampling


def token_masks(given: Sampling) -> tuple[TokenMask, ...]:
    """Of allowed tokens and of bad words, as `actors.coordinator.submit_check` let them pass."""
    masks: list[TokenMask] = []
    if given.allowed_token_ids:
        masks.append(OnlyTokens(given.allowed_token_ids))
    if given.bad_words:
        masks.append(BadWords([list(word.ids) for word in given.bad_words]))
    return tuple(masks)
