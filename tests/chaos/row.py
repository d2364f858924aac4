"""The chaos suite's interface: what a row of the table is, and what it may use. Read this before writing one.

    python -m tests.chaos --list
    python -m tests.chaos --rows F1,F3 --seed 0 --model tiny --repeats 4 --json-out chaos.jsonl
    make chaos ARGS="--rows F1"

A row is a file `tests/chaos/rows/NAME.py`; every file there is imported, so two people never edit the same one:

    @row(
        "F3",
        fault="SIGSTOP a replica, SIGCONT 20 s later",
        promise="hedged, ejected, re-admitted",
        bar=Bar(text="gap <= 0.5 s above normal", stall_ms=500),
        needs=Served(("--replicas", "2")),
        repeats=2,
    )
    async def a_frozen_replica(ctx: Context) -> None:
        for _ in ctx.trials():                                  # --repeats, else the row's own number
            await ctx.trial(freeze_one)

    async def freeze_one(live: Live) -> None:
        victim = await in_use(live.cluster, live.rng.randrange(8))   # not its twin, which may have nothing to do
        live.begins()
        with faults.frozen(victim.pid):
            await asyncio.sleep(20)

- `needs` is a frozen value with `open(model, home)`, an async context manager that gives a `Cluster`
  (`tests.chaos.clusters`). `Served(options)` is `octavo serve MODEL OPTIONS` on Ray, `Plain(...)` real expert and
  coordinator processes without Ray and with a fault proxy before every replica (`tests.chaos.plain`). Rows with equal
  needs share one running cluster. A new kind of cluster (two nodes, another head) is a new such class.
- `ctx.trial(inject, load=..., idle=...)` waits until the cluster is whole, makes sure that the very same requests were
  answered without a fault (the golden run, once per cluster and load), plays them again, calls `inject(live)` in the
  middle, waits until the cluster is whole and as fast as before, and compares every token. It appends a
  `figures.Trial` and returns it. `idle=True` injects before the first request. `live.begins()` and `live.over()` say
  when the fault does so, else it is when `inject` is called and when it returns. `live` also has `cluster`, `rng` and
  `player` (`burst`, `until_flowing`). `waits_whole=False`: recovered is when tokens come as fast as before.
- A row without streams says what it found with `ctx.count(failed=..., wrong_tokens=..., stall_ms=..., recover_s=...)`.
- `ctx.require(holds, "what")` makes the row not hold when it is false, and puts the words into its note; `ctx.note`
  only the words. Nothing may raise for a promise that is broken: the table is to say by how much.
- What a row starts, stops or freezes it puts right again (`faults` has context managers). A cluster that is not whole
  in time is thrown away, the row ends there and does not hold.
- `ctx.cluster` has `url`, `model_id`, `replicas()`, `coordinators()`, `counters()`, `wait_whole()`;
  `Served`'s also has `processes("ray::ServeController")`, `status()`, `info(coordinator_id)` and `served`.

Held means: nothing failed, no wrong token, every limit of `bar` kept, every `require` true.
"""

import importlib
import pkgutil
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tests.chaos.clusters import Cluster
from tests.chaos.figures import Bar

if TYPE_CHECKING:
    from tests.chaos.context import Context

Run = Callable[["Context"], Awaitable[None]]

ROWS_DIR = Path(__file__).with_name("rows")
ROW_LIMIT_S = 1800.0


class Needs(Protocol):
    """What a row needs to run on. Equal values share a running cluster: make it a frozen dataclass."""

    def open(self, model: Path, home: Path) -> AbstractAsyncContextManager[Cluster]:
        """A cluster for the checkpoint in `model`, ready; `home` is an empty directory of its own."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. `repeats` is how many trials it makes by itself, `limit_s` bounds it all."""

    id: str
    fault: str
    promise: str
    bar: Bar
    needs: Needs
    run: Run
    repeats: int = 1
    limit_s: float = ROW_LIMIT_S


_ROWS: dict[str, Row] = {}


def row(
    row_id: str,
    *,
    fault: str,
    promise: str,
    bar: Bar,
    needs: Needs,
    repeats: int = 1,
    limit_s: float = ROW_LIMIT_S,
) -> Callable[[Run], Run]:
    """Registers the function as the row's `run`. Raises ValueError for an id that is taken."""

    def add(run: Run) -> Run:
        if row_id in _ROWS and _ROWS[row_id].run.__module__ != run.__module__:
            raise ValueError(f"there are two rows {row_id}: {_ROWS[row_id].run.__module__} and {run.__module__}")
        _ROWS[row_id] = Row(
            id=row_id, fault=fault, promise=promise, bar=bar, needs=needs, run=run, repeats=repeats, limit_s=limit_s
        )
        return run

    return add


def all_rows() -> dict[str, Row]:
    """Every row by id, in the table's order: letter, then number."""
    for module in pkgutil.iter_modules([str(ROWS_DIR)]):
        importlib.import_module(f"tests.chaos.rows.{module.name}")
    return dict(sorted(_ROWS.items(), key=lambda item: _place(item[0])))


def choose(ids: str) -> list[Row]:
    """The rows named in `F1,F3`; all without a name. Raises ValueError naming one that is not there."""
    known = all_rows()
    wanted = [name.strip() for name in ids.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)}; there are {', '.join(known)}")
    return [known[name] for name in wanted] if wanted else list(known.values())


def by_needs(rows: list[Row]) -> list[Row]:
    """The same rows, those that can share a cluster side by side, else in the order given."""
    order: list[Needs] = []
    for one in rows:
        if one.needs not in order:
            order.append(one.needs)
    return sorted(rows, key=lambda one: order.index(one.needs))


def _place(row_id: str) -> tuple[str, int, str]:
    digits = "".join(filter(str.isdigit, row_id))
    return row_id.rstrip("0123456789"), int(digits or 0), row_id
