"""The dashboard's snapshot as one frame of a terminal: exactly as large as the terminal is, from 40 columns on.

An expert is a line, layers run to the right: a block for each says how far the expert's load is from an even share, by
its shape as much as by its colour. A pure function; the terminal is `actors.command.top`'s.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from actors.supervision.status import size

Snapshot = Mapping[str, Any]

BLOCKS = ("·", "░", "▒", "▓", "█")
"""Much less than an even share, less, about even, more, much more."""
STYLES = ("blue", "cyan", "bright_black", "yellow", "bold red")
EIGHTHS = "▁▂▃▄▅▆▇█"
NO_LOAD = " "
LEAST_COLUMNS = 40
_CONTROLS = dict.fromkeys((*range(32), *range(127, 160)), " ")  # what comes from elsewhere must not steer a terminal
RIGHT_COLUMNS = 24
NONE = "–"

STATES = {"ready": "green", "degraded": "yellow", "draining": "yellow", "unknown": "yellow", "starting": "yellow"}


def frame(snapshot: Snapshot, columns: int, lines: int, *, age_s: float = 0.0, note: str = "") -> Text:
    """At most `lines` lines of at most `columns` characters. `age_s` is how long ago the snapshot was got, `note` what
    is wrong with getting the next one."""
    columns = max(LEAST_COLUMNS, columns)
    rows = [_title(snapshot, age_s, note), *_figures(snapshot, columns)]
    rest = [*_coordinators(snapshot), *_troubles(snapshot), *_moves(snapshot)]
    room = max(4, lines - len(rows) - min(len(rest), max(3, lines // 4)))
    rows += _heat(snapshot, columns, room)
    rows += rest[: max(0, lines - len(rows))]
    events = [Text(event, "bright_black") for event in reversed(snapshot["events"])]
    rows += events[: max(0, lines - len(rows))]
    return Text("\n").join(_cut(row, columns) for row in rows[:lines])


def step_of(tokens: int, even: float) -> int:
    """0 to 4, a place in BLOCKS: by how much `tokens` differ from an even share, in powers of two."""
    if tokens <= 0:
        return 0
    return max(0, min(4, 2 + round(math.log2(tokens / even))))


def _title(snapshot: Snapshot, age_s: float, note: str) -> Text:
    cluster = snapshot["cluster"]
    text = Text.assemble(("octavo ", "bold"), cluster["model"] or NONE, "  ")
    text.append(cluster["state"], STATES.get(cluster["state"], "red"))
    text.append(f"  epoch {NONE if cluster['map_epoch'] is None else cluster['map_epoch']}")
    if cluster["uptime_s"] is not None:
        text.append(f"  up {_duration(cluster['uptime_s'])}")
    age_s += max(cluster["age_s"] or 0.0, cluster["coordinators_age_s"])
    text.append(f"  {age_s:.0f} s old", "bold red" if age_s >= 5 else "bright_black")
    return text.append(f"  {note}" if note else "", "bold red")


def _figures(snapshot: Snapshot, columns: int) -> list[Text]:
    """One line, or two where it is narrow."""
    totals, front = snapshot["totals"], snapshot["front"]
    used = totals["kv_used"] / totals["kv_total"] if totals["kv_total"] else None
    waiting = f"{totals['num_waiting']} waiting" + (f" {totals['queue_s']:.1f} s" if totals["num_waiting"] else "")
    parts = [
        f"{_rate(totals['generated_tokens_per_s'])} tok/s",
        f"prompt {_rate(totals['prompt_tokens_per_s'])}",
        f"{totals['num_running']} running",
        waiting,
        f"KV {_percent(used)}",
    ]
    if front is not None:
        parts += [
            f"{name.upper()} {_latency(front[name]['p50_s'])}/{_latency(front[name]['p99_s'])}"
            for name in ("ttft", "itl")
        ]
    found: list[str] = []
    for part in parts:
        if found and len(found[-1]) + 2 + len(part) <= columns:
            found[-1] += f"  {part}"
        else:
            found.append(part)
    return [Text(line) for line in found]


def _heat(snapshot: Snapshot, columns: int, room: int) -> list[Text]:
    """A header, a line by expert, the layers' balancedness; the hottest experts where there is not room for all."""
    load = snapshot["load"]
    copies = {one["expert_id"]: one for one in snapshot["copies"]}
    if not load["tokens"]:
        lacking = [one for one in copies.values() if one["ready"] < one["wanted"]]
        text = "no coordinator has told its load yet" if not load["num_layers"] else "too many cells to draw"
        return [Text(text, "bright_black"), *(Text(_copies(one), "bold red") for one in lacking)][:room]
    groups = _groups(load["num_layers"], columns - RIGHT_COLUMNS)
    wide = 2 if 2 * len(groups) <= columns - RIGHT_COLUMNS else 1
    sums_E = [sum(row[expert] for row in load["tokens"]) for expert in range(load["num_experts"])]
    hottest = sorted(range(len(sums_E)), key=lambda expert: (-sums_E[expert], expert))
    fit = len(sums_E) if len(sums_E) <= room - 2 else max(1, room - 3)
    shown = sorted(hottest[:fit])
    pad = max(0, wide * len(groups) - len("layers 0-000"))
    head = f"layers 0-{load['num_layers'] - 1}"
    rows = [Text(f"expert {head.ljust(pad + len('layers 0-000'))}  share copies  busy", "bright_black")]
    busy = _busy(snapshot)
    rows += [_expert(load, expert, groups, wide, sums_E, copies.get(expert), busy.get(expert)) for expert in shown]
    if fit < len(sums_E):
        rows.append(Text(f"       {len(sums_E) - fit} experts with less load are not shown", "bright_black"))
    even = [min(load["balancedness"][layer] for layer in group) for group in groups]
    bars = "".join(EIGHTHS[min(7, int(value * 8))] * wide for value in even)
    mean = load["mean_balancedness"]
    rows.append(Text.assemble(("  even ", "bright_black"), bars, (f"  balancedness {mean:.2f}", "bright_black")))
    return rows


def _expert(
    load: Mapping[str, Any],
    expert: int,
    groups: Sequence[range],
    wide: int,
    sums_E: Sequence[int],
    copies: Mapping[str, Any] | None,
    busy: float | None,
) -> Text:
    row = Text(f"{expert:>6} ")
    for group in groups:
        steps = [
            step_of(load["tokens"][layer][expert], sum(load["tokens"][layer]) / len(sums_E))
            for layer in group
            if sum(load["tokens"][layer])
        ]
        if steps:
            step = max(steps)
            row.append(BLOCKS[step] * wide, STYLES[step])
        else:
            row.append(NO_LOAD * wide)
    row.pad_right(max(0, len("expert layers 0-000") - len(row)))
    total = sum(sums_E)
    row.append(f" {_percent(sums_E[expert] / total if total else None):>6}")
    if copies is not None:
        lacks = copies["ready"] < copies["wanted"]
        row.append(f" {copies['ready']:>3}/{copies['wanted']:<2}", "bold red" if lacks else "")
    row.append(f" {_percent(busy):>5}")
    return row


def _groups(num_layers: int, room: int) -> list[range]:
    """Layers that share a character: one each where there is room."""
    per = -(-num_layers // max(1, room))
    return [range(first, min(num_layers, first + per)) for first in range(0, num_layers, per)]


def _busy(snapshot: Snapshot) -> dict[int, float]:
    """The busiest replica of each expert."""
    busy: dict[int, float] = {}
    for one in snapshot["replicas"]:
        for expert in one["expert_ids"] if one["busy_share"] is not None else ():
            busy[expert] = max(busy.get(expert, 0.0), one["busy_share"])
    return busy


def _coordinators(snapshot: Snapshot) -> list[Text]:
    rows = []
    for one in snapshot["coordinators"]:
        row = Text.assemble(f"{one['coordinator_id']} ", (one["state"], STATES.get(one["state"], "red")))
        used = one["kv_used"] / one["kv_total"] if one["kv_total"] else None
        row.append(f"  {one['num_running']} running, {one['num_waiting']} waiting  KV {_percent(used)}")
        row.append(f"  {_rate(one['generated_tokens_per_s'])} tok/s  {one['preemptions_total']} preempted")
        rows.append(row.append(f"  {one['detail']}" if one["detail"] else "", "yellow"))
    return rows


def _troubles(snapshot: Snapshot) -> list[Text]:
    """Replicas by state in one line, then each that is not well."""
    states: dict[str, int] = {}
    for one in snapshot["replicas"]:
        states[one["state"]] = states.get(one["state"], 0) + 1
    rows = [Text("replicas: " + (", ".join(f"{number} {state}" for state, number in states.items()) or "none"))]
    for one in snapshot["replicas"]:
        if one["state"] != "ready" or one["standing"] not in (None, "healthy"):
            state = one["state"] if one["state"] != "ready" else one["standing"]
            why = "; ".join(one["reasons"])
            rows.append(Text.assemble(f"  {one['replica_id']} ", (state, "bold red"), f" {_weights(one)} {why}"))
    return rows


def _weights(one: Mapping[str, Any]) -> str:
    if one["state"] == "loading" and one["weight_bytes"]:
        return f"{_percent(one['loaded_bytes'] / one['weight_bytes'])} of {size(one['weight_bytes'])}"
    return str(one["node"][:8])


def _moves(snapshot: Snapshot) -> list[Text]:
    balance = snapshot["balance"]
    if balance["mode"] == "off" and not balance["moves_total"]:
        return []
    loaded = f"{balance['moves_total']} moves, {size(balance['moved_bytes_total'])} loaded"
    rows = [Text(f"balancing {balance['mode'].replace('_', ' ')}, {balance['policy']}: {loaded}")]
    told = [(name, move) for name in ("failed", "done", "proposed") for move in balance[name][-3:]]
    for name, move in sorted(told, key=lambda one: one[1]["at"], reverse=True)[:3]:
        where = f" {move['node_id'][:8]}" if move["node_id"] else ""
        cost = f", {size(move['num_bytes'])}" if move["num_bytes"] else ""
        rows.append(Text(f"  {name}: {move['kind'].replace('_', ' ')} {move['what']}{where}{cost}: {move['reason']}"))
    return rows


def _copies(one: Mapping[str, Any]) -> str:
    return f"expert {one['expert_id']} has {one['ready']} of {one['wanted']} copies"


def _cut(row: Text, columns: int) -> Text:
    row = row.copy()
    row.plain = row.plain.translate(_CONTROLS)
    row.truncate(columns, overflow="ellipsis")
    return row


def _rate(value: float | None) -> str:
    return NONE if value is None else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _percent(share: float | None) -> str:
    return NONE if share is None else f"{share * 100:.0f} %"


def _latency(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
