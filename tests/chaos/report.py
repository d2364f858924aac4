"""How the suite's findings are said: one JSON line a row for machines, a table for people."""

import dataclasses
import json
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from tests.chaos.figures import Finding
from tests.chaos.row import Row


def json_line(finding: Finding) -> str:
    """The finding as one line of JSON; keys are an interface."""
    return json.dumps(dataclasses.asdict(finding))


def show(console: Console, rows: Sequence[Row], findings: Sequence[Finding]) -> None:
    """The table of what was promised and what came of it."""
    faults = {one.id: one.fault for one in rows}
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("id", "fault", "n", "failed", "wrong", "stall p50/p99 ms", "recover s", "extra %", "bar", "held"):
        table.add_column(column, overflow="fold")
    for one in findings:
        table.add_row(
            one.id,
            faults[one.id],
            str(one.repeats),
            str(one.failed),
            str(one.wrong_tokens),
            f"{_shown(one.stall_p50_ms)} / {_shown(one.stall_p99_ms)}",
            _shown(one.recover_s),
            _shown(one.extra_calls_pct),
            one.bar,
            "[green]yes[/green]" if one.held else "[red]no[/red]",
        )
    console.print(table)
    for one in findings:
        if one.note:
            console.print(f"{one.id}: {one.note}", markup=False, soft_wrap=True)


def show_rows(console: Console, rows: Sequence[Row]) -> None:
    """What there is to run."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("id", "fault", "promise", "bar", "trials", "needs"):
        table.add_column(column, overflow="fold")
    for one in rows:
        table.add_row(one.id, one.fault, one.promise, one.bar.text, str(one.repeats), str(one.needs))
    console.print(table)


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
