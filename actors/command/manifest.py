"""Holds a checkpoint to its manifest, and says so on the console where that takes a while or cannot be kept."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from actors.command.bars import MB
from actors.command.cache_dir import user_cache_dir
from model.storage.integrity import manifest_places, verified
from model.storage.ledger import Ledger


def hold_to_manifest(checkpoint: Ledger, console: Console) -> Ledger:
    """The checkpoint with the checksums of its manifest, which is made if there is none. Raises CheckpointError."""
    own_dir = user_cache_dir()
    if any(path.is_file() for path in manifest_places(checkpoint, own_dir)):
        return verified(checkpoint, own_dir).checkpoint
    total = sum(checkpoint.owned_bytes(owner) for owner in checkpoint.owners)
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("checksums (MB)", total=total // MB)
        done = 0

        def tell(count: int) -> None:
            nonlocal done
            done += count
            bars.update(task, completed=done // MB)

        result = verified(checkpoint, own_dir, tell)
    where = "kept nowhere, for want of a place to write" if result.manifest is None else f"in {result.manifest}"
    console.print(f"checksums of {total / 1e9:.2f} GB of weights, made for the first time, {where}", soft_wrap=True)
    return result.checkpoint
