"""How progress looks at the terminal, where it is counted."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

MB = 1_000_000


def bars_with_counts(console: Console) -> Progress:
    """A bar for each task, with what is done of how much, and the time it took."""
    return Progress(
        TextColumn("  {task.description:<16}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
