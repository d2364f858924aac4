"""A tiny Mixtral whose load is chosen: even prompt tokens keep expert HOT_EVEN busy in every layer, odd ones HOT_ODD.

Each token's embedding has a direction of its family, which the residual stream keeps; the gates turn it into the first
choice, and the head into tokens of the same family. So the hot expert gets half of all routed rows (top-2), what is
generated stays in the family, and the other half is spread by what else there is in each token: for that the rest of
the network is quiet.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer

HOT_EVEN, HOT_ODD = 1, 6
LAYERS, EXPERTS, VOCAB = 2, 8, 300
QUIET = 0.05


def write_hot_model(dest: Path, *, families: int = 2) -> Path:
    """The checkpoint in `dest`, which must not exist. With one of the `families` every token keeps HOT_EVEN busy."""
    dest.mkdir()
    write_mixtral(dest, layers=LAYERS, experts=EXPERTS, vocab=VOCAB, dtype=torch.float16)
    write_byte_tokenizer(dest)
    file = dest / "model.safetensors"
    tensors = {name: tensor.float() for name, tensor in load_file(file).items()}
    directions_2D = torch.linalg.qr(torch.randn(64, 2, generator=torch.Generator().manual_seed(1)))[0].T
    family_V = torch.arange(VOCAB) % families
    tensors["model.embed_tokens.weight"] += 12.0 * directions_2D[family_V]
    head = tensors["lm_head.weight"]
    head += 2.0 * directions_2D[family_V] / tensors["model.norm.weight"]
    head[:3] -= 4.0 * directions_2D.sum(dim=0)  # no special token is ever said
    for layer in range(LAYERS):
        gate_ED = tensors[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
        norm_D = tensors[f"model.layers.{layer}.post_attention_layernorm.weight"]
        for direction_D in directions_2D:
            _forget(gate_ED, norm_D * direction_D)
        for expert, direction_D in ((HOT_EVEN, directions_2D[0]), (HOT_ODD, directions_2D[1])):
            gate_ED[expert] = 3.0 * direction_D / norm_D
        tensors[f"model.layers.{layer}.self_attn.o_proj.weight"] *= QUIET
        for expert in range(EXPERTS):
            tensors[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight"] *= QUIET
    save_file({name: tensor.half().contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})
    return dest


def _forget(rows_ED: Tensor, direction_D: Tensor) -> None:
    """Takes the direction out of every row."""
    rows_ED -= torch.outer(rows_ED @ direction_D / (direction_D @ direction_D), direction_D)


def prompt_of(family: int, seed: int, length: int = 6) -> list[int]:
    """Token ids of one family: 0 even, 1 odd."""
    drawn = torch.randint(5, VOCAB // 2, (length,), generator=torch.Generator().manual_seed(seed))
    return [1, *(int(2 * one + family) for one in drawn)]
