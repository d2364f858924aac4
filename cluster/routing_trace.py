"""What a model's routers chose, token by token, and when requests came: one value, and its compact file.

The file is a NumPy .npz (a zip of .npy columns) without pickled objects. R requests, T tokens, L layers, E experts, K
of them a token:

| column | dtype | shape | meaning |
|---|---|---|---|
| version | int64 | () | 1 |
| num_experts | int64 | () | E; every id is below it |
| arrival_s | float64 | (R,) | when each request came, ascending from 0 or later |
| prompt_tokens, output_tokens | int32 | (R,) | its lengths, each at least 1 |
| token_time_s | float64 | (T,) | when each token was routed, ascending from 0 or later |
| token_request | int32 | (T,) | the request it is of, -1 where that is not known |
| experts | uint8, or uint16 for E > 256 | (T, L, K) | experts of each token in each layer, the first choice first |

T may be a sample of all tokens; R or T may be 0, not both. A file is believed in nothing: names, types, shapes and
sizes are checked before a column is read, values after. Opening files, and making traces, is not done here.
"""

import math
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

VERSION = 1
MAX_REQUESTS = 10_000_000
MAX_TOKENS = 100_000_000
MAX_LAYERS = 4096
MAX_EXPERTS = 65_536
MAX_TOP_K = 256
MAX_COLUMN_BYTES = 4 << 30
_MAX_HEADER_BYTES = 4096

_DTYPES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "version": ("int64",),
        "num_experts": ("int64",),
        "arrival_s": ("float64",),
        "prompt_tokens": ("int32",),
        "output_tokens": ("int32",),
        "token_time_s": ("float64",),
        "token_request": ("int32",),
        "experts": ("uint8", "uint16"),
    }
)
_MAX_SHAPES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "version": (),
        "num_experts": (),
        "arrival_s": (MAX_REQUESTS,),
        "prompt_tokens": (MAX_REQUESTS,),
        "output_tokens": (MAX_REQUESTS,),
        "token_time_s": (MAX_TOKENS,),
        "token_request": (MAX_TOKENS,),
        "experts": (MAX_TOKENS, MAX_LAYERS, MAX_TOP_K),
    }
)
MAX_REQUEST_TOKENS = 1 << 24
# What the standard library raises for archives that contradict themselves.
_UNSOUND = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    NotImplementedError,
    RuntimeError,
    ValueError,
)


class TraceError(ValueError):
    """A trace that cannot be: the column, its problem, and the limit."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """The columns as in the module's table; checked at construction. Raises TraceError."""

    num_experts: int
    arrival_s: npt.NDArray[np.float64]
    prompt_tokens: npt.NDArray[np.int32]
    output_tokens: npt.NDArray[np.int32]
    token_time_s: npt.NDArray[np.float64]
    token_request: npt.NDArray[np.int32]
    experts: npt.NDArray[Any]

    def __post_init__(self) -> None:
        for column in fields(self):
            if column.name != "num_experts":
                array = getattr(self, column.name)
                _check_form(column.name, array.dtype, array.shape)
        if not 1 <= self.num_experts <= MAX_EXPERTS:
            raise TraceError(f"num_experts is {self.num_experts}, but it must be 1 to {MAX_EXPERTS}")
        _same_length(self, "arrival_s", ("prompt_tokens", "output_tokens"))
        _same_length(self, "experts", ("token_time_s", "token_request"))
        if not len(self.arrival_s) and not len(self.experts):
            raise TraceError("arrival_s and experts are both empty; one of them must have something")
        if 0 in self.experts.shape[1:]:
            raise TraceError(f"experts has shape {self.experts.shape}, but layers and experts a token are at least 1")
        for name in ("arrival_s", "token_time_s"):
            _check_times(name, getattr(self, name))
        for name in ("prompt_tokens", "output_tokens"):
            _check_range(name, getattr(self, name), 1, MAX_REQUEST_TOKENS)
        _check_range("token_request", self.token_request, -1, len(self.arrival_s) - 1)
        _check_range("experts", self.experts, 0, self.num_experts - 1)

    @property
    def num_layers(self) -> int:
        """L."""
        return int(self.experts.shape[1])

    @property
    def top_k(self) -> int:
        """K."""
        return int(self.experts.shape[2])

    def counts(self, first: int = 0, last: int | None = None) -> npt.NDArray[np.int64]:
        """Tokens first .. last by layer and expert, shape (L, E)."""
        chosen = self.experts[first:last].astype(np.int64) + self.num_experts * np.arange(self.num_layers)[:, None]
        size = self.num_layers * self.num_experts
        counts: npt.NDArray[np.int64] = np.bincount(chosen.ravel(), minlength=size)
        return counts.reshape(self.num_layers, self.num_experts)


def write_trace(trace: RoutingTrace, file: BinaryIO) -> None:
    """Writes the trace, compressed; the file must be seekable."""
    columns = {c.name: getattr(trace, c.name) for c in fields(trace) if c.name != "num_experts"}
    np.savez_compressed(file, version=np.int64(VERSION), num_experts=np.int64(trace.num_experts), **columns)


def read_trace(file: BinaryIO) -> RoutingTrace:
    """The trace in a seekable file. Raises TraceError for anything that is not one, or is larger than the limits."""
    try:
        with zipfile.ZipFile(file) as archive:
            columns = _columns(archive)
    except TraceError:
        raise
    except _UNSOUND as error:
        raise TraceError(f"the file is not a sound .npz: {str(error)[:200]}") from error
    version = int(columns.pop("version"))
    if version != VERSION:
        raise TraceError(f"version is {version}, but it must be {VERSION}")
    return RoutingTrace(num_experts=int(columns.pop("num_experts")), **columns)


def _columns(archive: zipfile.ZipFile) -> dict[str, Any]:
    names = [info.filename for info in archive.infolist()]
    wanted = [f"{name}.npy" for name in _DTYPES]
    if sorted(names) != sorted(wanted):
        stranger = next((name for name in names if name not in wanted or names.count(name) > 1), None)
        missing = next((name for name in wanted if name not in names), None)
        problem = f"there is no {missing}" if stranger is None else f"{stranger[:80]!r} must not be there, or only once"
        raise TraceError(f"the columns are not those of a trace: {problem}")
    return {name: _column(archive, name) for name in _DTYPES}


def _column(archive: zipfile.ZipFile, name: str) -> Any:
    """One column, read only when its header says that it may be."""
    with archive.open(f"{name}.npy") as stream:
        try:
            magic = np.lib.format.read_magic(stream)  # type: ignore[no-untyped-call]
            if magic != (1, 0):
                raise TraceError(f"{name} has .npy version {magic}, but it must be (1, 0)")
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(  # type: ignore[no-untyped-call,call-arg]
                stream, max_header_size=_MAX_HEADER_BYTES
            )
        except TraceError:
            raise
        except ValueError as error:
            raise TraceError(f"{name} is not a .npy column: {str(error)[:200]}") from error
        _check_form(name, dtype, shape)
        if fortran and len(shape) > 1:
            raise TraceError(f"{name} is in Fortran order, but it must be in C order")
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > MAX_COLUMN_BYTES:
            raise TraceError(f"{name} has {num_bytes} bytes, but at most {MAX_COLUMN_BYTES} are read")
        data = stream.read(num_bytes + 1)
    if len(data) != num_bytes:
        raise TraceError(
            f"{name} has {'more' if len(data) > num_bytes else len(data)} bytes, but its header says {num_bytes}"
        )
    return np.frombuffer(data, dtype).reshape(shape)


def _check_form(name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    if dtype.name not in _DTYPES[name] or not dtype.isnative:
        raise TraceError(f"{name} is of {dtype}, but it must be {' or '.join(_DTYPES[name])}")
    limits = _MAX_SHAPES[name]
    if len(shape) != len(limits) or any(size > limit for size, limit in zip(shape, limits, strict=True)):
        raise TraceError(f"{name} has shape {shape}, but it may be {limits} at most, with as many axes")


def _same_length(trace: RoutingTrace, name: str, others: tuple[str, ...]) -> None:
    for other in others:
        if len(getattr(trace, other)) != len(getattr(trace, name)):
            raise TraceError(
                f"{other} has {len(getattr(trace, other))} rows, but {name} has {len(getattr(trace, name))}"
            )


def _check_times(name: str, times: npt.NDArray[np.float64]) -> None:
    if not np.isfinite(times).all() or (len(times) and times[0] < 0) or (np.diff(times) < 0).any():
        raise TraceError(f"{name} must be finite, ascending, and at least 0")


def _check_range(name: str, values: npt.NDArray[Any], low: int, high: int) -> None:
    if values.size and not low <= int(values.min()) <= int(values.max()) <= high:
        raise TraceError(f"{name} is {int(values.min())} to {int(values.max())}, but it must be {low} to {high}")
