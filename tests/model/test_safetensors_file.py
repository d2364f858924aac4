"""Headers against the safetensors library, byte ranges against what was written, and files that lie."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from model.storage.safetensors_file import read_into, read_slices
from model.storage.safetensors_header import MAX_HEADER_BYTES, SLICE_BYTES, CheckpointError, read_header
from model.storage.torch_dtypes import to_torch

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]
FAST = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], deadline=None
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def raw_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def read_whole(path: Path, name: str) -> torch.Tensor:
    stored = read_header(path).tensors[name]
    target = torch.empty(stored.shape, dtype=to_torch(stored.dtype))
    read_into(path, stored.start, target)
    assert target.nbytes == stored.nbytes
    return target


@FAST
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=4)), max_size=6))
def test_every_file_of_the_library_is_read_back(tmp_path: Path, parts: list[tuple[torch.dtype, list[int]]]) -> None:
    tensors = {f"t{i}": random_tensor(tuple(shape), dtype, seed=i) for i, (dtype, shape) in enumerate(parts)}
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert header.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        stored = header.tensors[name]
        assert (stored.name, stored.path) == (name, path)
        assert (to_torch(stored.dtype), stored.shape) == (tensor.dtype, tuple(tensor.shape))
        assert torch.equal(read_whole(path, name).view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))


def test_an_empty_file_of_the_library_is_no_error(tmp_path: Path) -> None:
    save_file({}, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    assert header.tensors == {}
    assert header.metadata == {}


def test_spaces_after_the_header_are_legal(tmp_path: Path) -> None:
    path = raw_file(tmp_path / "a", json.dumps({"a": entry()}).encode().ljust(200), b"\1\2\3\4")
    assert read_whole(path, "a").tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "header: not valid JSON"),
        (b"[]", b"", "header: expected a JSON object"),
        (b'{"a": {}, "a": {}}', b"", "header: key 'a' appears twice"),
        (b'{"a": {"dtype": "U8", "dtype": "F32"}}', b"", "header: key 'dtype' appears twice"),
        ({"__metadata__": {"a": 1}}, b"", "__metadata__ must map strings"),
        ({"__metadata__": None}, b"", "__metadata__ must map strings"),
        ({"a": 1}, b"", "'a': must have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "U8", "shape": [1]}}, b"", "'a': must have exactly"),
        ({"a": {**entry(), "extra": 1}}, b"1234", "'a': must have exactly"),
        ({"a": entry(dtype="F4")}, b"1234", "'a': unknown dtype 'F4'; known: F64"),
        ({"a": entry(dtype=["U8"])}, b"1234", "'a': unknown dtype"),
        ({"a": entry(shape=[-4])}, b"1234", "'a': shape must be a list of whole numbers"),
        ({"a": entry(shape=[4.0])}, b"1234", "'a': shape must be a list of whole numbers"),
        ({"a": entry(shape=[True, 4])}, b"1234", "'a': shape must be a list of whole numbers"),
        ({"a": entry(shape=4)}, b"1234", "'a': shape must be a list of whole numbers"),
        ({"a": entry(shape=[2**60], offsets=[0, 2**60])}, b"1234", "'a': shape must be a list"),
        ({"a": entry(shape=[1] * 9, offsets=[0, 1])}, b"1", "'a': bad rank 9"),
        ({"a": entry(offsets=[0])}, b"1234", "'a': bad rank 1 or offsets"),
        ({"a": entry(offsets=[4, 0])}, b"1234", "'a': bad rank 1 or offsets"),
        ({"a": entry(offsets=[-4, 0])}, b"1234", "'a': data_offsets must be a list"),
        ({"a": entry(offsets="04")}, b"1234", "'a': data_offsets must be a list"),
        ({"a": entry(dtype="F32")}, b"1234", "'a': torch.float32 .4. takes 16 bytes, the header gives 4"),
        ({"a": entry(shape=[2**47], offsets=[0, 2**47])}, b"1234", "'a': truncated: ends at byte"),
        ({"a": entry()}, b"123", "'a': truncated: ends at byte"),
        ({"a": entry()}, b"12345", "1 bytes at the end belong to no tensor"),
        ({}, b"1", "1 bytes at the end belong to no tensor"),
        ({"a": entry(offsets=[1, 5])}, b"12345", "'a': starts at byte .* leaves a hole"),
        ({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789", "'b': .* leaves a hole"),
        ({"a": entry(), "b": entry(offsets=[3, 7])}, b"1234567", "'b': .* overlaps"),
        ({"a": entry(), "b": entry()}, b"1234", "'b': .* overlaps"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path: Path, header: object, data: bytes, message: str) -> None:
    path = raw_file(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(CheckpointError, match=f"bad.safetensors: .*{message}"):
        read_header(path)


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (1 << 63, "over the limit"),
        (MAX_HEADER_BYTES + 1, "over the limit of 100000000; not a safetensors file"),
        (MAX_HEADER_BYTES, "truncated: header of 100000000 bytes in a file of 10"),
        (3, "truncated: header of 3 bytes in a file of 10"),
    ],
)
def test_a_header_length_is_only_a_claim(tmp_path: Path, length: int, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_header(raw_file(tmp_path / "a", b"{}", length=length))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="gone: no such file"):
        read_header(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: no such file"):
        read_header(tmp_path / "pipe")
    (tmp_path / "short").write_bytes(b"1234567")
    with pytest.raises(CheckpointError, match="7 bytes are too few"):
        read_header(tmp_path / "short")
    with pytest.raises(CheckpointError, match="gone: cannot be read: No such file"):
        read_into(tmp_path / "gone", 0, torch.empty(1))


@FAST
@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_checkpoint_error(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(CheckpointError):
        read_header(tmp_path / "a")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "F32", "BF16", "F64"]) | JSON_VALUES,
        "shape": st.lists(st.integers(0, 4), max_size=3) | JSON_VALUES,
        "data_offsets": st.lists(st.integers(0, 40), min_size=2, max_size=2) | JSON_VALUES,
    }
)


@FAST
@given(
    st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRIES | JSON_VALUES, max_size=3),
    st.integers(0, 40),
)
def test_a_header_is_accepted_only_where_the_library_accepts_it(
    tmp_path: Path, header: dict[str, Any], data_bytes: int
) -> None:
    path = raw_file(tmp_path / "a", header, bytes(data_bytes))
    try:
        ours = read_header(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "pt") as theirs:
        assert set(theirs.keys()) == ours.tensors.keys()
        for name, stored in ours.tensors.items():
            assert theirs.get_slice(name).get_shape() == list(stored.shape)


@FAST
@given(st.data())
def test_a_flipped_byte_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "a"
    save_file({"a": torch.ones(3, 2), "b": torch.ones(5, dtype=torch.int16)}, path)
    content = bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        header = read_header(path)
    except CheckpointError:
        return
    for name, stored in header.tensors.items():
        assert read_whole(path, name).shape == stored.shape


@pytest.mark.parametrize("unit", [1, 7, 4096])
def test_slices_are_bounded_and_whole(tmp_path: Path, unit: int) -> None:
    numel = (3 * SLICE_BYTES // 2 // 4) // unit * unit
    whole = torch.arange(numel, dtype=torch.float32)
    save_file({"a": whole}, tmp_path / "a")
    start = read_header(tmp_path / "a").tensors["a"].start
    parts = [part.clone() for part in read_slices(tmp_path / "a", start, numel, torch.float32, unit)]
    assert len(parts) == 2
    assert all(part.nbytes <= SLICE_BYTES and len(part) % unit == 0 for part in parts)
    assert torch.equal(torch.cat(parts), whole)


def test_a_unit_larger_than_a_slice_is_still_whole(tmp_path: Path) -> None:
    unit = SLICE_BYTES // 4 + 1
    save_file({"a": torch.ones(unit)}, tmp_path / "a")
    start = read_header(tmp_path / "a").tensors["a"].start
    assert [len(part) for part in read_slices(tmp_path / "a", start, unit, torch.float32, unit)] == [unit]
    with pytest.raises(ValueError, match="cannot be cut into units"):
        list(read_slices(tmp_path / "a", start, unit, torch.float32, 2))


def test_slices_reuse_one_memory(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(SLICE_BYTES // 2)}, tmp_path / "a")
    start = read_header(tmp_path / "a").tensors["a"].start
    addresses = {part.data_ptr() for part in read_slices(tmp_path / "a", start, SLICE_BYTES // 2, torch.float32)}
    assert len(addresses) == 1


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "a"
    save_file({"a": torch.ones(100)}, path)
    stored = read_header(path).tensors["a"]
    os.truncate(path, stored.start + 300)
    with pytest.raises(CheckpointError, match=f"ends at byte {stored.start + 300}, it was truncated after"):
        read_into(path, stored.start, torch.empty(100))
    with pytest.raises(CheckpointError, match="truncated after it was opened"):
        list(read_slices(path, stored.start, 100, torch.float32))
