"""From when each token arrived to tokens per second: the definitions of the package's docstring, as arithmetic.

B sequences, O tokens of output each.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.engine_bench.failures import BenchError


@dataclass(frozen=True, slots=True)
class Run:
    """What B sequences, submitted together, were answered.

    `tokens[b]` are the generated ids of sequence b; `arrivals_s[b]` when each came, in seconds since the submit.
    """

    tokens: tuple[tuple[int, ...], ...]
    arrivals_s: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        lengths = [(len(ids), len(times)) for ids, times in zip(self.tokens, self.arrivals_s, strict=True)]
        if not lengths or any(ids != times or not ids for ids, times in lengths):
            raise BenchError(f"every sequence needs tokens and a time for each, got (tokens, times) {lengths}")

    @property
    def all_started_s(self) -> float:
        """When the last sequence got its first token."""
        return max(times[0] for times in self.arrivals_s)

    @property
    def first_done_s(self) -> float:
        """When the first sequence got its last token."""
        return min(times[-1] for times in self.arrivals_s)

    @property
    def all_done_s(self) -> float:
        """When the last token of all came."""
        return max(times[-1] for times in self.arrivals_s)


def prefill_tok_s(num_prompt_tokens: int, run: Run) -> float:
    """`num_prompt_tokens` is the sum over all prompts."""
    return num_prompt_tokens / run.all_started_s


def decode_tok_s(run: Run) -> float:
    """While all decode. Raises BenchError where that is never so."""
    return _rate(run, run.first_done_s)


def decode_to_end_tok_s(run: Run) -> float:
    """The same window, to the last token of all."""
    return _rate(run, run.all_done_s)


def decode_window_tokens(run: Run) -> int:
    """Tokens that `decode_tok_s` counts."""
    return _tokens_within(run.arrivals_s, run.all_started_s, run.first_done_s)


def _rate(run: Run, end_s: float) -> float:
    begin_s = run.all_started_s
    if end_s <= begin_s:
        raise BenchError(
            "a sequence was done before the last one had its first token, so there is no time in which all decode: "
            "--output-len must be longer for this batch"
        )
    return _tokens_within(run.arrivals_s, begin_s, end_s) / (end_s - begin_s)


def _tokens_within(arrivals_s: Sequence[Sequence[float]], begin_s: float, end_s: float) -> int:
    return sum(begin_s < at <= end_s for times in arrivals_s for at in times)
