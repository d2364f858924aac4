"""How a run is said: JSON lines for programs, tables for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.budget import gigabytes
from experiments.engine_bench.shares import PHASES, StepShares
from experiments.engine_bench.summary import CellSummary, ContestantSummary, Ratio, Spread

_BESIDE = ("experts' CPU ms", "coordinator's CPU ms", "KiB/token", "messages/token")


class JsonLines:
    """One object a line, on `out` and into a file too where one is named. Written at once: a long run is watched."""

    def __init__(self, out: TextIO, path: Path | None = None) -> None:
        """Raises OSError where the file cannot be written."""
        self._outs: list[IO[str]] = [out]
        if path is not None:
            self._outs.append(path.open("w", encoding="utf-8"))

    def write(self, line: Mapping[str, Any]) -> None:
        """Floats are kept to six digits."""
        text = json.dumps(_rounded(line))
        for out in self._outs:
            out.write(text + "\n")
            out.flush()

    def close(self) -> None:
        """Closes the file; `out` is the caller's."""
        for out in self._outs[1:]:
            out.close()


def show(summaries: Sequence[CellSummary], console: Console) -> None:
    """All tables: speeds with ratios, step shares, memory."""
    for table in (speeds(summaries), step_table(summaries, "prefill"), step_table(summaries, "decode")):
        console.print(table)
        console.print()
    for line in (*memory_lines(summaries), *warnings(summaries)):
        console.print(line, soft_wrap=True, markup=False)


def speeds(summaries: Sequence[CellSummary]) -> Table:
    """A row per cell and contestant: median tok/s with its spread, and the ratios to all that it is compared with."""
    targets = list(dict.fromkeys(ratio.to for summary in summaries for ratio in summary.ratios))
    table = _table("tok/s, median \\[min .. max]; ratios are medians within repeats", "batch", "contestant")
    for phase in ("prefill", "decode"):
        table.add_column(phase, justify="right", no_wrap=True)
        for target in targets:
            table.add_column(escape(f"/ {target}"), justify="right", no_wrap=True)
    table.add_column("same tokens", justify="right", no_wrap=True)
    if any(one.kernel_share for summary in summaries for one in summary.contestants):
        table.add_column("of kernel", justify="right", no_wrap=True)
        table.add_column("in CPU time", justify="right", no_wrap=True)
    for summary in summaries:
        for one in summary.contestants:
            ratios = {ratio.to: ratio for ratio in summary.ratios if ratio.of == one.name}
            cells = [str(summary.cell.batch), escape(one.name), _spread(one.prefill_tok_s)]
            cells += [_times(ratios, target, "prefill") for target in targets]
            cells += [_spread(one.decode_tok_s), *(_times(ratios, target, "decode") for target in targets)]
            cells += [_same(list(ratios.values())), *_of_kernel(one)]
            table.add_row(*cells)
    return table


def step_table(summaries: Sequence[CellSummary], phase: str) -> Table:
    """Where our steps spend their time, in percent, and what they send."""
    table = _table(f"{phase}: shares of a step, %", "batch", "contestant", "step ms")
    for name in (*PHASES, *_BESIDE):
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for summary in summaries:
        for one in summary.contestants:
            step: StepShares | None = getattr(one, f"{phase}_step")
            if step is None:
                continue
            shares = [f"{100 * step.shares[name]:.0f}" for name in PHASES]
            beside = [step.expert_cpu_ms, step.coordinator_cpu_ms, step.bytes_per_token / 1024, step.messages_per_token]
            row = [str(summary.cell.batch), escape(one.name), f"{step.step_ms:.1f}", *shares]
            table.add_row(*row, *(f"{value:.1f}" for value in beside))
    return table


def memory_lines(summaries: Sequence[CellSummary]) -> list[str]:
    """The most that each contestant held in any cell, against the bar where there is one."""
    most: dict[str, Mapping[str, Any]] = {}
    for summary in summaries:
        for one in summary.contestants:
            if one.memory and one.memory.get("pss_bytes", 0) >= most.get(one.name, {}).get("pss_bytes", 0):
                most[one.name] = one.memory
    return [f"memory of {name}: {_memory(held)}" for name, held in most.items()]


def warnings(summaries: Sequence[CellSummary]) -> list[str]:
    """Who computes something else, and so is nobody to compare with."""
    return [
        f"warning: at batch {summary.cell.batch}, {ratio.of} and {ratio.to} agree on only "
        f"{ratio.agreement.first_tokens} of {ratio.agreement.sequences} first tokens: not the same model"
        for summary in summaries
        for ratio in summary.ratios
        if not ratio.agreement.is_same_model
    ]


def _memory(held: Mapping[str, Any]) -> str:
    text = f"{gigabytes(held['pss_bytes'])} in {held['num_processes']} processes"
    if "bar_bytes" not in held:
        return text
    verdict = "within" if held["within_bar"] else "over"
    return f"{text}, {verdict} the bar of {gigabytes(held['bar_bytes'])} (weights {gigabytes(held['weight_bytes'])})"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def _spread(value: Spread) -> str:
    digits = 1 if value.median < 100 else 0
    return f"{value.median:.{digits}f} \\[{value.min:.{digits}f} .. {value.max:.{digits}f}]"


def _times(ratios: Mapping[str, Ratio], target: str, phase: str) -> str:
    return f"{getattr(ratios[target], phase).median:.2f}x" if target in ratios else ""


def _same(ratios: Sequence[Ratio]) -> str:
    """Equal sequences, of all repeats, with each contestant compared with."""
    return ", ".join(f"{one.agreement.equal_sequences}/{one.agreement.sequences}" for one in ratios)


def _of_kernel(one: ContestantSummary) -> list[str]:
    return [f"{100 * share.median:.0f} %" for share in (one.kernel_share, one.kernel_cpu_share) if share is not None]


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {str(key): _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return value
