"""Prompts are real, exactly as long as asked, all different, and the same whenever they are made."""

import pytest

from experiments.engine_bench.failures import BenchError
from experiments.engine_bench.prompts import make_prompts, word_ids


def characters(text: str) -> list[int]:
    return [1, *map(ord, text)]


def test_every_prompt_has_its_length_and_none_comes_twice() -> None:
    prompts = make_prompts(characters, count=200, length=64, seed=0)
    assert {len(prompt) for prompt in prompts} == {64}
    assert len(set(map(tuple, prompts))) == 200
    assert {prompt[0] for prompt in prompts} == {1}, "the tokenizer's first id stays in front"


def test_the_seed_decides() -> None:
    first = make_prompts(characters, count=5, length=16, seed=3)
    assert make_prompts(characters, count=5, length=16, seed=3) == first
    assert make_prompts(characters, count=9, length=16, seed=3)[:5] == first
    assert not set(map(tuple, make_prompts(characters, count=5, length=16, seed=4))) & set(map(tuple, first))


def test_prompts_are_text_from_the_beginning_of_a_line() -> None:
    from experiments.engine_bench.prompts import _text

    text = "\n" + _text()[0]
    for prompt in make_prompts(characters, count=20, length=32, seed=1):
        assert "\n" + "".join(map(chr, prompt[1:])) in text


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(BenchError, match="no 2 distinct prompts of 4 tokens"):
        make_prompts(lambda text: [1, 2, 3, 4], count=2, length=4, seed=0)
    with pytest.raises(BenchError, match="no 1 distinct prompts of 9 tokens"):
        make_prompts(lambda text: [1, 2, 3, 4], count=1, length=9, seed=0)


def test_words_stand_in_for_a_tokenizer() -> None:
    encode = word_ids(1000)
    assert len(encode("the cat, the mat")) == 5
    ids = encode("the cat the mat")
    assert ids[0] == ids[2] != ids[1]
    assert all(0 <= token < 1000 for token in ids)
    assert len(make_prompts(encode, count=32, length=128, seed=0)) == 32
