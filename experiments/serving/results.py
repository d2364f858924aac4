"""What is known about one request after it ended, well or badly. Values only."""

from dataclasses import dataclass

MAX_DETAIL_CHARS = 300


class RequestFailed(Exception):
    """A request that gave no full answer. `kind` is one short word to count by, the message starts with it."""

    def __init__(self, kind: str, detail: str) -> None:
        line = " ".join(detail.split())
        super().__init__(f"{kind}: {line}"[:MAX_DETAIL_CHARS])
        self.kind = kind


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestResult:
    """One request, times in seconds on the client.

    `start_s`: when it was sent, after the run's start. `queue_s`: how long before that it was due but held back by
    the bound on concurrency. `ttft_s` and `latency_s`: from sending to the first and to the last chunk with tokens.
    `itl_s`: the gaps between such chunks; a chunk of several tokens closes one gap, as in vLLM's benchmark.
    Tokens are the server's count. `error` is empty for a full answer; else nothing but `start_s` and `queue_s` counts.
    """

    start_s: float
    queue_s: float = 0.0
    ttft_s: float = 0.0
    latency_s: float = 0.0
    itl_s: tuple[float, ...] = ()
    input_tokens: int = 0
    output_tokens: int = 0
    text: str = ""
    error: str = ""

    @property
    def is_complete(self) -> bool:
        """True when the whole answer came."""
        return not self.error

    @property
    def tpot_s(self) -> float | None:
        """Seconds for each token after the first; None for an answer of one token, which has none."""
        if self.output_tokens < 2:
            return None
        return (self.latency_s - self.ttft_s) / (self.output_tokens - 1)
