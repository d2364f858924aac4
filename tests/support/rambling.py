"""A checkpoint that repeats itself, for tests of guessing ahead: of a purely random one hardly a guess comes true."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.support.checkpoints import write_mixtral

ROUND = 7


def write_rambling(dest: Path, **changes: Any) -> None:
    """A random Mixtral that mostly says tokens in rounds of seven, and breaks out now and then, as its layers have it.

    `changes` are `write_mixtral`'s.
    """
    write_mixtral(dest, **changes)
    (file,) = dest.glob("*.safetensors")
    weights = load_file(file)
    embed_VD = weights["model.embed_tokens.weight"]
    following_V = torch.arange(len(embed_VD))
    whole = len(following_V) // ROUND * ROUND
    following_V[:whole] = following_V[:whole].view(-1, ROUND).roll(-1, dims=1).flatten()
    embed_VD *= 30  # so that the layers add to a token and do not drown it
    head_VD = torch.nn.functional.normalize(embed_VD.float(), dim=1).to(embed_VD.dtype)
    weights["lm_head.weight"][following_V] = head_VD
    save_file(weights, file, metadata={"format": "pt"})
