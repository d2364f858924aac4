"""What one serving benchmark is asked to do, checked once. What it costs or shows is for the files beside this one."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from actors.command.added_commands import CommandError

COMPLETIONS = "/v1/completions"
CHAT_COMPLETIONS = "/v1/chat/completions"
ENDPOINTS = (COMPLETIONS, CHAT_COMPLETIONS)
DATASETS = ("random", "text")
METRICS = ("ttft", "tpot", "itl", "e2el", "client_queue_time")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")

MAX_PROMPTS = 100_000
MAX_TOKENS = 1_000_000
MAX_CONCURRENCY = 4096
DEFAULT_CONCURRENCY = 512  # without --max-concurrency: half of the open files that a process usually may have
MAX_REPEATS = 1000
MAX_TIMEOUT_S = 86_400.0


class BenchError(CommandError):
    """A benchmark that cannot be run as asked: the field, its value and the limit, or what the server said."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """One benchmark. Raises BenchError for a value out of its limits, naming it as it is typed.

    `url` is the server's root, with or without `/v1`. `request_rate` is per second; infinity sends everything at
    once. `ignore_eos` None: true for random prompts, which have no end of their own, false for text.
    `goodput` pairs a metric with its limit in ms; a request is good when it meets all of them.
    """

    url: str
    endpoint: str = COMPLETIONS
    model: str | None = None
    dataset: str = "random"
    input_len: int = 128
    output_len: int = 128
    vocab_size: int = 32_000
    text_path: Path | None = None
    num_prompts: int = 64
    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    num_warmups: int = 0
    repeats: int = 1
    seed: int = 0
    temperature: float = 0.0
    ignore_eos: bool | None = None
    goodput: tuple[tuple[str, float], ...] = ()
    percentile_metrics: tuple[str, ...] = METRICS[:4]
    metric_percentiles: tuple[float, ...] = (50.0, 90.0, 99.0)
    timeout_s: float = 600.0
    detailed: bool = False

    def __post_init__(self) -> None:
        _whole("num_prompts", self.num_prompts, 1, MAX_PROMPTS)
        _whole("input_len", self.input_len, 1, MAX_TOKENS)
        _whole("output_len", self.output_len, 1, MAX_TOKENS)
        _whole("vocab_size", self.vocab_size, 2, 2**31)
        _whole("num_warmups", self.num_warmups, 0, MAX_PROMPTS)
        _whole("repeats", self.repeats, 1, MAX_REPEATS)
        _whole("seed", self.seed, 0, 2**32 - 1)
        if self.max_concurrency is not None:
            _whole("max_concurrency", self.max_concurrency, 1, MAX_CONCURRENCY)
        _number("burstiness", self.burstiness, 0.0, math.inf)
        _number("request_rate", self.request_rate, 0.0, math.inf)
        _number("timeout_s", self.timeout_s, 0.0, MAX_TIMEOUT_S)
        if not 0 <= self.temperature <= 2:
            raise BenchError(f"--temperature is {self.temperature:g}, but must be from 0 to 2")
        _one_of("endpoint", self.endpoint, ENDPOINTS)
        _one_of("dataset", self.dataset, DATASETS)
        _check_dataset(self)
        _check_url(self.url)

    @property
    def base_url(self) -> str:
        """The server's root, without `/v1` and without a slash at the end."""
        return self.url.rstrip("/").removesuffix("/v1").rstrip("/")

    @property
    def is_chat(self) -> bool:
        """True when prompts go out as conversations."""
        return self.endpoint == CHAT_COMPLETIONS

    @property
    def ignores_eos(self) -> bool:
        """What the requests say about the end-of-sequence token."""
        return self.dataset == "random" if self.ignore_eos is None else self.ignore_eos

    @property
    def concurrency(self) -> int:
        """Requests in flight at most; there is always a bound."""
        return self.max_concurrency or min(self.num_prompts, DEFAULT_CONCURRENCY)


def parse_goodput(pairs: Iterable[str]) -> tuple[tuple[str, float], ...]:
    """`["ttft:500", "tpot:50"]` as pairs of metric and ms. Raises BenchError."""
    found: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        limit_ms = _float(text)
        if name not in GOODPUT_METRICS or limit_ms is None or not 0 <= limit_ms < math.inf:
            allowed = ", ".join(GOODPUT_METRICS)
            raise BenchError(f"--goodput is {pair!r}, but must be METRIC:MILLISECONDS with a METRIC of {allowed}")
        found[name] = limit_ms
    return tuple(found.items())


def parse_metrics(text: str) -> tuple[str, ...]:
    """`"ttft,tpot"` as names. Raises BenchError."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        _one_of("percentile_metrics", name, METRICS)
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    """`"50,99.9"` as numbers. Raises BenchError."""
    numbers = [_float(part) for part in text.split(",")]
    if not all(number is not None and 0 <= number <= 100 for number in numbers):
        raise BenchError(f"--metric-percentiles is {text!r}, but must be numbers from 0 to 100 with commas between")
    return tuple(dict.fromkeys(number for number in numbers if number is not None))


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _whole(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise BenchError(f"{_flag(name)} is {value}, but must be a whole number from {low} to {high}")


def _number(name: str, value: float, above: float, high: float) -> None:
    if not above < value <= high:
        raise BenchError(f"{_flag(name)} is {value:g}, but must be more than {above:g} and at most {high:g}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise BenchError(f"{_flag(name)} is {value!r}, but must be one of {', '.join(choices)}")


def _check_dataset(settings: ServeSettings) -> None:
    if settings.dataset == "random" and settings.is_chat:
        raise BenchError(f"--dataset is 'random', which sends token ids, but {CHAT_COMPLETIONS} takes text only")
    if settings.dataset == "text" and settings.text_path is None:
        raise BenchError("--dataset is 'text', but --text-path is not given")
    if settings.dataset == "random" and settings.text_path is not None:
        raise BenchError(f"--text-path is {str(settings.text_path)!r}, but --dataset is 'random'")


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good or parts.query or parts.fragment:
        raise BenchError(f"URL is {url!r}, but must be like http://127.0.0.1:8000")
