"""Opens whatever dense checkpoint a path names, and gives a copy of the files that stand beside its weights.

A directory is a safetensors checkpoint (`model.storage.checkpoint`), a file a GGUF
(`model.upcycling.gguf_source`). What is made of the model is the caller's business.
"""

import shutil
from pathlib import Path

from model.storage.checkpoint import Checkpoint
from model.upcycling.gguf_source import GgufSource
from model.upcycling.gguf_tokenizer import write_tokenizer

COMPANIONS = (
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE*",
)

DenseSource = Checkpoint | GgufSource


def open_dense_source(path: Path) -> DenseSource:
    """Open a safetensors directory or a .gguf file, checking every tensor's name and shape.

    Raises ModelConfigError, CheckpointError or GgufError (all ValueError) with the reason.
    """
    return Checkpoint.open(path) if path.is_dir() else GgufSource.open(path)


def write_companions(source: DenseSource, dest: Path) -> None:
    """Put the tokenizer, its configuration with the chat template, and generation_config.json into `dest`."""
    if isinstance(source, GgufSource):
        write_tokenizer(source.metadata, dest)
        return
    for pattern in COMPANIONS:
        for file in sorted(source.path.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, dest / file.name)
