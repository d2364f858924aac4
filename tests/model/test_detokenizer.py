"""Streaming text: the same text as decoding at once, never half a character, constant work."""

import json
import shutil
from itertools import groupby
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from model.text.detokenizer import IncrementalDetokenizer
from model.text.pieces import DecodeRule, Piece, PieceDecoder, decode_utf8
from model.text.tokenizer import Tokenizer, load_tokenizer
from tests.support.texts import HARD_TEXTS
from tests.support.tokenizers import mixtral_sentencepiece, write_byte_tokenizer

KINDS = ("sentencepiece", "byte-level")


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    spm, byte = tmp_path_factory.mktemp("spm"), tmp_path_factory.mktemp("byte")
    shutil.copy(mixtral_sentencepiece(), spm / "tokenizer.model")
    write_byte_tokenizer(byte, 300)
    return {"sentencepiece": load_tokenizer(spm), "byte-level": load_tokenizer(byte)}


def stream(tokenizer: Tokenizer, ids: list[int], prompt: list[int] | None = None) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, prompt or ())
    return [*(detokenizer.push([token_id]) for token_id in ids), detokenizer.flush()]


@pytest.mark.parametrize("kind", KINDS)
class TestBothKinds:
    @settings(deadline=None, max_examples=200)
    @given(data=st.data())
    def test_pushes_and_flush_are_the_decoded_whole(
        self, tokenizers: dict[str, Tokenizer], kind: str, data: st.DataObject
    ) -> None:
        tokenizer = tokenizers[kind]
        any_id = st.one_of(st.integers(0, 270), st.integers(0, tokenizer.vocab_size + 5))
        ids = data.draw(st.lists(any_id, max_size=40))
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
        cut = data.draw(st.integers(0, len(ids)))
        detokenizer = IncrementalDetokenizer(tokenizer)
        texts = [detokenizer.push(ids[:cut]), detokenizer.push(ids[cut:]), detokenizer.flush()]
        assert "".join(texts) == tokenizer.decode(ids)

    @pytest.mark.parametrize("text", [text for text in HARD_TEXTS if "<" not in text and "\u2581" not in text])
    def test_real_text_comes_out_whole_and_without_half_characters(
        self, tokenizers: dict[str, Tokenizer], kind: str, text: str
    ) -> None:
        tokenizer = tokenizers[kind]
        shown = ""
        for piece in stream(tokenizer, tokenizer.encode(text, add_bos=True)):
            shown += piece
            assert text.startswith(shown)
        assert shown == text

    @pytest.mark.parametrize("text", [text for text in HARD_TEXTS if "<" not in text and "\u2581" not in text])
    def test_a_prompt_is_continued_wherever_it_is_cut(
        self, tokenizers: dict[str, Tokenizer], kind: str, text: str
    ) -> None:
        tokenizer = tokenizers[kind]
        ids = tokenizer.encode(text, add_bos=True)
        for cut in range(1, len(ids), 1 + len(ids) // 40):
            before = "".join(stream(tokenizer, ids[:cut])[:-1])  # without what a flush would make of half a character
            assert before + "".join(stream(tokenizer, ids[cut:], ids[:cut])) == text

    def test_special_tokens_are_hidden_unless_asked_for(self, tokenizers: dict[str, Tokenizer], kind: str) -> None:
        tokenizer = tokenizers[kind]
        ids = [1, *tokenizer.encode("Hi", add_bos=False), 2]
        assert "".join(stream(tokenizer, ids)) == "Hi"
        shown = IncrementalDetokenizer(tokenizer, skip_special=False)
        assert shown.push(ids) + shown.flush() == tokenizer.decode(ids, skip_special=False)

    def test_work_per_push_does_not_grow(self, tokenizers: dict[str, Tokenizer], kind: str) -> None:
        """Counted, not timed: what is held back stays below a character however long broken bytes go on."""
        tokenizer = tokenizers[kind]
        continuation = next(i for i in range(300) if tokenizer.token_bytes(i) == b"\x80")
        lead = next(i for i in range(300) if tokenizer.token_bytes(i) == b"\xf0")
        ids = [lead, continuation, lead, *[continuation] * 500] * 3
        lengths = [len(text) for text in stream(tokenizer, ids)[:-1]]
        assert max(lengths) <= 4
        assert max(len(list(run)) for shown, run in groupby(lengths, bool) if not shown) <= 3

    def test_a_long_prompt_costs_no_more_than_its_end(self, tokenizers: dict[str, Tokenizer], kind: str) -> None:
        counting = _Counting(tokenizers[kind])
        prompt = tokenizers[kind].encode("word " * 5000, add_bos=True)
        IncrementalDetokenizer(counting, prompt)  # type: ignore[arg-type]
        assert counting.calls < 50


class TestSentencePieceSpace:
    def test_an_answer_of_its_own_drops_the_space_and_a_continuation_keeps_it(
        self, tokenizers: dict[str, Tokenizer]
    ) -> None:
        tokenizer = tokenizers["sentencepiece"]
        hello = tokenizer.encode("Hello world", add_bos=False)
        assert "".join(stream(tokenizer, hello)) == "Hello world"
        assert "".join(stream(tokenizer, hello, [1])) == "Hello world"
        assert "".join(stream(tokenizer, hello, tokenizer.encode("Say", add_bos=True))) == " Hello world"

    def test_special_tokens_at_the_end_of_a_prompt_do_not_make_a_beginning(
        self, tokenizers: dict[str, Tokenizer]
    ) -> None:
        tokenizer = tokenizers["sentencepiece"]
        prompt = [*tokenizer.encode("Say", add_bos=True), *[2] * 40]
        assert "".join(stream(tokenizer, tokenizer.encode("Hi", add_bos=False), prompt)) == " Hi"


class TestCharacters:
    def test_bytes_wait_for_their_character(self, tokenizers: dict[str, Tokenizer]) -> None:
        ids = [3 + byte for byte in "🙂".encode()]
        assert stream(tokenizers["sentencepiece"], ids) == ["", "", "", "🙂", ""]
        assert stream(tokenizers["sentencepiece"], ids[:3]) == ["", "", "", "\ufffd" * 3]

    def test_a_character_begun_in_the_prompt_is_finished(self, tokenizers: dict[str, Tokenizer]) -> None:
        tokenizer = tokenizers["byte-level"]
        ids = tokenizer.encode("a🙂", add_bos=False)
        assert len(ids) > 2
        assert "".join(stream(tokenizer, ids[2:], ids[:2])) == "🙂"

    def test_a_token_cut_inside_two_characters_shows_only_the_whole_one(self) -> None:
        decoder = PieceDecoder(DecodeRule(per_byte=False, specials_break=False))
        texts = [decoder.push(Piece(part, is_bytes=True)) for part in (b"\xe4\xb8", b"\xad\xe6", b"\x96\x87")]
        assert texts == ["", "中", "文"]

    def test_the_replacement_character_itself_is_text(self, tokenizers: dict[str, Tokenizer]) -> None:
        for tokenizer in tokenizers.values():
            ids = tokenizer.encode("\ufffd", add_bos=False)
            assert "".join(stream(tokenizer, ids)[:-1]) == "\ufffd"

    @settings(deadline=None, max_examples=300)
    @given(data=st.binary(max_size=20), cut=st.integers(0, 20))
    def test_utf8_in_parts_is_utf8_at_once(self, data: bytes, cut: int) -> None:
        whole, rest = decode_utf8(data, final=True, per_byte=False)
        assert (whole, rest) == (data.decode(errors="replace"), b"")
        first, held = decode_utf8(data[:cut], final=False, per_byte=False)
        assert len(held) <= 3
        assert first + decode_utf8(held + data[cut:], final=True, per_byte=False)[0] == whole

    @settings(deadline=None, max_examples=300)
    @given(data=st.binary(max_size=20), cut=st.integers(0, 20))
    def test_per_byte_replacement_in_parts(self, data: bytes, cut: int) -> None:
        whole, _ = decode_utf8(data, final=True, per_byte=True)
        assert whole.replace("\ufffd", "") == data.decode(errors="ignore").replace("\ufffd", "")
        first, held = decode_utf8(data[:cut], final=False, per_byte=True)
        assert first + decode_utf8(held + data[cut:], final=True, per_byte=True)[0] == whole


def test_tokenizer_json_with_byte_fallback_streams_like_its_decoder(tmp_path: Path) -> None:
    """Metaspace and Strip decoders written by hand, with the library's own decoder as the reference."""
    vocab = {"<unk>": 0, "▁a": 1, "b": 2, "▁": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    for decoder in (
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": True},
        _sequence(strip=1),
        _sequence(strip=0),
    ):
        model = {"type": "BPE", "vocab": vocab, "merges": [], "unk_token": "<unk>", "byte_fallback": True}
        content = {"version": "1.0", "model": model, "decoder": decoder, "added_tokens": []}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        tokenizer, backend = load_tokenizer(tmp_path), Backend.from_file(str(tmp_path / "tokenizer.json"))
        for ids in ([1, 2, 1], [3, 1], [2, 3, 1], [1], [3, 3, 3]):
            assert "".join(stream(tokenizer, ids)) == backend.decode(ids)


def _sequence(strip: int) -> dict[str, object]:
    steps: list[dict[str, object]] = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": strip, "stop": 0},
    ]
    return {"type": "Sequence", "decoders": steps}


class _Counting:
    """A tokenizer that counts how often it is asked for a piece."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.calls = 0
        self.decode_rule = tokenizer.decode_rule
        self._tokenizer = tokenizer

    def piece(self, token_id: int) -> Piece:
        self.calls += 1
        return self._tokenizer.piece(token_id)

    def is_special(self, token_id: int) -> bool:
        self.calls += 1
        return self._tokenizer.is_special(token_id)


def test_a_verbatim_text_keeps_the_space_that_opens_it(tokenizers: dict[str, Tokenizer]) -> None:
    for tokenizer in tokenizers.values():
        ids = tokenizer.encode(" one two", add_bos=False)
        data = b"".join(map(tokenizer.token_bytes, ids)).decode()
        verbatim = IncrementalDetokenizer(tokenizer, verbatim=True)
        assert verbatim.push(ids) + verbatim.flush() == data
    of_its_own = IncrementalDetokenizer(tokenizers["sentencepiece"])
    assert of_its_own.push(tokenizers["sentencepiece"].encode("one", add_bos=False)) == "one"
