"""What simulations came to: one JSON value, one table for the terminal, one HTML page that needs nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import Any

import numpy as np

from cluster.policy import Action
from cluster.simulate import SimulationResult
from experiments.simulation.charts import NUM_COLOURS, Bars, Series, bar_chart, line_chart, number

PERCENTILES = (50, 90, 99)
MAX_REASONS = 200
_ROWS = (
    ("completed", "requests answered", 0),
    ("unfinished", "left unfinished", 0),
    ("duration_s", "virtual time, s", 0),
    ("output_throughput", "tokens a second", 1),
    ("host_hours", "host-hours", 2),
    ("mean_hosts", "hosts, mean", 2),
    ("balancedness", "balancedness, mean", 3),
    ("critical_share", "waiting for experts, share of time", 3),
    ("copies_moved", "copies loaded", 0),
    ("moved_gb", "GB moved", 2),
    ("p50_ttft_s", "TTFT p50, s", 3),
    ("p99_ttft_s", "TTFT p99, s", 3),
    ("p50_tpot_s", "TPOT p50, s", 4),
    ("p99_tpot_s", "TPOT p99, s", 4),
    ("p50_e2el_s", "E2EL p50, s", 2),
    ("p99_e2el_s", "E2EL p99, s", 2),
)
_STYLE = """
:root{color-scheme:light dark;--page:#fcfcfb;--ink:#1d1d1b;--soft:#63635e;--grid:#e4e4e0;--axis:#a3a39c;--card:#fff;
--c0:#2a6fc9;--c1:#d2541f;--c2:#1a8265;--c3:#8451c4;--c4:#a87a0c;--c5:#c2367f}
@media (prefers-color-scheme:dark){:root{--page:#161615;--ink:#ecece8;--soft:#a5a59e;--grid:#33332f;--axis:#6c6c65;
--card:#1e1e1c;--c0:#6ea8ef;--c1:#f0895a;--c2:#4fc0a0;--c3:#b493ea;--c4:#d8b04c;--c5:#ee86b7}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1360px;padding:28px 20px 60px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
h1{font-size:24px;margin:0 0 4px}h2{font-size:17px;margin:34px 0 10px}p{margin:4px 0;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(480px,100%),1fr));gap:16px}
figure{margin:0;padding:12px 14px;background:var(--card);border:1px solid var(--grid);border-radius:8px}
figcaption{display:flex;flex-wrap:wrap;gap:2px 16px;justify-content:space-between;margin-bottom:6px}
.keys{display:flex;flex-wrap:wrap;gap:2px 14px;color:var(--soft);font-size:13px}
.key i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px;background:currentColor}
svg{display:block;width:100%;height:auto}
.tick,.value{font-size:11px;fill:var(--soft)}.value{fill:var(--ink)}
.grid{stroke:var(--grid)}.axis{stroke:var(--axis)}
.line{fill:none;stroke:currentColor;stroke-width:1.8;stroke-linejoin:round}.bar{fill:currentColor}
.table{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:4px 16px 4px 0;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left;font-weight:400;color:var(--soft)}
@media (max-width:640px){body{padding:18px 12px 40px}figure{overflow-x:auto}svg{min-width:580px}
figcaption{position:sticky;left:0}th,td{padding-right:10px}td:first-child{white-space:normal;min-width:120px}
th:first-child,td:first-child{position:sticky;left:0;background:var(--page)}}
details{margin:8px 0}summary{cursor:pointer}li{color:var(--soft);margin:3px 0}li b{color:var(--ink);font-weight:600}
""" + "".join(f".c{i}{{color:var(--c{i})}}" for i in range(NUM_COLOURS))


def summary(result: SimulationResult) -> dict[str, Any]:
    """The figures of one simulation; latencies are of finished requests, None where none has finished."""
    line = result.timeline
    hours = result.host_seconds / 3600
    busy = [b for b, tokens in zip(line.balancedness, line.tokens, strict=True) if tokens]
    figures: dict[str, Any] = {
        "completed": len(result.e2el_s),
        "unfinished": result.num_unfinished,
        "duration_s": result.duration_s,
        "num_steps": result.num_steps,
        "output_throughput": result.num_tokens / max(result.duration_s, 1e-9),
        "host_hours": hours,
        "host_seconds": result.host_seconds,
        "mean_hosts": result.host_seconds / max(result.duration_s, 1e-9),
        "balancedness": float(np.mean(busy)) if busy else None,
        "critical_share": float(np.mean(line.critical_share)) if line.critical_share else None,
        "copies_moved": result.num_copies,
        "moved_gb": result.moved_bytes / 1e9,
    }
    for name in ("ttft_s", "tpot_s", "e2el_s"):
        values = getattr(result, name)
        for p in PERCENTILES:
            figures[f"p{p}_{name}"] = float(np.percentile(values, p)) if len(values) else None
    return figures


def report_json(settings: Mapping[str, Any], results: Mapping[str, SimulationResult]) -> str:
    """Settings, and for each policy its figures, timeline and actions with their reasons."""
    value = {
        "settings": dict(settings),
        "policies": {
            name: {
                "summary": summary(result),
                "timeline": asdict(result.timeline),
                "actions": [
                    {"at_s": at.at_s, "kind": type(at.action).__name__, **_plain(at.action)} for at in result.log
                ],
            }
            for name, result in results.items()
        },
    }
    return json.dumps(value, allow_nan=False, indent=1)


def table(results: Mapping[str, SimulationResult]) -> str:
    """Policy against policy, for a terminal."""
    summaries = {name: summary(result) for name, result in results.items()}
    wide = max(len(name) for name in summaries) + 2
    lines = [f"{'':36}" + "".join(f"{name:>{max(wide, 12)}}" for name in summaries)]
    for key, label, digits in _ROWS:
        cells = "".join(f"{_cell(s[key], digits):>{max(wide, 12)}}" for s in summaries.values())
        lines.append(f"{label:36}{cells}")
    return "\n".join(lines)


def report_html(title: str, settings: Mapping[str, Any], results: Mapping[str, SimulationResult]) -> str:
    """The page: figures, charts, and why each move was made."""
    names = list(results)
    charts = "".join(_timelines(results) + _bars(names, [summary(r) for r in results.values()]))
    told = " · ".join(f"{escape(str(key).replace('_', ' '))} {escape(str(value))}" for key, value in settings.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1><p>{told}</p>"
        f"<h2>Policy against policy</h2>{_html_table(results)}<h2>Charts</h2>"
        f'<div class="charts">{charts}</div><h2>Why</h2>{"".join(_reasons(n, r) for n, r in results.items())}'
        "</body></html>\n"
    )


def _timelines(results: Mapping[str, SimulationResult]) -> list[str]:
    def lines(field: str, scale: float = 1.0) -> list[Series]:
        return [
            Series(name, r.timeline.at_s, [scale * y for y in getattr(r.timeline, field)])
            for name, r in results.items()
        ]

    return [
        line_chart("Imbalance: balancedness of hosts, mean of layers", "mean ÷ max", lines("balancedness")),
        line_chart("Hosts paid for", "hosts", lines("hosts"), steps=True),
        line_chart("Tokens served", "tokens a window", lines("tokens")),
        line_chart("Time that steps wait for experts", "share of time", lines("critical_share")),
        line_chart("Moved since the start", "GB", lines("moved_bytes", 1e-9), steps=True),
        line_chart("Wait of the oldest request that has not begun", "s", lines("queue_s")),
    ]


def _bars(names: Sequence[str], summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    def percentiles(key: str) -> list[Bars]:
        return [Bars(f"p{p}", [s[f"p{p}_{key}"] or 0.0 for s in summaries]) for p in PERCENTILES]

    return [
        bar_chart("Host-hours", "hours", names, [Bars("", [s["host_hours"] for s in summaries])]),
        bar_chart("Moved", "GB", names, [Bars("", [s["moved_gb"] for s in summaries])]),
        bar_chart("Time to first token", "s", names, percentiles("ttft_s")),
        bar_chart("Time per output token after the first", "s", names, percentiles("tpot_s")),
        bar_chart("End-to-end latency", "s", names, percentiles("e2el_s")),
    ]


def _html_table(results: Mapping[str, SimulationResult]) -> str:
    summaries = {name: summary(result) for name, result in results.items()}
    head = "".join(f"<th>{escape(name)}</th>" for name in summaries)
    rows = "".join(
        f"<tr><td>{escape(label)}</td>{''.join(f'<td>{_cell(s[key], digits)}</td>' for s in summaries.values())}</tr>"
        for key, label, digits in _ROWS
    )
    return f'<div class="table"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def _reasons(name: str, result: SimulationResult) -> str:
    items = "".join(
        f"<li><b>{number(at.at_s)} s</b> {escape(_told(at.action))}</li>" for at in result.log[:MAX_REASONS]
    )
    more = f", the first {MAX_REASONS}" if len(result.log) > MAX_REASONS else ""
    return f"<details><summary>{escape(name)}: {len(result.log)} actions{more}</summary><ul>{items}</ul></details>"


def _told(action: Action) -> str:
    plain = _plain(action)
    what = type(action).__name__
    where = f" on {plain['node_id']}" if "node_id" in plain else ""
    num = f" {plain['num']}" if "num" in plain else ""
    return f"{what}{num}{where}: {plain['reason']}"


def _plain(action: Action) -> dict[str, Any]:
    return asdict(action)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"
