"""What a request may ask of sampling, checked field by field, and where its randomness comes from."""

import hashlib
import math
import struct
from dataclasses import dataclass

# Below this the softmax is a one-hot vector anyway: greedy (vLLM draws the line at the same place).
GREEDY_TEMPERATURE = 1e-5
MAX_LOGIT_BIAS = 100.0
_INT64 = 2**63


class SamplingParamsError(ValueError):
    """A sampling parameter out of its range; `field` names it."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How a request's next token is chosen, with vLLM's meanings.

    `temperature` 0 is greedy. `top_p` in (0, 1], 1 keeps all. `top_k` 0 (or -1) keeps all. `min_p` in [0,
    1] drops tokens less likely than `min_p` times the likeliest. `seed` is 64 bits, signed or not; None
    lets the sampler draw one. `repetition_penalty` > 0 divides (positive) or multiplies (negative) logits
    of tokens in the prompt or output; `presence_penalty` and `frequency_penalty` in [-2, 2] are subtracted
    once, or per occurrence, for output tokens. `logit_bias` is (id, number in [-100, 100]) for distinct ids:
    added to the logits before penalties.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        _check_number("temperature", self.temperature, 0.0, math.inf)
        _check_number("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, math.inf, open_low=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_int("top_k", self.top_k, -1, _INT64 - 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -_INT64, 2 * _INT64 - 1)
        for token, bias in self.logit_bias:
            _check_int("logit_bias", token, 0, _INT64 - 1)
            _check_number("logit_bias", bias, -MAX_LOGIT_BIAS, MAX_LOGIT_BIAS)
        if len({token for token, _ in self.logit_bias}) != len(self.logit_bias):
            raise SamplingParamsError("logit_bias", "has an id twice")

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def changes_logits(self) -> bool:
        """True where a row's logits are not the model's own before the draw."""
        return bool(self.logit_bias) or self.has_penalties

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def uniform(seed: int, index: int) -> float:
    """The random number in [0, 1) that decides output token `index` (0 is the first) of a request with `seed`.

    A function and not a stream: the 53 upper bits of BLAKE2b over both numbers as little-endian 64-bit
    integers. So no batch, preemption, restart or move to another machine can change which number a token
    gets, on any platform.
    """
    data = struct.pack("<QQ", seed % 2**64, index)
    digest = hashlib.blake2b(data, digest_size=8, person=b"octavo-sampling").digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _check_number(field: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SamplingParamsError(field, f"must be a finite number, got {value!r}")
    if value > high or value < low or (open_low and value == low):
        limits = f"{'more than' if open_low else 'at least'} {low:g}"
        limits += f" and at most {high:g}" if high < math.inf else ""
        raise SamplingParamsError(field, f"must be {limits}, got {value!r}")


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise SamplingParamsError(field, f"must be an integer, got {value!r}")
    if not low <= value <= high:
        raise SamplingParamsError(field, f"must be in {low}..{high}, got {value!r}")
