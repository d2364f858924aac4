"""What fuzzing found, each as the smallest input that showed it."""

import io
import json
import struct
import tracemalloc
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from cluster.routing_trace import TraceError, read_trace, write_trace
from model.storage.manifest import ALGORITHM, MANIFEST_NAME, VERSION, Manifest
from model.storage.safetensors_header import CheckpointError
from model.storage.strict_json import JSONError, read_object
from model.text.chat_messages import ChatTemplateError
from model.text.jinja_template import JinjaTemplate
from model.text.tokenizer import TokenizerError, load_tokenizer
from model.upcycling.gguf_metadata import GgufError
from model.upcycling.gguf_source import GgufSource
from tests.fuzz.file_targets import _tiny_gguf
from tests.support.tokenizers import write_byte_tokenizer
from tests.support.traces import trace


def allocated(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_a_short_json_file_takes_little_memory_whatever_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert allocated(lambda: read_object(path, 100_000_000)) < 2 << 20
    path.write_text(json.dumps({"a": "x" * 1_000_000}))
    assert read_object(path, 2_000_000)[0]["a"] == "x" * 1_000_000
    with pytest.raises(JSONError, match="larger than the limit of 1000000 bytes"):
        read_object(path, 1_000_000)


def test_a_trace_whose_beginning_is_lost_is_no_trace() -> None:
    file = io.BytesIO()
    write_trace(trace(num_tokens=4), file)
    with pytest.raises(TraceError, match="not a sound"):
        read_trace(io.BytesIO(file.getvalue()[4:]))


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token": "<\ud800>"},
        {"added_tokens_decoder": {"7": {"content": "\udfff"}}},
        {"additional_special_tokens": ["a\ud800"]},
    ],
    ids=str,
)
def test_half_of_a_character_is_no_token(tmp_path: Path, fields: dict[str, object]) -> None:
    write_byte_tokenizer(tmp_path, 300)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with pytest.raises(TokenizerError, match="must be a token's text"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "source", ["{{ a" + " % b" * 300 + " }}", "{{ " + "9" * 5000 + " }}"], ids=["deep", "long number"]
)
def test_what_python_cannot_compile_is_no_template(source: str) -> None:
    with pytest.raises(ChatTemplateError, match="is not valid") as caught:
        JinjaTemplate(source, datetime.now, 1 << 20)
    assert len(str(caught.value)) < 1000


def gguf_with(pair: bytes) -> bytes:
    """A GGUF file that says it has one key-value pair, of key "k"."""
    return b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + pair


def array(kind: int, length: int) -> bytes:
    return struct.pack("<IQ", kind, length)


@pytest.mark.parametrize(
    "pair",
    [
        struct.pack("<I", 9) + array(4, 2**60),
        struct.pack("<I", 9) + array(8, 2**60),
        struct.pack("<I", 9) + array(9, 1) * 5000,
        struct.pack("<IQ", 8, 2**63),
    ],
    ids=["numbers without end", "texts without end", "arrays in arrays", "a text without end"],
)
def test_sizes_that_a_gguf_file_claims_are_not_taken_for_facts(tmp_path: Path, pair: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_with(pair))

    def opened() -> None:
        with pytest.raises(GgufError, match="damaged"):
            GgufSource.open(path)

    assert allocated(opened) < 32 << 20


@pytest.mark.parametrize("key", ["block_count", "attention.key_length"])
def test_a_gguf_file_of_two_billion_layers_or_of_such_heads_is_refused_at_once(tmp_path: Path, key: str) -> None:
    path = tmp_path / "x.gguf"
    data = _tiny_gguf(path, rope_factors=True)
    place = data.index(key.encode()) + len(key) + 4
    path.write_bytes(data[:place] + struct.pack("<I", 2**31 - 2) + data[place + 4 :])

    def opened() -> None:
        with pytest.raises(GgufError, match=r"no tensor holds layers\.1\.|RoPE scaling"):
            GgufSource.open(path)

    assert allocated(opened) < 32 << 20


def test_an_endless_tensor_is_in_no_manifest(tmp_path: Path) -> None:
    record = {"file": "f", "dtype": "float16", "shape": [1e999], "bytes": 4, "checksums": ["0"]}
    manifest = {"version": VERSION, "algorithm": ALGORITHM, "tensors": {"t": record}, "files": {}}
    path = tmp_path / MANIFEST_NAME
    path.write_text(json.dumps(manifest).replace("Infinity", "1e999"))
    with pytest.raises(CheckpointError, match="not a manifest"):
        Manifest.read(path)


def test_a_tokenizer_whose_template_has_a_token_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path, 300)
    path = tmp_path / "tokenizer.json"
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": template}))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: cannot"):
        load_tokenizer(tmp_path)
