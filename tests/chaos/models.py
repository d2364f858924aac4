"""The checkpoints that the suite serves: a tiny random one, made on the fly, and the demo."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from actors.command.demo_model import ensure_demo_model
from tests.chaos.asks import Load
from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer


@dataclass(frozen=True, slots=True)
class ChaosModel:
    """A checkpoint and a load that fits its speed."""

    name: str
    path: Path
    load: Load


def tiny(home: Path) -> ChaosModel:
    """A random Mixtral of 4 layers and 8 experts, in fp16, so that the packed kernel serves it."""
    path = home / "tiny"
    path.mkdir(parents=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    write_mixtral(path, layers=4, experts=8, dtype=torch.float16)
    write_byte_tokenizer(path)
    return ChaosModel("tiny", path, Load())


def demo() -> ChaosModel:
    """The demo model; its steps are long, so its answers are short and its long prompts come seldom."""
    return ChaosModel(
        "demo",
        ensure_demo_model(),
        Load(max_tokens=32, arrival_every_s=2.0, arrivals=4, arrival_chars=200, overload_tokens=32),
    )


def model_named(name: str, home: Path) -> ChaosModel:
    """`tiny` or `demo`. Raises ValueError."""
    if name not in ("tiny", "demo"):
        raise ValueError(f"model is {name!r}, but must be tiny or demo")
    return tiny(home) if name == "tiny" else demo()
