"""Bias, allowed tokens and bad words: what may be chosen, against transformers; and nothing else changes."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    NoBadWordsLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from model.sampling.masks import BadWords, Masked, MaskError, OnlyTokens, TokenMask
from model.sampling.sampler import Sampled, SampleError, SamplerState, SamplingParams, SamplingParamsError, sample

VOCAB = 12
INF = -math.inf

tokens = st.integers(0, VOCAB - 1)
outputs = st.lists(st.integers(0, 3), max_size=8)
words = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=6)


def row(seed: int = 0, vocab: int = VOCAB) -> Tensor:
    return torch.randn(vocab, generator=torch.Generator().manual_seed(seed)) * 3


def masked_by(mask: TokenMask, output: Sequence[int], row_V: Tensor) -> Tensor:
    result = row_V.clone()
    mask.apply(result, output)
    return result


def drawn(row_V: Tensor, *masks: TokenMask, output: Sequence[int] = (), **params: Any) -> Sampled | SampleError:
    state = SamplerState(SamplingParams(**params), (), output)
    (result,) = sample(row_V[None], [state], [1], masked=[Masked(masks, output) if masks else None])
    return result


def token_of(result: Sampled | SampleError) -> int:
    assert isinstance(result, Sampled), result
    return result.token


class TestBadWords:
    @given(words=words, output=outputs)
    def test_forbids_what_transformers_forbids(self, words: list[list[int]], output: list[int]) -> None:
        ours = masked_by(BadWords(words), output, row())
        theirs = NoBadWordsLogitsProcessor(words, eos_token_id=VOCAB + 1)(
            torch.tensor([[9, *output]]), row()[None].clone()
        )
        assert torch.equal(ours, theirs[0])

    def test_a_word_is_forbidden_only_where_it_would_be_complete(self) -> None:
        mask = BadWords([[1, 2, 3], [5]])
        assert masked_by(mask, [], torch.zeros(8)).tolist() == [0, 0, 0, 0, 0, INF, 0, 0]
        assert masked_by(mask, [1, 2], torch.zeros(8)).tolist() == [0, 0, 0, INF, 0, INF, 0, 0]
        assert masked_by(mask, [1, 2, 4], torch.zeros(8)).tolist() == [0, 0, 0, 0, 0, INF, 0, 0]
        assert masked_by(mask, [2], torch.zeros(8)).tolist() == [0, 0, 0, 0, 0, INF, 0, 0]

    def test_an_answer_does_not_depend_on_what_was_asked_before(self) -> None:
        mask = BadWords([[1, 2], [2, 1, 2]])
        asked = [[1], [], [2, 1], [1], [0, 1], [2]]
        first = [masked_by(mask, output, row()) for output in asked]
        again = [masked_by(mask, output, row()) for output in reversed(asked)]
        assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))

    @settings(deadline=None)
    @given(words=words, seed=st.integers(0, 1000))
    def test_no_output_ever_holds_one(self, words: list[list[int]], seed: int) -> None:
        mask = BadWords(words)
        output: list[int] = []
        for step in range(12):
            output.append(token_of(drawn(row(seed + step), mask, output=output, seed=seed, temperature=1.5)))
        said = " ".join(map(str, ["", *output, ""]))
        assert not any(" ".join(map(str, ["", *word, ""])) in said for word in words)

    def test_an_id_past_the_vocabulary_harms_nobody(self) -> None:
        assert torch.equal(masked_by(BadWords([[99]]), [], row()), row())


class TestOnlyTokens:
    @given(allowed=st.sets(tokens, min_size=1))
    def test_keeps_what_transformers_keeps(self, allowed: set[int]) -> None:
        theirs = PrefixConstrainedLogitsProcessor(lambda *_: sorted(allowed), num_beams=1)(
            torch.tensor([[1]]), row()[None].clone()
        )
        assert torch.equal(masked_by(OnlyTokens(allowed), [], row()), theirs[0])

    @given(allowed=st.sets(tokens, min_size=1), seed=st.integers(0, 100))
    def test_only_these_are_drawn(self, allowed: set[int], seed: int) -> None:
        assert token_of(drawn(row(), OnlyTokens(allowed), seed=seed, temperature=3.0)) in allowed
        assert token_of(drawn(row(), OnlyTokens(allowed), temperature=0)) == max(allowed, key=lambda t: float(row()[t]))

    def test_ids_past_the_vocabulary_cannot_be_chosen(self) -> None:
        assert token_of(drawn(row(), OnlyTokens([3, VOCAB, 99]), temperature=0)) == 3
        assert isinstance(drawn(row(), OnlyTokens([VOCAB]), temperature=0), SampleError)

    @pytest.mark.parametrize("ids", [[], [-1], [3, -2]])
    def test_none_and_negative_ids_are_refused(self, ids: list[int]) -> None:
        with pytest.raises(ValueError, match="token_ids"):
            OnlyTokens(ids)


class TestBias:
    @given(bias=st.dictionaries(tokens, st.floats(-100, 100, width=32), min_size=1))
    def test_is_transformers_sequence_bias_of_single_tokens(self, bias: dict[int, float]) -> None:
        state = SamplerState(SamplingParams(logit_bias=tuple(bias.items())), ())
        state.adjust(ours := row())
        processor = SequenceBiasLogitsProcessor({(token,): float(value) for token, value in bias.items()})
        assert torch.equal(ours, processor(torch.tensor([[1]]), row()[None].clone())[0])

    def test_comes_before_penalties(self) -> None:
        params = SamplingParams(logit_bias=((3, 2.0),), repetition_penalty=1.5)
        state = SamplerState(params, [3, 4])
        state.adjust(ours := row())
        biased = row()
        biased[3] += 2.0
        expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([[3, 4]]), biased[None])[0]
        assert torch.equal(ours, expected)

    def test_a_hundred_decides_and_minus_a_hundred_excludes(self) -> None:
        for seed in range(30):
            assert token_of(drawn(row(), logit_bias=((7, 100.0),), seed=seed)) == 7
            assert token_of(drawn(row(), logit_bias=((7, -100.0),), seed=seed, temperature=2.0)) != 7
        assert token_of(drawn(row(), logit_bias=((7, 100.0),), temperature=0)) == 7

    def test_logprobs_are_the_models_own(self) -> None:
        plain, biased = drawn(row(), temperature=0), drawn(row(), logit_bias=((7, 100.0),), temperature=0)
        assert isinstance(plain, Sampled)
        assert isinstance(biased, Sampled)
        assert plain.logprob is not None
        assert biased.logprob is not None
        assert biased.logprob.top == plain.logprob.top
        assert biased.logprob.chosen.logprob < -1

    @pytest.mark.parametrize(
        "bias", [((1, 100.5),), ((1, -101.0),), ((1, math.nan),), ((-1, 0.0),), ((1, 1.0), (1, 2.0)), ((True, 1.0),)]
    )
    def test_a_wrong_one_is_refused_by_name(self, bias: tuple[tuple[int, float], ...]) -> None:
        with pytest.raises(SamplingParamsError, match="logit_bias") as caught:
            SamplingParams(logit_bias=bias)
        assert caught.value.field == "logit_bias"

    def test_one_past_the_vocabulary_is_an_error_of_its_row(self) -> None:
        error = drawn(row(), logit_bias=((VOCAB, 1.0),))
        assert isinstance(error, SampleError)
        assert "logit_bias: token 12" in error.reason


class Refusing:
    def apply(self, row_V: Tensor, output_ids: Sequence[int]) -> None:
        raise MaskError("the grammar has ended")


class TestSample:
    def test_all_masks_and_forbidden_ids_hold_together(self) -> None:
        masks = Masked((OnlyTokens([1, 2, 3, 4]), BadWords([[0, 2]])), [0])
        state = SamplerState(SamplingParams(temperature=0.0), ())
        (result,) = sample(torch.arange(8.0)[None], [state], [None], [(4, 3)], masked=[masks])
        assert token_of(result) == 1

    @pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0}], ids=str)
    def test_what_leaves_no_token_is_the_requests_own_fault(self, params: dict[str, float]) -> None:
        contradiction = drawn(row(), OnlyTokens([1]), BadWords([[1]]), **params)
        assert isinstance(contradiction, SampleError)
        assert contradiction.by_request
        assert "no token may come next" in contradiction.reason
        refused = drawn(row(), Refusing(), **params)
        assert refused == SampleError("the grammar has ended", by_request=True)

    def test_a_broken_row_is_not_blamed_on_the_mask(self) -> None:
        broken = drawn(torch.full((VOCAB,), math.nan), OnlyTokens([1]), temperature=0)
        assert isinstance(broken, SampleError)
        assert not broken.by_request

    def test_a_masked_row_is_the_same_alone_and_among_others(self) -> None:
        rows = torch.stack([row(seed) for seed in range(6)])
        states = [SamplerState(SamplingParams(seed=n, logit_bias=((n, 2.0),)), ()) for n in range(6)]
        masked = [None if n % 3 == 0 else Masked((OnlyTokens(range(n, 12)), BadWords([[n, 7]])), [n]) for n in range(6)]
        together = sample(rows, states, [1] * 6, masked=masked)
        alone = [sample(rows[n : n + 1], [states[n]], [1], masked=[masked[n]])[0] for n in range(6)]
        assert together == alone

    def test_the_logits_given_are_not_changed(self) -> None:
        logits = row()[None].clone()
        sample(logits, [SamplerState(SamplingParams(logit_bias=((1, 5.0),)), ())], [None], masked=[
            Masked((OnlyTokens([1, 2]),), ()),
        ])  # fmt: skip
        assert torch.equal(logits[0], row())

    def test_as_many_masks_as_rows(self) -> None:
        with pytest.raises(ValueError, match="2 masked"):
            sample(row()[None], [SamplerState(SamplingParams(), ())], [None], masked=[None, None])
