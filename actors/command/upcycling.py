"""Makes a mixture of experts of a dense model while the terminal shows how far it is."""

from pathlib import Path

from rich.console import Console
from rich.progress import TaskID

from actors.command.bars import MB, bars_with_counts
from model.storage.stored_dtype import StoredDtype
from model.storage.torch_dtypes import to_torch
from model.upcycling.upcycle import upcycle
from model.upcycling.upcycle_report import UpcycleReport


def upcycle_with_progress(
    source: Path,
    dest: Path,
    *,
    num_experts: int,
    top_k: int,
    seed: int,
    console: Console,
    dtype: StoredDtype | None = None,
) -> UpcycleReport:
    """`model.upcycling.upcycle.upcycle` with bars on the console, and its report below them."""
    with bars_with_counts(console) as bars:
        tasks: dict[str, TaskID] = {}

        def tell(what: str, done: int, total: int) -> None:
            unit = MB if what == "weights" else 1
            if what not in tasks:
                tasks[what] = bars.add_task(f"{what} ({'MB' if unit == MB else 'layers'})", total=total // unit)
            bars.update(tasks[what], completed=done // unit)

        wanted = None if dtype is None else to_torch(dtype)
        report = upcycle(source, dest, num_experts=num_experts, top_k=top_k, dtype=wanted, seed=seed, progress=tell)
    for line in report.lines():
        console.print(f"  {line}", soft_wrap=True)
    return report
