"""What an expert's process must know of the model beside its weights; enough to start where there is no checkpoint.

It comes from whoever starts the process, or from a checkpoint on its own machine. Weights are held against it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from model.storage.ledger import Ledger
from model.storage.stored_dtype import WEIGHT_DTYPES, StoredDtype
from protos.weight_parts import PARTS

_DTYPES = {dtype.label: dtype for dtype in WEIGHT_DTYPES}
_LARGEST = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """Sizes of the model, and the dtype of its stored linear weights. Raises ValueError, naming the field."""

    hidden_size: int
    ffn_size: int
    num_layers: int
    num_experts: int
    dtype: str

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name != "dtype" and (type(value) is not int or not 1 <= value <= _LARGEST):
                raise ValueError(
                    f"model_facts: {entry.name} is {value!r}, expected a whole number from 1 to {_LARGEST}"
                )
        if self.dtype not in _DTYPES:
            raise ValueError(f"model_facts: dtype is {self.dtype!r}, expected one of {', '.join(_DTYPES)}")

    @classmethod
    def of(cls, checkpoint: Ledger) -> "ModelFacts":
        """What a checkpoint says."""
        config = checkpoint.config
        return cls(
            hidden_size=config.hidden_size,
            ffn_size=config.ffn_size,
            num_layers=config.num_layers,
            num_experts=config.num_experts,
            dtype=checkpoint.stored_dtype.label,
        )

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "ModelFacts":
        """The inverse of `plain`. Raises ValueError for fields that are missing or unknown."""
        names = {entry.name for entry in fields(cls)}
        if set(plain) != names:
            raise ValueError(f"model_facts has {', '.join(sorted(plain))}; expected {', '.join(sorted(names))}")
        return cls(**plain)

    def plain(self) -> dict[str, Any]:
        """As an argument for another process."""
        return asdict(self)

    @property
    def stored_dtype(self) -> StoredDtype:
        return _DTYPES[self.dtype]

    def shape(self, part: str) -> tuple[int, int]:
        """Of w1 and w3 (F, D), of w2 (D, F)."""
        wide = self.ffn_size, self.hidden_size
        return (wide[1], wide[0]) if part == "w2" else wide

    @property
    def layer_bytes(self) -> int:
        """Stored bytes of one expert in one layer."""
        return len(PARTS) * self.hidden_size * self.ffn_size * self.stored_dtype.itemsize
