"""A trace comes back as it was written, and a hostile file is refused by column, problem and limit."""

import contextlib
import io
import zipfile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.routing_trace import RoutingTrace, TraceError, read_trace, write_trace


def columns(**changes: Any) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "num_experts": 8,
        "arrival_s": np.array([0.0, 1.5]),
        "prompt_tokens": np.array([3, 4], np.int32),
        "output_tokens": np.array([2, 1], np.int32),
        "token_time_s": np.arange(10) * 0.1,
        "token_request": np.full(10, -1, np.int32),
        "experts": rng.integers(0, 8, (10, 3, 2)).astype(np.uint8),
    } | changes


def stored(**changes: Any) -> io.BytesIO:
    """A file with these columns, unchecked."""
    file = io.BytesIO()
    np.savez(file, **({"version": np.int64(1), **columns()} | {"num_experts": np.int64(8)} | changes))
    file.seek(0)
    return file


def test_it_comes_back_as_it_was() -> None:
    trace = RoutingTrace(**columns())
    file = io.BytesIO()
    write_trace(trace, file)
    file.seek(0)
    again = read_trace(file)
    for name, value in columns().items():
        assert np.array_equal(getattr(again, name), value), name
    assert (again.num_layers, again.top_k) == (3, 2)


def test_counts_are_per_layer() -> None:
    experts = np.array([[[0, 1], [2, 2]], [[0, 2], [1, 0]]], np.uint8)
    trace = RoutingTrace(
        **columns(num_experts=3, experts=experts, token_time_s=np.zeros(2), token_request=np.full(2, -1, np.int32))
    )
    assert trace.counts().tolist() == [[2, 1, 1], [1, 1, 2]]
    assert trace.counts(1).tolist() == [[1, 0, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"experts": np.full((10, 3, 2), 8, np.uint8)}, "experts is 8 to 8, but it must be 0 to 7"),
        ({"experts": np.zeros((9, 3, 2), np.uint8)}, "token_time_s has 10 rows, but experts has 9"),
        ({"experts": np.zeros((10, 3), np.uint8)}, r"experts has shape \(10, 3\)"),
        ({"experts": np.zeros((10, 0, 2), np.uint8)}, "layers and experts a token are at least 1"),
        ({"experts": np.zeros((10, 3, 2), np.int64)}, "experts is of int64, but it must be uint8 or uint16"),
        ({"experts": np.zeros((10, 5000, 1), np.uint8)}, r"it may be .*4096"),
        ({"arrival_s": np.array([1.0, 0.5])}, "arrival_s must be finite, ascending"),
        ({"arrival_s": np.array([0.0, np.nan])}, "arrival_s must be finite"),
        ({"token_time_s": np.full(10, -1.0)}, r"token_time_s must be .* at least 0"),
        ({"prompt_tokens": np.array([0, 1], np.int32)}, "prompt_tokens is 0 to 1, but it must be 1 to"),
        ({"token_request": np.full(10, 2, np.int32)}, "token_request is 2 to 2, but it must be -1 to 1"),
        ({"num_experts": np.int64(0)}, "num_experts is 0"),
        ({"version": np.int64(2)}, "version is 2, but it must be 1"),
        ({"more": np.int64(2)}, r"'more\.npy' must not be there"),
        ({"arrival_s": np.array([0.0, 1.0], ">f8")}, "arrival_s is of >f8"),
        ({"arrival_s": np.array([{}, {}], object)}, "arrival_s is of object"),
        ({"experts": np.asfortranarray(np.zeros((10, 3, 2), np.uint8))}, "Fortran order"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(TraceError, match=says):
        read_trace(stored(**changes))


def test_a_missing_column_is_named() -> None:
    file = io.BytesIO()
    np.savez(file, version=np.int64(1))
    with pytest.raises(TraceError, match=r"there is no num_experts\.npy"):
        read_trace(file)


def test_a_bomb_is_not_unpacked() -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(stored()) as good, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as bad:
        for info in good.infolist():
            data = good.read(info)
            bad.writestr(info.filename, data + bytes(50_000_000) if info.filename == "experts.npy" else data)
    assert len(file.getvalue()) < 200_000
    with pytest.raises(TraceError, match="experts has more bytes, but its header says 60"):
        read_trace(file)


def test_a_claim_beyond_the_limits_is_refused_before_reading() -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (100_000_000, 4096, 256)}
    claim = io.BytesIO()
    np.lib.format.write_array_header_1_0(claim, header)
    file = io.BytesIO()
    with zipfile.ZipFile(stored()) as good, zipfile.ZipFile(file, "w") as bad:
        for info in good.infolist():
            bad.writestr(info.filename, claim.getvalue() if info.filename == "experts.npy" else good.read(info))
    with pytest.raises(TraceError, match="experts has 104857600000000 bytes, but at most 4294967296 are read"):
        read_trace(file)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_bits_that_flip_never_do_more_than_raise_a_trace_error(data: st.DataObject) -> None:
    raw = bytearray(stored().getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.one_of(st.none(), st.integers(0, len(raw))))
    with contextlib.suppress(TraceError):
        read_trace(io.BytesIO(bytes(raw[:cut])))
