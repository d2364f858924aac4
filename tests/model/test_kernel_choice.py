"""Which kernel a checkpoint takes, known by name: what the planner says without torch is what torch says."""

import pytest
import torch

from model.kernel_choice import cpu_packs_half, lossless_kernel
from model.kernels import default_kernel
from model.storage.stored_dtype import WEIGHT_DTYPES, StoredDtype
from model.storage.torch_dtypes import to_stored, to_torch


def test_the_processor_packs_half_precision_where_torch_does() -> None:
    assert cpu_packs_half() == ("fbgemm" in torch.backends.quantized.supported_engines)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES)
def test_the_planner_and_the_process_choose_alike(dtype: StoredDtype, device: str) -> None:
    planned = lossless_kernel(dtype, device, packs_half=cpu_packs_half())
    assert planned == default_kernel(to_torch(dtype), device)


def test_without_packed_half_precision_the_weights_are_widened() -> None:
    assert lossless_kernel(StoredDtype.F16, "cpu", packs_half=False) == "fp32"


@pytest.mark.parametrize("dtype", list(StoredDtype))
def test_a_stored_dtype_is_called_and_measured_as_torch_does(dtype: StoredDtype) -> None:
    theirs = to_torch(dtype)
    assert (str(dtype), dtype.itemsize, to_stored(theirs)) == (str(theirs), theirs.itemsize, dtype)
