"""Log-probabilities as they are reported: plain values. Computing them is `model.sampling.logprobs`' work."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """`logprob` is a natural logarithm; `rank` 1 is the most likely, and equal logits share a rank."""

    token: int
    logprob: float
    rank: int


@dataclass(frozen=True, slots=True)
class PositionLogprobs:
    """The token that stands at a position, and the most likely ones, best first (lower id first if equal)."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]
