"""Ids and texts of both kinds of tokenizer, against the libraries that define them."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer as MistralSentencePiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

from model.text.tokenizer import HFTokenizer, SentencePieceTokenizer, Tokenizer, TokenizerError, load_tokenizer
from tests.support.texts import HARD_TEXTS
from tests.support.tokenizers import mixtral_sentencepiece, write_byte_tokenizer

RANDOM_IDS = st.lists(st.one_of(st.integers(0, 300), st.integers(0, 31999)), max_size=24)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A checkpoint directory with nothing but Mixtral's tokenizer.model."""
    dest = tmp_path_factory.mktemp("mixtral")
    shutil.copy(mixtral_sentencepiece(), dest / "tokenizer.model")
    return load_tokenizer(dest)


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dest = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(dest, 400)
    return dest


@pytest.fixture(scope="module")
def trained_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE trained on real text, without special tokens of its own."""
    dest = tmp_path_factory.mktemp("trained")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text(encoding="utf-8"), *HARD_TEXTS], trainer)
    backend.enable_truncation(max_length=4)
    backend.save(str(dest / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (dest / "tokenizer_config.json").write_text(json.dumps(config))
    return dest


@pytest.fixture(scope="module")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mixtral's vocabulary as a tokenizer.json with byte fallback, as transformers writes it."""
    source, dest = tmp_path_factory.mktemp("llama_source"), tmp_path_factory.mktemp("llama")
    shutil.copy(mixtral_sentencepiece(), source / "tokenizer.model")
    LlamaTokenizer.from_pretrained(source, add_bos_token=True).save_pretrained(dest)
    return dest


class TestSentencePiece:
    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_ids_are_those_of_mistral_common(self, mixtral: Tokenizer, text: str) -> None:
        reference = MistralSentencePiece(mixtral_sentencepiece())
        assert mixtral.encode(text, add_bos=False) == reference.encode(text, bos=False, eos=False)
        assert mixtral.encode(text, add_bos=True) == reference.encode(text, bos=True, eos=False)

    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_text_survives_the_way_there_and_back(self, mixtral: Tokenizer, text: str) -> None:
        reference = _reference_model()
        ids = mixtral.encode(text, add_bos=True)
        assert mixtral.decode(ids) == reference.decode(ids)
        if "\u2581" not in text:  # sentencepiece's own letter for a space
            assert mixtral.decode(ids) == text

    @settings(deadline=None, max_examples=200)
    @given(ids=RANDOM_IDS)
    def test_any_ids_decode_as_sentencepiece_decodes_them(self, mixtral: Tokenizer, ids: list[int]) -> None:
        assert mixtral.decode(ids) == _reference_model().decode(ids)

    def test_special_tokens_come_from_the_model_file(self, mixtral: Tokenizer) -> None:
        assert isinstance(mixtral, SentencePieceTokenizer)
        assert (mixtral.vocab_size, mixtral.bos_id, mixtral.eos_ids) == (32000, 1, (2,))
        assert mixtral.special_tokens_map == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        assert [mixtral.is_special(i) for i in (0, 1, 2, 3, 259)] == [False, True, True, False, False]

    def test_special_tokens_show_only_when_asked(self, mixtral: Tokenizer) -> None:
        ids = [*mixtral.encode("Hi", add_bos=True), 2]
        assert mixtral.decode(ids) == "Hi"
        assert mixtral.decode(ids, skip_special=False) == "<s> Hi</s>"

    def test_pieces_as_text_and_bytes(self, mixtral: Tokenizer) -> None:
        (hello,) = mixtral.encode("Hello", add_bos=False)
        assert mixtral.token_text(hello) == " Hello"
        assert mixtral.token_bytes(3 + 0xE4) == b"\xe4"
        assert mixtral.token_text(3 + 0xE4) == "\ufffd"

    def test_ids_past_the_vocabulary_are_nothing(self, mixtral: Tokenizer) -> None:
        assert mixtral.decode([22557, 32000, 10**9]) == "Hello"
        assert not mixtral.is_special(32000)
        with pytest.raises(ValueError, match="-1"):
            mixtral.token_text(-1)

    def test_every_entry_is_written_as_in_the_model_file(self, mixtral: Tokenizer) -> None:
        model = sentencepiece.SentencePieceProcessor(model_file=str(mixtral_sentencepiece()))
        written = [mixtral.vocabulary_entry(token) for token in range(mixtral.vocab_size)]
        assert written == [model.id_to_piece(token) for token in range(model.vocab_size())]
        assert mixtral.vocabulary_entry(mixtral.vocab_size) == ""

    def test_template_strings_become_special_ids_and_plain_ones_do_not(self, mixtral: Tokenizer) -> None:
        model = _reference_model()
        ids = mixtral.encode_template([("<s>[INST] a ", False), ("</s>", True), (" [/INST]b</s>x", False)])
        assert ids[0] == 1
        assert ids.count(2) == 1
        assert ids[-len(model.encode("x")) - 1] == 2
        assert ids[1 : -len(model.encode("x")) - 1] == [
            *model.encode("[INST] a "),
            *model.encode("\n</s>")[2:],
            *model.encode("\n [/INST]b")[2:],
        ]

    def test_legacy_false_takes_the_dummy_space_after_special_tokens_away(self, tmp_path: Path) -> None:
        shutil.copy(mixtral_sentencepiece(), tmp_path / "tokenizer.model")
        (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
        tokenizer, reference = load_tokenizer(tmp_path), LlamaTokenizer.from_pretrained(tmp_path)
        text = "<s>[INST] hi [/INST]yo</s>[INST] b [/INST]"
        assert tokenizer.encode_template([(text, False)]) == reference.encode(text, add_special_tokens=False)

    def test_tokens_added_beside_the_model_file(self, tmp_path: Path) -> None:
        shutil.copy(mixtral_sentencepiece(), tmp_path / "tokenizer.model")
        added = {"32000": {"content": "<|im_end|>", "special": True}, "1": {"content": "<s>", "special": True}}
        config = {"added_tokens_decoder": added, "eos_token": {"content": "<|im_end|>"}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        (tmp_path / "added_tokens.json").write_text('{"<tool>": 32001}')
        tokenizer = load_tokenizer(tmp_path)
        assert (tokenizer.vocab_size, tokenizer.eos_ids) == (32002, (32000,))
        assert tokenizer.encode_template([("<tool><|im_end|>", False)]) == [32001, 32000]
        assert tokenizer.decode([22557, 32001, 32000]) == "Hello<tool>"
        assert tokenizer.added_tokens["<tool>"] is False

    def test_an_added_token_on_a_taken_id_is_refused(self, tmp_path: Path) -> None:
        shutil.copy(mixtral_sentencepiece(), tmp_path / "tokenizer.model")
        (tmp_path / "added_tokens.json").write_text('{"<tool>": 17}')
        with pytest.raises(TokenizerError, match=r"'<tool>'.*17"):
            load_tokenizer(tmp_path)


class TestHuggingFace:
    @pytest.mark.parametrize("fixture", ["byte_dir", "trained_dir", "llama_dir"])
    @pytest.mark.parametrize("text", HARD_TEXTS)
    def test_ids_and_text_are_those_of_transformers(
        self, request: pytest.FixtureRequest, fixture: str, text: str
    ) -> None:
        ours, theirs = _both(request.getfixturevalue(fixture))
        for add in (False, True):
            ids = ours.encode(text, add_bos=add)
            assert ids == theirs.encode(text, add_special_tokens=add)
            for skip in (False, True):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)

    @settings(deadline=None, max_examples=200)
    @given(ids=st.lists(st.integers(0, 399), max_size=24), skip=st.booleans())
    def test_any_bytes_decode_as_in_transformers(self, byte_dir: Path, ids: list[int], skip: bool) -> None:
        ours, theirs = _both(byte_dir)
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)

    @settings(deadline=None, max_examples=200)
    @given(ids=RANDOM_IDS, skip=st.booleans())
    def test_byte_fallback_decodes_as_in_transformers(self, llama_dir: Path, ids: list[int], skip: bool) -> None:
        """But in a run of bytes that is not UTF-8: that library then throws the whole run away, also its good part."""
        ours, theirs = _both(llama_dir)
        text, reference = ours.decode(ids, skip), theirs.decode(ids, skip_special_tokens=skip)
        if "\ufffd" in text:
            assert reference.count("\ufffd") >= text.count("\ufffd")
        else:
            assert text == reference

    @pytest.mark.parametrize("fixture", ["byte_dir", "trained_dir", "llama_dir"])
    def test_every_entry_is_written_as_transformers_writes_it(
        self, request: pytest.FixtureRequest, fixture: str
    ) -> None:
        ours, theirs = _both(request.getfixturevalue(fixture))
        ids = list(range(ours.vocab_size))
        assert [ours.vocabulary_entry(token) for token in ids] == theirs.convert_ids_to_tokens(ids)
        assert ours.vocabulary_entry(ours.vocab_size) == ours.vocabulary_entry(-1) == ""

    def test_good_characters_beside_broken_bytes_are_kept(self, llama_dir: Path) -> None:
        tokenizer = load_tokenizer(llama_dir)
        ids = [3 + byte for byte in "é".encode()] + [3 + 0xFF]
        assert tokenizer.decode(ids) == "é\ufffd"

    def test_special_tokens(self, byte_dir: Path) -> None:
        tokenizer = load_tokenizer(byte_dir)
        assert isinstance(tokenizer, HFTokenizer)
        assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (400, 1, (2,))
        assert [tokenizer.is_special(i) for i in (0, 1, 2, 3, 4, 5)] == [True] * 5 + [False]
        assert tokenizer.special_tokens_map == AutoTokenizer.from_pretrained(byte_dir).special_tokens_map

    def test_a_prompt_is_never_truncated(self, trained_dir: Path) -> None:
        assert '"max_length":4' in (trained_dir / "tokenizer.json").read_text().replace(" ", "")
        assert len(load_tokenizer(trained_dir).encode("one two three four five six seven", add_bos=True)) > 6

    def test_no_bos_where_the_post_processor_has_none(self, trained_dir: Path) -> None:
        tokenizer = load_tokenizer(trained_dir)
        assert tokenizer.bos_id is None
        assert tokenizer.encode("hi", add_bos=True) == tokenizer.encode("hi", add_bos=False)

    def test_plain_segments_hold_no_special_tokens(self, byte_dir: Path) -> None:
        tokenizer = load_tokenizer(byte_dir)
        ids = tokenizer.encode_template([("<|im_start|>a", False), ("<|im_end|>", True), ("b", False)])
        assert ids[0] == 3
        assert 4 not in ids
        assert tokenizer.decode(ids, skip_special=False) == "<|im_start|>a<|im_end|>b"

    def test_tokens_that_only_the_config_marks(self, trained_dir: Path, tmp_path: Path) -> None:
        shutil.copytree(trained_dir, tmp_path, dirs_exist_ok=True)
        size = load_tokenizer(trained_dir).vocab_size
        added = {str(size): {"content": "<|new|>", "special": True}}
        config = {"eos_token": "<|new|>", "added_tokens_decoder": added, "unk_token": "a"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        tokenizer = load_tokenizer(tmp_path)
        assert tokenizer.eos_ids == (size,)
        assert tokenizer.encode("x<|new|>", add_bos=False)[-1] == size
        assert tokenizer.is_special(tokenizer.encode("a", add_bos=False)[0])
        config["added_tokens_decoder"] = {str(size + 5): {"content": "<|new|>", "special": True}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        with pytest.raises(TokenizerError, match=r"<\|new\|>"):
            load_tokenizer(tmp_path)

    def test_an_unknown_decoder_is_refused(self, tmp_path: Path) -> None:
        backend = Backend(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(TokenizerError, match="decoder is missing"):
            load_tokenizer(tmp_path)
        backend.decoder = decoders.WordPiece()
        backend.save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(TokenizerError, match="WordPiece is not supported"):
            load_tokenizer(tmp_path)


class TestFiles:
    def test_tokenizer_json_comes_first(self, tmp_path: Path) -> None:
        shutil.copy(mixtral_sentencepiece(), tmp_path / "tokenizer.model")
        assert isinstance(load_tokenizer(tmp_path), SentencePieceTokenizer)
        write_byte_tokenizer(tmp_path)
        assert isinstance(load_tokenizer(tmp_path), HFTokenizer)

    def test_sentencepiece_under_the_name_that_mistral_gives_it(self, tmp_path: Path, mixtral: Tokenizer) -> None:
        shutil.copy(mixtral_sentencepiece(), tmp_path / "tokenizer.model.v1")
        assert load_tokenizer(tmp_path).encode("Hello", add_bos=True) == mixtral.encode("Hello", add_bos=True)

    def test_neither_file(self, tmp_path: Path) -> None:
        with pytest.raises(TokenizerError, match=r"neither tokenizer\.json nor tokenizer\.model"):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "tokenizer_config.json"])
    @pytest.mark.parametrize("content", [b"", b"\xff\x00 nonsense", b"[1]", b"{" * 100_000])
    def test_damaged_files_are_refused_by_name(self, tmp_path: Path, name: str, content: bytes) -> None:
        if name == "tokenizer_config.json":
            write_byte_tokenizer(tmp_path)
        (tmp_path / name).write_bytes(content)
        with pytest.raises(TokenizerError, match=name.replace(".", r"\.")):
            load_tokenizer(tmp_path)

    @pytest.mark.parametrize(
        ("name", "eos", "expected"),
        [
            ("generation_config.json", [7, 2, 9], (2, 7, 9)),
            ("generation_config.json", 5, (2, 5)),
            ("config.json", 6, (2, 6)),
            ("config.json", None, (2,)),
        ],
    )
    def test_eos_ids_of_the_model_join_the_tokenizers_own(
        self, tmp_path: Path, name: str, eos: object, expected: tuple[int, ...]
    ) -> None:
        write_byte_tokenizer(tmp_path)
        (tmp_path / name).write_text(json.dumps({"eos_token_id": eos}))
        assert load_tokenizer(tmp_path).eos_ids == expected

    @pytest.mark.parametrize(
        ("name", "content", "field"),
        [
            ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id"),
            ("generation_config.json", {"eos_token_id": [True]}, "eos_token_id"),
            ("tokenizer_config.json", {"eos_token": 3}, "eos_token"),
            ("tokenizer_config.json", {"additional_special_tokens": "x"}, "additional_special_tokens"),
            ("tokenizer_config.json", {"added_tokens_decoder": {"x": "y"}}, "added_tokens_decoder"),
        ],
    )
    def test_bad_fields_are_named(self, tmp_path: Path, name: str, content: dict[str, object], field: str) -> None:
        write_byte_tokenizer(tmp_path)
        (tmp_path / name).write_text(json.dumps(content))
        with pytest.raises(TokenizerError, match=field):
            load_tokenizer(tmp_path)


@cache
def _both(path: Path) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    return load_tokenizer(path), AutoTokenizer.from_pretrained(path)


@cache
def _reference_model() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(mixtral_sentencepiece()))
