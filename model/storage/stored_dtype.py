"""What the elements of a stored tensor are, known without torch, whose words are in `model.storage.torch_dtypes`."""

from enum import Enum


class StoredDtype(Enum):
    """By the name that safetensors files use. The value is torch's name, and the bytes of one element."""

    F64 = ("float64", 8)
    F32 = ("float32", 4)
    F16 = ("float16", 2)
    BF16 = ("bfloat16", 2)
    F8_E4M3 = ("float8_e4m3fn", 1)
    F8_E5M2 = ("float8_e5m2", 1)
    I64 = ("int64", 8)
    I32 = ("int32", 4)
    I16 = ("int16", 2)
    I8 = ("int8", 1)
    U8 = ("uint8", 1)
    BOOL = ("bool", 1)

    @property
    def label(self) -> str:
        """As torch calls it: float16, bfloat16, …"""
        return self.value[0]

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return self.value[1]

    def __str__(self) -> str:
        """As torch writes its own: these names are in messages, and in `Ledger.content_id`."""
        return f"torch.{self.label}"


WEIGHT_DTYPES = (StoredDtype.F32, StoredDtype.F16, StoredDtype.BF16)
"""What weights may be stored in."""
