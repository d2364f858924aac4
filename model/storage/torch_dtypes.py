"""Stored dtypes in torch's words, and back."""

import torch

from model.storage.stored_dtype import StoredDtype

_TORCH: dict[StoredDtype, torch.dtype] = {one: getattr(torch, one.label) for one in StoredDtype}
_STORED = {theirs: ours for ours, theirs in _TORCH.items()}


def to_torch(dtype: StoredDtype) -> torch.dtype:
    """The dtype of a tensor that holds such elements."""
    return _TORCH[dtype]


def to_stored(dtype: torch.dtype) -> StoredDtype:
    """The inverse. Raises KeyError for a dtype that no file has."""
    return _STORED[dtype]
