"""A GGUF file of a dense Llama or Mistral as a source of weights: dequantised tensor by tensor.

Nothing but the tensor asked for is in memory at a time (the file is mapped). The vocabulary is rebuilt by
`model.upcycling.gguf_tokenizer`; what is done with the weights is the caller's business.
"""

import re
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import quants

from model.config import ModelConfig
from model.storage.tensor_names import tensor_specs
from model.upcycling.gguf_metadata import GgufError, GgufMetadata, read_model_config

LAYER_PARTS = {
    "attn_norm": "attn_norm",
    "attn_q": "wq",
    "attn_k": "wk",
    "attn_v": "wv",
    "attn_output": "wo",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "experts.0.w1",
    "ffn_down": "experts.0.w2",
    "ffn_up": "experts.0.w3",
}
TOP_PARTS = {"token_embd": "embed", "output_norm": "norm", "output": "lm_head"}
ROPE_FACTORS = "rope_freqs.weight"
STORED_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


class _Reader(gguf.GGUFReader):  # type: ignore[misc]  # gguf has no types
    """gguf's reader takes what lies behind a file's end for values of no bytes: an array of 2^60 would never end."""

    def _get(
        self, offset: int, dtype: Any, count: int = 1, override_order: Literal["I", "S", "<"] | None = None
    ) -> npt.NDArray[Any]:
        missing = int(offset) + np.dtype(dtype).itemsize * int(count) - len(self.data)
        if missing > 0:
            raise ValueError(f"{missing} bytes are missing at its end")
        found: npt.NDArray[Any] = super()._get(offset, dtype, count, override_order)
        return found


class GgufSource:
    """A `WeightSource` over one GGUF file; `dtype` is fp16 for every quantised format.

    A dequantised weight has more bits than fp16 keeps; rounding it loses far less than the quantisation did.
    """

    def __init__(self, path: Path, metadata: GgufMetadata, tensors: dict[str, gguf.ReaderTensor]) -> None:
        self.path = path
        self.metadata = metadata
        self._tensors = tensors
        self._config = _config(metadata, tensors)
        self._dtype = STORED_DTYPES.get(self._find("blk.0.ffn_gate.weight").tensor_type.name, torch.float16)
        self._stored_names = self._ledger()

    @classmethod
    def open(cls, path: Path) -> "GgufSource":
        """Parse metadata and tensor headers and check every tensor's name and shape; raises GgufError."""
        if not path.is_file():
            raise GgufError(f"{path}: no such file")
        try:
            with np.errstate(over="ignore"):  # an offset that overflows is checked where it points
                reader = _Reader(path)
            fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, RecursionError) as error:
            raise GgufError(f"{path}: damaged, or not a GGUF file ({error})") from error
        return cls(path, GgufMetadata(fields, str(path)), {tensor.name: tensor for tensor in reader.tensors})

    @property
    def config(self) -> ModelConfig:
        """The dense model of this file: one expert."""
        return self._config

    @property
    def dtype(self) -> torch.dtype:
        """The dtype `read` gives unless told otherwise."""
        return self._dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `read` returns."""
        return tuple(int(size) for size in reversed(self._find(self._stored_names[name]).shape))

    def read(self, name: str, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """Dequantise one tensor; wq and wk come in Hugging Face (half-rotation) row order."""
        tensor = self._find(self._stored_names[name])
        try:
            values = quants.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise GgufError(f"{self.path}: {tensor.name}: {error}") from error
        weight = torch.from_numpy(values if values.flags.writeable else values.copy())
        if name.endswith(".wq"):
            weight = half_rotation(weight, self.config.num_heads)
        elif name.endswith(".wk"):
            weight = half_rotation(weight, self.config.num_kv_heads)
        return weight.to(device=device, dtype=dtype or self.dtype)

    def _find(self, stored_name: str) -> gguf.ReaderTensor:
        if stored_name not in self._tensors:
            raise GgufError(f"{self.path}: tensor {stored_name} is missing")
        return self._tensors[stored_name]

    def _ledger(self) -> dict[str, str]:
        """Canonical name -> stored name; refuses tensors that are missing, unknown or of the wrong shape."""
        names = {canonical_name(stored): stored for stored in self._tensors if stored != ROPE_FACTORS}
        unknown = names.pop(None, None)
        if unknown:
            raise GgufError(f"{self.path}: unknown tensor {unknown}")
        strangers = dict(names)
        for spec in tensor_specs(self.config):  # as many as the file says: the first that is missing ends it
            if spec.name not in names:
                raise GgufError(f"{self.path}: no tensor holds {spec.name}")
            stored = strangers.pop(spec.name)
            stored_shape = tuple(int(size) for size in reversed(self._find(stored).shape))
            if stored_shape != spec.shape:
                raise GgufError(f"{self.path}: {stored} has shape {stored_shape}, expected {spec.shape}")
        if strangers:
            raise GgufError(f"{self.path}: unknown tensor {next(iter(strangers.values()))}")
        return {str(name): stored for name, stored in names.items()}


def canonical_name(stored_name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `layers.3.wq`; None for a name that is not a dense Llama's."""
    part = stored_name.removesuffix(".weight")
    if part == stored_name:
        return None
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", part)
    if match is None:
        return TOP_PARTS.get(part)
    layer, part = match.groups()
    return f"layers.{int(layer)}.{LAYER_PARTS[part]}" if part in LAYER_PARTS else None


def half_rotation(weight_OD: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of the rows of wq and wk: rotary pairs side by side become halves.

    A head of size 4 stored as rows (a0, b0, a1, b1), where (ai, bi) turn together, becomes (a0, a1, b0, b1).
    """
    rows, width = weight_OD.shape
    return weight_OD.view(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def _config(metadata: GgufMetadata, tensors: dict[str, gguf.ReaderTensor]) -> ModelConfig:
    embed = tensors.get("token_embd.weight")
    if embed is None:
        raise GgufError(f"{metadata.path}: tensor token_embd.weight is missing")
    factors = tensors.get(ROPE_FACTORS)
    return read_model_config(
        metadata,
        vocab_size=int(embed.shape[-1]),
        tied_embeddings="output.weight" not in tensors,
        rope_factors=None if factors is None else tuple(float(value) for value in factors.data),
    )
