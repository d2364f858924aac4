"""When requests came and how long they were, from public traces: Azure's CSV, Mooncake's JSON lines, or from chance.

Azure LLM inference trace 2023 (CC-BY 4.0; Patel et al., Splitwise, ISCA 2024): TIMESTAMP, ContextTokens,
GeneratedTokens. Mooncake (Apache-2.0; FAST'25): timestamp in ms, input_length, output_length. Only these fields are
read, within the limits below.
"""

import csv
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

from cluster.routing_trace import MAX_REQUEST_TOKENS

MAX_REQUESTS = 2_000_000
MAX_LINE_CHARS = 1 << 20


class RequestTraceError(ValueError):
    """A request trace that is not in its format: the file, line and field, its problem, and the limit."""


@dataclass(frozen=True, eq=False)
class Requests:
    """Requests in order of arrival, the first at 0; lengths in tokens, at least 1."""

    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def rate(self) -> float:
        """Requests a second, on average."""
        return len(self) / max(float(self.arrival_s[-1]), 1e-9)

    def at_rate(self, rate: float, duration_s: float) -> "Requests":
        """As many as come in `duration_s` at this average rate: the same gaps, scaled, over and over."""
        if not (0 < rate < math.inf and 0 < duration_s < math.inf) or rate * duration_s > MAX_REQUESTS:
            raise ValueError(f"rate {rate} for {duration_s} s: above 0, and at most {MAX_REQUESTS} requests")
        span_s = len(self) / rate
        times = max(math.ceil(duration_s / span_s), 1)
        scaled = self.arrival_s * (self.rate / rate)
        arrival_s = np.concatenate([scaled + i * span_s for i in range(times)])
        keep = int(np.searchsorted(arrival_s, duration_s))
        index = np.arange(keep) % len(self)
        return Requests(arrival_s[:keep], self.prompt_tokens[index], self.output_tokens[index])

    def over_a_day(self, rng: np.random.Generator, duration_s: float, *, night: float = 0.2) -> "Requests":
        """Thinned so that the rate follows a day: `night` of the present rate at both ends, all of it in the middle."""
        if not 0 <= night <= 1:
            raise ValueError(f"night is {night}, but it must be 0 to 1")
        share = night + (1 - night) * (0.5 - 0.5 * np.cos(2 * np.pi * self.arrival_s / duration_s))
        kept = rng.random(len(self)) < share
        return Requests(self.arrival_s[kept], self.prompt_tokens[kept], self.output_tokens[kept])


def poisson(rng: np.random.Generator, *, rate: float, duration_s: float, prompt: int, output: int) -> Requests:
    """Requests that come independently; lengths are geometric with these means."""
    for name, value in (("rate", rate), ("duration_s", duration_s), ("prompt", prompt), ("output", output)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, but it must be finite and above 0")
    if rate * duration_s > MAX_REQUESTS:
        raise ValueError(f"rate {rate} for {duration_s} s is more than {MAX_REQUESTS} requests")
    num = max(int(rng.poisson(rate * duration_s)), 1)
    lengths = [
        np.clip(rng.geometric(1 / max(mean, 1), num), 1, MAX_REQUEST_TOKENS).astype(np.int32)
        for mean in (prompt, output)
    ]
    return Requests(np.sort(rng.uniform(0, duration_s, num)), *lengths)


def read_requests(path: Path) -> Requests:
    """A `.csv` is Azure's, a `.jsonl` Mooncake's. Raises RequestTraceError, OSError."""
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise RequestTraceError(f"{path.name}: the name must end in .csv (Azure's format) or .jsonl (Mooncake's)")
    rows: list[tuple[float, int, int]] = []
    with path.open(encoding="utf-8", newline="") as file:
        try:
            for row in readers[path.suffix](file, path.name):
                rows.append(row)
                if len(rows) > MAX_REQUESTS:
                    raise RequestTraceError(f"{path.name}: more than {MAX_REQUESTS} requests")
        except UnicodeDecodeError as error:
            raise RequestTraceError(f"{path.name}: not UTF-8: {error}") from error
    if not rows:
        raise RequestTraceError(f"{path.name}: there is no request in it")
    rows.sort(key=lambda row: row[0])
    arrival_s, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    return Requests(arrival_s - arrival_s[0], prompt.astype(np.int32), output.astype(np.int32))


def _lines(file: TextIO, name: str) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE_CHARS + 1):
        number += 1
        if len(line) > MAX_LINE_CHARS:
            raise RequestTraceError(f"{name}:{number}: a line of more than {MAX_LINE_CHARS} characters")
        yield line


def _azure(file: TextIO, name: str) -> Iterator[tuple[float, int, int]]:
    try:
        reader = csv.DictReader(_lines(file, name))
        for field in ("TIMESTAMP", "ContextTokens", "GeneratedTokens"):
            if field not in (reader.fieldnames or ()):
                raise RequestTraceError(f"{name}: there is no column {field}")
        for row in reader:
            where = f"{name}:{reader.line_num}"
            yield (
                _moment(row["TIMESTAMP"], where),
                _tokens(row["ContextTokens"], where, "ContextTokens"),
                _tokens(row["GeneratedTokens"], where, "GeneratedTokens"),
            )
    except csv.Error as error:
        raise RequestTraceError(f"{name}: {error}") from error


def _mooncake(file: TextIO, name: str) -> Iterator[tuple[float, int, int]]:
    for number, line in enumerate(_lines(file, name), 1):
        where = f"{name}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestTraceError(f"{where}: not JSON: {str(error)[:100]}") from error
        if not isinstance(row, dict):
            raise RequestTraceError(f"{where}: {type(row).__name__}, but it must be an object")
        time_ms = row.get("timestamp")
        if isinstance(time_ms, bool) or not isinstance(time_ms, int | float) or not 0 <= time_ms <= 1e15:
            raise RequestTraceError(f"{where}: timestamp is {_shown(time_ms)}, but it must be 0 to 1e15 ms")
        yield (
            time_ms / 1000,
            _tokens(row.get("input_length"), where, "input_length"),
            _tokens(row.get("output_length"), where, "output_length"),
        )


def _moment(text: str | None, where: str) -> float:
    # Seven digits of a second are one more than datetime takes.
    try:
        return datetime.fromisoformat((text or "")[:26] + "+00:00").timestamp()
    except (ValueError, OverflowError):
        raise RequestTraceError(
            f"{where}: TIMESTAMP is {_shown(text)}, but it must be like 2023-11-16 18:17:03"
        ) from None


def _tokens(value: Any, where: str, field: str) -> int:
    """At least 1: an answer of nothing is counted as one token, as it takes one to find out."""
    try:
        number = int(value) if isinstance(value, str | int) and not isinstance(value, bool) else -1
    except ValueError:
        number = -1
    if not 0 <= number <= MAX_REQUEST_TOKENS:
        raise RequestTraceError(f"{where}: {field} is {_shown(value)}, but it must be 0 to {MAX_REQUEST_TOKENS}")
    return max(number, 1)


def _shown(value: Any) -> str:
    return repr(value)[:60]
