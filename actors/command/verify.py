"""`octavo verify`: whether a checkpoint is what its manifest says, before anything is started with it."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.command.bars import MB
from actors.command.cache_dir import user_cache_dir
from actors.command.manifest import hold_to_manifest
from model.storage.integrity import compare, manifest_places, verified
from model.storage.ledger import Ledger
from model.storage.safetensors_header import CheckpointError


def verify(model: Path, *, quick: bool, make: bool, console: Console) -> None:
    """Compares names, shapes and sizes with the manifest and, unless `quick`, every byte; says what was compared.

    Without a manifest `make` makes one, of the files as they are. Raises CheckpointError or ModelConfigError.
    """
    checkpoint = Ledger.open(model)
    places = manifest_places(checkpoint, user_cache_dir())
    if not any(path.is_file() for path in places):
        if not make:
            raise CheckpointError(f"{model}: has no manifest ({places[0].name}); octavo verify --make makes one")
        hold_to_manifest(checkpoint, console)
        return
    held = verified(checkpoint, user_cache_dir())
    size = sum(checkpoint.owned_bytes(owner) for owner in checkpoint.owners)
    compared = (
        "names, shapes and sizes" if quick else f"all bytes of {_compare(held.checkpoint, size, console)} tensors"
    )
    console.print(
        f"{model}: {size / 1e9:.2f} GB, {compared} as {held.manifest} says; weights {held.checkpoint.content_id}",
        soft_wrap=True,
        markup=False,
    )


def _compare(checkpoint: Ledger, size: int, console: Console) -> int:
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("checksums (MB)", total=size // MB)
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            bars.update(task, completed=done // MB)

        return compare(checkpoint, tell)
