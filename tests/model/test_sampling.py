"""Sampling: the right distribution, the same token whatever else is in the batch, errors that stay in their row."""

import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model.sampling.filters import candidates, draw, largest
from model.sampling.logprobs import position_logprobs
from model.sampling.sampler import (
    LogitsError,
    Sampled,
    SampleError,
    SamplerState,
    SamplingParams,
    SamplingParamsError,
    prompt_logprobs,
    sample,
    uniform,
)

VOCAB = 2000

MIXED: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_p": 0.8, "temperature": 1.3},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.95, "min_p": 0.01, "temperature": 0.6},
    {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.9, "repetition_penalty": 0.8, "presence_penalty": -1.0},
]


def logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def states(rows: int) -> list[SamplerState]:
    return [
        SamplerState(SamplingParams(seed=row, **MIXED[row % len(MIXED)]), range(row, row + 9), [row] * (row % 4))
        for row in range(rows)
    ]


def one(row_V: Tensor, *, forbidden: tuple[int, ...] = (), **params: Any) -> Sampled | SampleError:
    (result,) = sample(row_V[None], [SamplerState(SamplingParams(**params), ())], [None], [forbidden])
    return result


def token_of(result: Sampled | SampleError) -> int:
    assert isinstance(result, Sampled)
    return result.token


class TestParams:
    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("temperature", -0.1),
            ("temperature", math.nan),
            ("temperature", math.inf),
            ("temperature", "1"),
            ("temperature", True),
            ("top_p", 0.0),
            ("top_p", 1.0001),
            ("top_k", -2),
            ("top_k", 1.5),
            ("min_p", -0.01),
            ("min_p", 1.01),
            ("seed", 2**64),
            ("seed", -(2**63) - 1),
            ("seed", 1.0),
            ("repetition_penalty", 0.0),
            ("presence_penalty", 2.1),
            ("frequency_penalty", -2.1),
            ("frequency_penalty", None),
        ],
    )
    def test_bad_values_name_their_field(self, field: str, value: Any) -> None:
        with pytest.raises(SamplingParamsError, match=f"^{field}: must be") as caught:
            SamplingParams(**{field: value})
        assert caught.value.field == field

    @pytest.mark.parametrize(
        "values",
        [
            {},
            {"temperature": 0, "top_p": 1, "top_k": -1, "min_p": 0, "seed": -1},
            {"temperature": 100.0, "top_p": 1e-9, "top_k": 10**9, "min_p": 1.0, "seed": 2**64 - 1},
            {"presence_penalty": -2, "frequency_penalty": 2.0, "repetition_penalty": 1e-3},
        ],
    )
    def test_limits_themselves_are_allowed(self, values: dict[str, Any]) -> None:
        params = SamplingParams(**values)
        assert isinstance(sample(logits(1), [SamplerState(params, ())], [None])[0], Sampled)

    def test_the_default_is_to_draw_from_all(self) -> None:
        assert not SamplingParams().is_greedy
        assert not SamplingParams().has_penalties
        assert SamplingParams(temperature=0).is_greedy


class TestRandomness:
    def test_the_same_numbers_everywhere(self) -> None:
        """Literal values: a change of these breaks every recorded seed."""
        assert [uniform(0, 0), uniform(0, 1), uniform(1, 0), uniform(-1, 7)] == EXPECTED_UNIFORMS
        assert uniform(-1, 7) == uniform(2**64 - 1, 7)

    def test_uniform_in_the_unit_interval(self) -> None:
        numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
        counts = Counter(int(number * 20) for number in numbers)
        assert min(numbers) >= 0
        assert max(numbers) < 1
        assert chi_square([counts[i] for i in range(20)], [1 / 20] * 20) < limit(19)

    def test_neighbouring_seeds_and_indices_are_independent(self) -> None:
        for other in ((1, 0), (0, 1)):
            pairs = Counter(
                (int(uniform(s, i) * 5), int(uniform(s + other[0], i + other[1]) * 5))
                for s in range(0, 200, 2)
                for i in range(0, 200, 2)
            )
            counts = [pairs[a, b] for a in range(5) for b in range(5)]
            assert chi_square(counts, [1 / 25] * 25) < limit(24)

    def test_a_drawn_seed_differs_and_is_kept(self) -> None:
        drawn = [SamplerState(SamplingParams(), ()).seed for _ in range(10)]
        assert len(set(drawn)) == 10
        row = logits(1)
        first = SamplerState(SamplingParams(), ())
        again = SamplerState(SamplingParams(seed=first.seed), ())
        assert sample(row, [first], [None]) == sample(row, [again], [None])

    def test_a_sequence_resumed_elsewhere_goes_on_alike(self) -> None:
        params = SamplingParams(seed=5, temperature=1.2, frequency_penalty=0.3, repetition_penalty=1.1)
        state, tokens = SamplerState(params, [1, 2, 3]), []
        for step in range(12):
            resumed = SamplerState(params, [1, 2, 3], tokens)
            row = logits(1, seed=step)
            results = [sample(row, [each], [3])[0] for each in (state, resumed)]
            assert results[0] == results[1]
            tokens.append(token_of(results[0]))
            state.observe(tokens[-1])
        assert len(set(tokens)) > 3

    def test_a_copy_that_has_seen_one_more_token_leaves_the_first_alone(self) -> None:
        params = SamplingParams(seed=3, repetition_penalty=1.3, frequency_penalty=0.7)
        state, ahead, expected = (SamplerState(params, [1, 2], output) for output in ([5], [5], [5, 6]))
        copied = ahead.after(6)
        for one_state, other in ((copied, expected), (ahead, state)):
            row = logits(1)[0]
            same_row = row.clone()
            one_state.adjust(row)
            other.adjust(same_row)
            assert torch.equal(row, same_row)
            assert (one_state.num_output, one_state.seed) == (other.num_output, other.seed)

    def test_each_output_token_gets_its_own_number(self) -> None:
        state = SamplerState(SamplingParams(seed=3), ())
        row, seen = torch.zeros(1, 1000), set()
        for _ in range(20):
            seen.add(token_of(sample(row, [state], [None])[0]))
            state.observe(0)
        assert len(seen) > 15


class TestDistribution:
    @pytest.mark.parametrize(
        "params",
        [
            {},
            {"temperature": 0.5},
            {"temperature": 2.0},
            {"top_k": 4},
            {"top_p": 0.8},
            {"min_p": 0.1},
            {"top_k": 8, "top_p": 0.9, "temperature": 1.5, "min_p": 0.02},
        ],
    )
    def test_many_seeds_give_the_distribution(self, params: dict[str, Any]) -> None:
        row = torch.tensor([2.0, -1.0, 0.5, 0.4, 1.5, -3.0, 0.0, 1.0, -0.5, -8.0])
        expected = torch.softmax(reference(row, params), -1).tolist()
        counts: Counter[int] = Counter()
        num = 3000
        for start in range(0, num, 500):
            batch = [SamplerState(SamplingParams(seed=seed, **params), ()) for seed in range(start, start + 500)]
            counts.update(token_of(result) for result in sample(row.expand(500, -1), batch, [None] * 500))
        assert {token for token, share in enumerate(expected) if share == 0}.isdisjoint(counts)
        kept = [token for token, share in enumerate(expected) if share * num >= 5]
        rest = 1 - sum(expected[token] for token in kept)
        shares = [*(expected[token] for token in kept), rest]
        observed = [*(counts[token] for token in kept), num - sum(counts[token] for token in kept)]
        if rest * num < 5:
            shares, observed = shares[:-1], observed[:-1]
        assert chi_square(observed, shares) < limit(len(shares) - 1)

    @settings(deadline=None, max_examples=100)
    @given(
        seed=st.integers(0, 2**31),
        temperature=st.floats(0.05, 5),
        top_k=st.sampled_from([0, 1, 3, 50, 700, VOCAB, 5000]),
        top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05]),
        min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    )
    def test_support_and_probabilities_are_those_of_transformers(
        self, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
    ) -> None:
        params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        row = logits(1, seed=seed)[0]
        expected = torch.softmax(reference(row, params).double(), -1)
        ours = distribution(row, params)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
        differing = (ours > 1e-9) != (expected > 1e-9)
        assert int(differing.sum()) <= 1  # the one whose cumulative probability is top_p to the last bit

    @pytest.mark.parametrize("params", [{"top_k": 3}, {"top_k": 3, "top_p": 0.99}, {"min_p": 1.0}])
    def test_equal_logits_are_kept_together(self, params: dict[str, Any]) -> None:
        row = torch.tensor([1.0, 5.0, 5.0, 5.0, 5.0, 0.0])
        assert distribution(row, params).tolist() == pytest.approx([0, 0.25, 0.25, 0.25, 0.25, 0])

    def test_a_flat_nucleus_takes_low_ids_first(self) -> None:
        """Past the first guess, where values are sorted without their ids."""
        kept = distribution(torch.zeros(VOCAB), {"top_p": 999.5 / VOCAB})
        assert kept[:1000].tolist() == pytest.approx([1e-3] * 1000)
        assert kept[1000:].sum() == 0

    @pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e30])
    def test_extreme_temperatures(self, temperature: float) -> None:
        row = logits(1)[0]
        ours = distribution(row, {"temperature": temperature})
        assert ours.sum() == pytest.approx(1)
        if temperature < 1:
            params = SamplingParams(temperature=max(temperature, 1e-5), seed=1)
            assert token_of(sample(row[None], [SamplerState(params, ())], [None])[0]) == int(row.argmax())

    def test_impossible_tokens_are_never_drawn(self) -> None:
        row = torch.full((100,), -torch.inf)
        row[40:43] = torch.tensor([0.0, 1.0, 2.0])
        for params in ({}, {"top_p": 0.9999}, {"top_k": 50}, {"min_p": 1e-9}):
            drawn = {token_of(one(row, seed=seed, **params)) for seed in range(50)}
            assert drawn <= {40, 41, 42}

    def test_the_ends_of_the_unit_interval_stay_inside(self) -> None:
        weights, ids = torch.tensor([0.0, 0.5, 0.5, 0.0]), torch.tensor([7, 8, 9, 10])
        assert draw(weights, ids, 0.0) == 8
        assert draw(weights, ids, 1 - 2**-53) == 9
        assert draw(torch.tensor([1.0, 0.0]), torch.tensor([3, 4]), 1 - 2**-53) == 3

    @settings(deadline=None, max_examples=100)
    @given(
        values=st.lists(st.integers(-5, 5), min_size=1, max_size=700),
        num=st.integers(1, 800),
    )
    def test_largest_is_a_stable_sort_cut_off(self, values: list[int], num: int) -> None:
        row = torch.tensor(values, dtype=torch.float32)
        top, ids = largest(row, num)
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        last = values[order[min(num, len(values)) - 1]]
        expected = [i for i in order if values[i] >= last]
        assert ids.tolist() == expected
        assert top.tolist() == [values[i] for i in expected]


class TestPenalties:
    @pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
    def test_repetition_is_that_of_transformers(self, penalty: float) -> None:
        row, prompt, output = logits(1)[0], [1, 5, 5, 9], [9, 9, 17]
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), row[None].clone())
        state = SamplerState(SamplingParams(repetition_penalty=penalty), prompt, output)
        state.adjust(ours := row.clone())
        assert torch.equal(ours, expected[0])

    def test_presence_and_frequency_count_output_only(self) -> None:
        params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
        state = SamplerState(params, [1, 2, 3], [4, 4, 4, 5])
        state.adjust(row := torch.zeros(8))
        assert row.tolist() == [0, 0, 0, 0, -0.5 - 0.75, -0.5 - 0.25, 0, 0]

    def test_all_together_repetition_first(self) -> None:
        params = SamplingParams(repetition_penalty=2, presence_penalty=1, frequency_penalty=0.5)
        state = SamplerState(params, [0], [1, 1])
        state.adjust(row := torch.tensor([4.0, 4.0, -4.0]))
        assert row.tolist() == [2.0, 2.0 - 1 - 1.0, -4.0]

    def test_greedy_obeys_penalties(self) -> None:
        row = torch.tensor([1.0, 1.2, 0.0])
        state = SamplerState(SamplingParams(temperature=0, frequency_penalty=1.0), ())
        tokens = []
        for _ in range(4):
            tokens.append(token_of(sample(row[None], [state], [None])[0]))
            state.observe(tokens[-1])
        assert tokens == [1, 0, 1, 0]
        assert row.tolist() == pytest.approx([1.0, 1.2, 0.0])  # the caller's logits are not touched

    def test_negative_ids_are_refused(self) -> None:
        with pytest.raises(ValueError, match="prompt_ids"):
            SamplerState(SamplingParams(repetition_penalty=2), [-1])
        with pytest.raises(ValueError, match="token"):
            SamplerState(SamplingParams(), ()).observe(-1)


class TestBatch:
    @pytest.mark.parametrize("row", range(len(MIXED)))
    def test_a_row_alone_and_among_31_others(self, row: int) -> None:
        batch = logits(32, 5000)
        together = sample(batch, states(32), [4] * 32)
        for place in (row, row + 8, row + 24):
            assert sample(batch[place : place + 1], [states(32)[place]], [4]) == [together[place]]

    def test_order_and_neighbours_do_not_matter(self) -> None:
        batch, order = logits(16), list(range(16))[::-1]
        straight = sample(batch, states(16), [2] * 16)
        backward = sample(batch[order], [states(16)[row] for row in order], [2] * 16)
        assert backward == straight[::-1]

    def test_what_a_neighbour_asks_for_does_not_matter(self) -> None:
        batch = logits(4)
        plain = sample(batch, states(4), [None] * 4)
        asked = sample(batch, states(4), [None, 20, None, 0], [(), (), {1, 2}, range(100)])
        assert [token_of(plain[0])] == [token_of(asked[0])]
        assert [token_of(plain[1])] == [token_of(asked[1])]

    def test_a_new_process_with_more_threads_draws_the_same(self) -> None:
        script = (
            "import torch; from model.sampling.sampler import *; torch.set_num_threads(2);"
            "row = torch.randn(1, 49152, generator=torch.Generator().manual_seed(0)) * 3;"
            "asked = [{}, {'top_p': 0.9}, {'top_k': 50}, {'top_p': 0.5, 'temperature': 0.5}];"
            "states = [SamplerState(SamplingParams(seed=7, **each), ()) for each in asked];"
            "print([sample(row, [state], [2])[0] for state in states])"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        asked: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 50}, {"top_p": 0.5, "temperature": 0.5}]
        here = [SamplerState(SamplingParams(seed=7, **each), ()) for each in asked]
        assert done.stdout.strip() == str([sample(logits(1, 49152), [state], [2])[0] for state in here])

    def test_half_precision_logits(self) -> None:
        batch = logits(3).bfloat16()
        assert sample(batch, states(3), [1] * 3) == sample(batch.float(), states(3), [1] * 3)

    def test_greedy_takes_the_first_of_equals(self) -> None:
        row = torch.zeros(10)
        row[[3, 7]] = 1.0
        assert token_of(one(row, temperature=0)) == 3
        assert token_of(one(row, temperature=0, forbidden=(9,))) == 3
        assert token_of(one(row, temperature=0, forbidden=(3,))) == 7

    def test_no_rows(self) -> None:
        assert sample(torch.zeros(0, 5), [], []) == []

    def test_arguments_must_agree(self) -> None:
        with pytest.raises(ValueError, match="2 rows of logits, 1 states"):
            sample(logits(2), states(1), [None, None])
        with pytest.raises(ValueError, match="1 forbidden_ids"):
            sample(logits(2), states(2), [None, None], [()])
        with pytest.raises(ValueError, match="1 allowed_ids"):
            sample(logits(2), states(2), [None, None], None, [None])


class TestErrors:
    @pytest.mark.parametrize("params", MIXED)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_bad_logits_are_an_error_of_their_row(self, params: dict[str, Any], bad: float) -> None:
        batch = logits(3)
        clean = sample(batch, states(3), [1] * 3)
        batch[1, 123] = bad
        middle = SamplerState(SamplingParams(seed=1, **params), ())
        results = sample(batch, [states(3)[0], middle, states(3)[2]], [1] * 3)
        assert (results[0], results[2]) == (clean[0], clean[2])
        assert results[1] == SampleError(f"logits are not a distribution: their maximum is {bad}")

    @pytest.mark.parametrize("params", [{"temperature": 0}, {}, {"top_k": 2}])
    def test_nothing_to_choose_from(self, params: dict[str, Any]) -> None:
        assert isinstance(one(torch.full((5,), -torch.inf), **params), SampleError)
        assert isinstance(one(torch.zeros(3), forbidden=(0, 1, 2), **params), SampleError)

    def test_histories_from_another_vocabulary(self) -> None:
        params = SamplingParams(repetition_penalty=1.5)
        results = sample(logits(2, 50), [SamplerState(params, [50]), SamplerState(params, [49])], [None] * 2)
        assert results[0] == SampleError("token 50 is outside the vocabulary of 50")
        assert isinstance(results[1], Sampled)

    def test_forbidden_ids_are_not_chosen_but_still_reported(self) -> None:
        row = torch.tensor([[0.0, 9.0, 1.0]])
        (result,) = sample(row, [SamplerState(SamplingParams(temperature=0), ())], [1], [{1, 77, -1}])
        assert isinstance(result, Sampled)
        assert result.token == 2
        assert result.logprob is not None
        assert (result.logprob.chosen.rank, result.logprob.top[0].token) == (2, 1)
        drawn = {token_of(one(row[0], seed=seed, temperature=5.0, forbidden=(1,))) for seed in range(60)}
        assert drawn == {0, 2}

    @pytest.mark.parametrize("params", MIXED)
    def test_only_allowed_ids_are_chosen_as_if_the_vocabulary_had_no_others(self, params: dict[str, Any]) -> None:
        batch, allowed = logits(1), torch.arange(3, VOCAB, 7)
        for seed in range(20):
            state = SamplerState(SamplingParams(seed=seed, **{**params, "repetition_penalty": 1.0}), ())
            (result,) = sample(batch, [state], [2], [()], [allowed])
            (within,) = sample(batch[:, allowed], [state], [None])
            assert isinstance(result, Sampled)
            assert result.token == int(allowed[token_of(within)])
            assert result.logprob is not None
            assert result.logprob.top == position_logprobs(batch[0], result.token, 2).top, "of all tokens"

    def test_what_is_allowed_may_be_penalised_and_forbidden_too(self) -> None:
        row, greedy = torch.tensor([[0.0, 9.0, 1.0, 5.0]]), SamplingParams(temperature=0, frequency_penalty=2)
        state = SamplerState(greedy, (), [3, 3, 3])
        assert token_of(sample(row, [state], [None], [()], [torch.tensor([0, 2, 3])])[0]) == 2
        assert token_of(sample(row, [state], [None], [{2}], [torch.tensor([0, 2, 3])])[0]) == 0
        (nothing,) = sample(row, [state], [None], [{0, 2}], [torch.tensor([0, 2])])
        assert isinstance(nothing, SampleError)

    def test_a_bad_logit_is_an_error_even_where_it_is_not_allowed(self) -> None:
        row = torch.tensor([[0.0, math.nan, 1.0]])
        (result,) = sample(row, [SamplerState(SamplingParams(temperature=0), ())], [None], [()], [torch.tensor([0, 2])])
        assert isinstance(result, SampleError)


class TestLogprobs:
    @pytest.mark.parametrize("num", [0, 1, 5, VOCAB, VOCAB + 7])
    def test_raw_distribution_rank_and_order(self, num: int) -> None:
        row = logits(1)[0]
        expected = torch.log_softmax(row, -1)
        order = torch.sort(row, descending=True, stable=True).indices.tolist()
        for token in (order[0], order[10], order[-1]):
            got = position_logprobs(row, token, num)
            assert got.chosen.logprob == expected[token].item()
            assert got.chosen.rank == order.index(token) + 1
            assert [entry.token for entry in got.top] == order[:num]
            assert [entry.rank for entry in got.top] == list(range(1, min(num, VOCAB) + 1))
            assert [entry.logprob for entry in got.top] == [expected[token].item() for token in order[:num]]

    def test_sampling_does_not_change_what_is_reported(self) -> None:
        row = logits(1)
        params = SamplingParams(temperature=0.3, top_k=3, repetition_penalty=2.0, seed=1)
        (result,) = sample(row, [SamplerState(params, range(500))], [3])
        assert isinstance(result, Sampled)
        assert result.logprob == position_logprobs(row[0], result.token, 3)

    def test_equal_logits_share_a_rank(self) -> None:
        got = position_logprobs(torch.tensor([1.0, 2.0, 2.0, 0.0]), 2, 4)
        assert got.chosen.rank == 1
        assert [(entry.token, entry.rank) for entry in got.top] == [(1, 1), (2, 1), (0, 3), (3, 4)]

    def test_prompt_positions_one_by_one(self) -> None:
        rows, targets = logits(6), [3, 1, 4, 1, 5, 9]
        got = prompt_logprobs(rows, targets, 2)
        assert got == [position_logprobs(rows[p], targets[p], 2) for p in range(6)]
        assert got[2:] == prompt_logprobs(rows[2:], targets[2:], 2)

    def test_prompt_errors(self) -> None:
        with pytest.raises(ValueError, match="6 rows of logits for 5 target ids"):
            prompt_logprobs(logits(6), [0] * 5, 1)
        with pytest.raises(IndexError, match=str(VOCAB)):
            prompt_logprobs(logits(1), [VOCAB], 1)
        with pytest.raises(LogitsError):
            prompt_logprobs(torch.full((1, 4), torch.nan), [0], 1)


def reference(row_V: Tensor, params: dict[str, Any]) -> Tensor:
    """transformers' warpers in their own order."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(params.get("temperature", 1.0)))])
    if params.get("top_k"):
        warpers.append(TopKLogitsWarper(params["top_k"]))
    if params.get("top_p", 1) < 1:
        warpers.append(TopPLogitsWarper(params["top_p"]))
    if params.get("min_p"):
        warpers.append(MinPLogitsWarper(params["min_p"]))
    scores: Tensor = warpers(torch.zeros(1, 1, dtype=torch.long), row_V[None])[0]
    return scores


def distribution(row_V: Tensor, params: dict[str, Any]) -> Tensor:
    weights, ids = candidates(row_V, SamplingParams(**params))
    assert len(set(ids.tolist())) == len(ids)
    full = torch.zeros(row_V.shape[0], dtype=torch.float64)
    full[ids] = weights.double()
    return full / full.sum()


def chi_square(observed: list[int], shares: list[float]) -> float:
    total = sum(observed)
    return sum((o - total * s) ** 2 / (total * s) for o, s in zip(observed, shares, strict=True))


def limit(freedom: int) -> float:
    """The chi-square value exceeded by chance once in a hundred thousand (Wilson and Hilferty's cube)."""
    return freedom * (1 - 2 / (9 * freedom) + 4.265 * math.sqrt(2 / (9 * freedom))) ** 3


EXPECTED_UNIFORMS = [0.4195633871687582, 0.9846466277377912, 0.8247354339733606, 0.14428692692574374]
