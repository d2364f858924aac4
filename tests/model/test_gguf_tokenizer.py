"""A GGUF file's vocabulary, rebuilt as tokenizer files, cuts text into the ids of the original tokenizer."""

import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer

from model.text.tokenizer import load_tokenizer
from model.upcycling.gguf_metadata import GgufError, GgufMetadata
from model.upcycling.gguf_tokenizer import PRE_TOKENIZERS, write_tokenizer
from tests.support.gguf_files import vocabulary_keys
from tests.support.tokenizers import mixtral_sentencepiece, write_byte_tokenizer

TEXTS = [
    "Hello world",
    "I'm 12345 years old, isn't it?",
    "def f(x):\n    return x**2\n\n\n  # end\t\ttab",
    "naïve café — Ünïcödé 漢字 😀 ½ ²",
    "<|im_start|>user\nHi<|im_end|>\n",
    "  leading spaces and trailing   ",
    "\r\n\r\nA1b2C3 ٣٤",
    "",
]


def metadata(fields: dict[str, Any]) -> GgufMetadata:
    return GgufMetadata({"llama.context_length": 512} | fields, "tiny.gguf")


@pytest.fixture
def byte_fields(tmp_path: Path) -> dict[str, Any]:
    write_byte_tokenizer(tmp_path / "original", 600)
    return vocabulary_keys(tmp_path / "original")


@pytest.fixture(scope="module")
def mixtral_fields() -> dict[str, Any]:
    original = sentencepiece.SentencePieceProcessor(model_file=str(mixtral_sentencepiece()))
    ids = range(original.vocab_size())

    def kind(token: int) -> int:
        if original.is_unknown(token):
            return 2
        return 3 if original.is_control(token) else 6 if original.is_byte(token) else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [original.id_to_piece(token) for token in ids],
        "tokenizer.ggml.scores": [original.get_score(token) for token in ids],
        "tokenizer.ggml.token_type": [kind(token) for token in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_bpe_gives_the_original_ids(tmp_path: Path, byte_fields: dict[str, Any], text: str) -> None:
    write_tokenizer(metadata(byte_fields), tmp_path)
    original = Tokenizer.from_file(str(tmp_path / "original" / "tokenizer.json"))
    rebuilt = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for special in (True, False):
        ids = rebuilt.encode(text, add_special_tokens=special).ids
        assert ids == original.encode(text, add_special_tokens=special).ids
    assert rebuilt.decode(ids, skip_special_tokens=False) == text


def test_our_own_tokenizer_reads_what_was_written(tmp_path: Path, byte_fields: dict[str, Any]) -> None:
    write_tokenizer(metadata(byte_fields), tmp_path)
    rebuilt, original = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "original")
    assert rebuilt.encode("Some text", add_bos=True) == original.encode("Some text", add_bos=True)
    assert (rebuilt.bos_id, tuple(rebuilt.eos_ids)) == (1, (2,))
    assert rebuilt.is_special(3)
    assert not rebuilt.is_special(70)


def test_the_configuration_files(tmp_path: Path, byte_fields: dict[str, Any]) -> None:
    ends = {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.padding_token_id": 0}
    write_tokenizer(metadata(byte_fields | ends), tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    original = json.loads((tmp_path / "original" / "tokenizer_config.json").read_text())
    for name in ("bos_token", "eos_token", "unk_token", "chat_template"):
        assert config[name] == original[name]
    assert config["pad_token"] == "<unk>"
    assert config["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert config["add_bos_token"] is True
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": [2, 4], "pad_token_id": 0}


def test_no_bos_where_the_file_says_so(tmp_path: Path, byte_fields: dict[str, Any]) -> None:
    write_tokenizer(metadata(byte_fields | {"tokenizer.ggml.add_bos_token": False}), tmp_path)
    rebuilt = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert rebuilt.encode("abc").ids == rebuilt.encode("abc", add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("gpt-2", "it's 123 ok", ["it", "'s", "Ġ123", "Ġok"]),
        ("smollm", "it's 123 ok", ["it", "'s", "Ġ", "1", "2", "3", "Ġok"]),
        ("llama-bpe", "it's 12345\n\nok", ["it", "'s", "Ġ", "123", "45", "ĊĊ", "ok"]),
        ("tekken", "camelCase 12\nok", ["camel", "Case", "Ġ", "1", "2", "Ċ", "ok"]),
    ],
)
def test_pre_tokenizers_cut_as_their_families_do(name: str, text: str, pieces: list[str]) -> None:
    cut = PRE_TOKENIZERS[name].build().pre_tokenize_str(text)
    assert [piece for piece, _ in cut] == pieces


def test_llama3_takes_whole_tokens_without_merging(tmp_path: Path, byte_fields: dict[str, Any]) -> None:
    tokens = [*byte_fields["tokenizer.ggml.tokens"], "xyz"]
    types = [*byte_fields["tokenizer.ggml.token_type"], 1]
    extra = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    for pre, whole in (("llama-bpe", True), ("gpt-2", False)):
        write_tokenizer(metadata(byte_fields | extra | {"tokenizer.ggml.pre": pre}), tmp_path)
        ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode("xyz", add_special_tokens=False).ids
        assert (ids == [len(tokens) - 1]) is whole


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_gives_mixtrals_own_ids(tmp_path: Path, mixtral_fields: dict[str, Any], text: str) -> None:
    write_tokenizer(metadata(mixtral_fields), tmp_path)
    original = sentencepiece.SentencePieceProcessor(model_file=str(mixtral_sentencepiece()))
    rebuilt = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    assert rebuilt.encode(text) == original.encode(text)
    assert rebuilt.decode(rebuilt.encode(text)) == original.decode(original.encode(text))
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id()) == (1, 2, 0)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["bos_token"] == "<s>"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'"),
        ({"tokenizer.ggml.pre": "falcon"}, "tokenizer.ggml.pre is 'falcon'; supported: gpt-2, smollm"),
        ({"tokenizer.ggml.merges": ["q qqq"]}, "tokenizer.ggml.merges holds 'q qqq', which makes no token"),
        ({"tokenizer.ggml.token_type": [1]}, "tokenizer.ggml.token_type has 1 items"),
        ({"tokenizer.ggml.bos_token_id": 9999}, "tokenizer.ggml.bos_token_id is 9999, outside"),
        ({"tokenizer.ggml.model": None}, "tokenizer.ggml.model is missing"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(
    tmp_path: Path, byte_fields: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(GgufError, match=message):
        write_tokenizer(metadata(byte_fields | fields), tmp_path)


def test_a_token_that_occurs_twice_is_refused(tmp_path: Path, byte_fields: dict[str, Any]) -> None:
    tokens = list(byte_fields["tokenizer.ggml.tokens"])
    tokens[10] = tokens[11]
    with pytest.raises(GgufError, match="twice"):
        write_tokenizer(metadata(byte_fields | {"tokenizer.ggml.tokens": tokens}), tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "tokenizer.ggml.scores has 1 items, not 3"),
        ({"tokenizer.ggml.token_type": [1, 3, 3]}, "marks no token as the unknown one"),
    ],
)
def test_a_broken_sentencepiece_vocabulary_is_refused(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    tiny = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0],
        "tokenizer.ggml.token_type": [2, 3, 3],
    }
    with pytest.raises(GgufError, match=message):
        write_tokenizer(metadata(tiny | fields), tmp_path)
