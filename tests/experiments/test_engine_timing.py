"""Tokens per second as the benchmark defines them, and what it refuses to call a measurement."""

import pytest

from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.timing import (
    Run,
    decode_to_end_tok_s,
    decode_tok_s,
    decode_window_tokens,
    prefill_tok_s,
)


def run(*arrivals: tuple[float, ...]) -> Run:
    return Run(tuple(tuple(range(len(times))) for times in arrivals), arrivals)


def test_prefill_ends_with_the_last_first_token() -> None:
    assert prefill_tok_s(30, run((1.0,), (3.0,), (2.0,))) == 10.0


def test_a_batch_in_lockstep_decodes_every_token_after_the_first() -> None:
    lockstep = run((2.0, 3.0, 4.0), (2.0, 3.0, 4.0))
    assert decode_tok_s(lockstep) == decode_to_end_tok_s(lockstep) == 4 / 2.0
    assert decode_window_tokens(lockstep) == 4


def test_the_window_is_the_time_in_which_all_decode() -> None:
    """The first sequence began a step earlier and is done a step earlier; what is outside counts for nobody."""
    staggered = run((1.0, 2.0, 3.0, 4.0), (2.0, 3.0, 4.0, 6.0))
    assert decode_window_tokens(staggered) == 4
    assert decode_tok_s(staggered) == 4 / 2.0
    assert decode_to_end_tok_s(staggered) == 5 / 4.0


def test_two_tokens_of_one_message_both_count() -> None:
    assert decode_tok_s(run((1.0, 2.0, 2.0))) == 2.0


@pytest.mark.parametrize("arrivals", [((1.0, 2.0), (3.0, 4.0)), ((1.0, 2.0), (2.0, 3.0)), ((1.0,), (1.0,))])
def test_no_time_in_which_all_decode_is_no_measurement(arrivals: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(BenchError, match="--output-len must be longer"):
        decode_tok_s(run(*arrivals))


@pytest.mark.parametrize(
    ("tokens", "arrivals"), [((), ()), (((1,), ()), ((1.0,), ())), (((1, 2),), ((1.0,),))], ids=["none", "empty", "odd"]
)
def test_a_run_has_a_time_for_every_token(
    tokens: tuple[tuple[int, ...], ...], arrivals: tuple[tuple[float, ...], ...]
) -> None:
    with pytest.raises(BenchError, match="a time for each"):
        Run(tokens, arrivals)
