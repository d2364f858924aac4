"""The requests of a load, all of them a function of its seed: the golden run and the faulty one ask the very same.

A load has `streams` lanes, each of which asks one request after the other and then begins again, and arrivals: long
prompts that come whether or not the earlier ones are answered, so that some are always in prefill.
"""

import random
from dataclasses import dataclass
from typing import Any

Key = tuple[str, int, int]
"""(`lane` or `arrival`, which, which of its requests)."""

_WORD_LIST = (
    "the a of and to in house river stone paper folded eight leaves open window light under over between winter "
    "green quiet machine expert token answer question counts never always because while return value"
)
_WORDS = _WORD_LIST.split()


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """`per_lane` is how many different requests a lane has, `arrivals` how many different long prompts there are.

    A long prompt comes every `arrival_every_s` seconds (0: none). Under overload answers have `overload_tokens`: so
    many that few refusals are ten times the load, and what they cost the two cores is little. Lengths are in tokens to
    generate and characters of prompt; with the tiny model's tokenizer a character is about a token.
    """

    seed: int = 0
    streams: int = 16
    per_lane: int = 2
    max_tokens: int = 96
    prompt_chars: int = 48
    arrivals: int = 8
    arrival_every_s: float = 0.4
    arrival_chars: int = 320
    arrival_max_tokens: int = 4
    overload_tokens: int = 300

    def keys(self) -> list[Key]:
        """Every different request."""
        lanes: list[Key] = [("lane", lane, turn) for lane in range(self.streams) for turn in range(self.per_lane)]
        return lanes + [("arrival", 0, turn) for turn in range(self.arrivals)]

    def lane(self, lane: int, count: int) -> Key:
        """A lane's request number `count`."""
        return ("lane", lane, count % self.per_lane)

    def arrival(self, count: int) -> Key:
        """Arrival number `count`."""
        return ("arrival", 0, count % self.arrivals)


def body(load: Load, key: Key, model_id: str) -> dict[str, Any]:
    """The JSON of /v1/completions for a request: half of them greedy, half seeded, some with log-probabilities, some
    with penalties. None stops early, so that its length is known.
    """
    kind, lane, turn = key
    rng = random.Random(f"{load.seed}/{key}")
    long = kind == "arrival"
    return {
        "model": model_id,
        "prompt": _text(rng, load.arrival_chars if long else rng.randint(load.prompt_chars // 2, load.prompt_chars)),
        "max_tokens": load.arrival_max_tokens if long else load.max_tokens,
        "stream": True,
        "ignore_eos": True,
        "return_token_ids": True,
        **_sampling(lane + turn, rng),
    }


def _sampling(kind: int, rng: random.Random) -> dict[str, Any]:
    seeded = {"temperature": 0.9, "top_p": 0.95, "seed": rng.randrange(2**32)}
    match kind % 4:
        case 0:
            return {"temperature": 0}
        case 1:
            return seeded
        case 2:
            return {"temperature": 0, "logprobs": 1}
        case _:
            return {**seeded, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1}


def _text(rng: random.Random, chars: int) -> str:
    text = rng.choice(_WORDS)
    while len(text) < chars:
        text += " " + rng.choice(_WORDS)
    return text[:chars]
