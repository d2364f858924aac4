"""Which of torch's fused attention kernels is called on which device.

On a CPU torch has one for fp32. On CUDA it would choose by shape and alignment among several that round differently;
here it is always the memory-efficient one: it goes through the keys in tiles of a fixed size, so that a query's bits
depend neither on its company nor on masked keys behind its own. How it may be called is found out by
`model.attention_probe`.

Tensor suffixes: n sequences, G kv heads, R query rows per kv head, S keys, d head_dim.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.functional import scaled_dot_product_attention

_ALIGNED = 4

Attend = Callable[..., Tensor]
"""Called as torch's scaled_dot_product_attention, with q_nGRd, k_nGSd, v_nGSd, a mask to add, and a scale."""


def fused_attention(device: torch.device | str) -> Attend:
    """The kernel for fp32 queries, keys and values on `device`."""
    return memory_efficient if torch.device(device).type == "cuda" else scaled_dot_product_attention


def memory_efficient(q_nGRd: Tensor, k_nGSd: Tensor, v_nGSd: Tensor, *, attn_mask: Tensor, scale: float) -> Tensor:
    """Answers (n, G, R, d). The mask (n or 1, 1, R or 1, S) must be contiguous, with S a multiple of 4.

    So must d be for this kernel: zeros, which change no sum, make up for what is missing.
    """
    width = q_nGRd.shape[3]
    if width % _ALIGNED:
        parts = (functional.pad(part, (0, -width % _ALIGNED)) for part in (q_nGRd, k_nGSd, v_nGSd))
        return memory_efficient(*parts, attn_mask=attn_mask, scale=scale)[..., :width]
    shape = (*q_nGRd.shape[:3], k_nGSd.shape[2])
    answers: tuple[Tensor, ...] = torch.ops.aten._scaled_dot_product_efficient_attention.default(
        q_nGRd, k_nGSd, v_nGSd, attn_mask.expand(shape), False, scale=scale
    )
    return answers[0]
