"""Runs rows one after the other, each on the cluster it needs; rows with the same needs share one."""

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.chaos.asks import Load
from tests.chaos.clusters import Cluster, NotWhole
from tests.chaos.context import GOLDEN_S, Context, Golden
from tests.chaos.figures import Finding, conclude
from tests.chaos.models import ChaosModel
from tests.chaos.player import GoldenFailed
from tests.chaos.row import Needs, Row, by_needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """`repeats` None leaves it to each row; `soak_s` is how long the soak lasts. `home` is for clusters' files."""

    model: ChaosModel
    home: Path
    seed: int = 0
    repeats: int | None = None
    streams: int | None = None
    soak_s: float = 600.0
    golden_s: float = GOLDEN_S


@dataclass(slots=True)
class Session:
    """Use it from one event loop, in the main thread, and close it."""

    settings: Settings
    say: Callable[[str], None]
    _needs: Needs | None = None
    _cluster: Cluster | None = None
    _goldens: dict[Load, Golden] = field(default_factory=dict)
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)
    _homes: "itertools.count[int]" = field(default_factory=itertools.count)

    async def run(self, rows: Sequence[Row], found: Callable[[Finding], None]) -> list[Finding]:
        """All rows, those that share a cluster side by side; `found` hears of each as it is done."""
        findings = []
        for one in by_needs(list(rows)):
            findings.append(await self.run_row(one))
            found(findings[-1])
        return findings

    async def run_row(self, row: Row) -> Finding:
        """One row to its finding. What makes it impossible to go on ends it, and is in its note."""
        broken: list[str] = []
        context: Context | None = None
        began_s = time.monotonic()
        self.say(f"{row.id}: {row.fault}")
        try:
            context = await self._context(row)
            async with asyncio.timeout(row.limit_s):
                await row.run(context)
        except TimeoutError as error:
            broken.append(str(error) or f"not done within {row.limit_s:g} s")
        except (NotWhole, GoldenFailed, AssertionError) as error:
            broken.append(str(error).splitlines()[0])
        except Exception as error:  # noqa: BLE001 - one row that cannot be run must not hide the others
            broken.append(f"{type(error).__name__}: {error}")
        if broken:
            await self.close()
        trials, more, notes = ((), [], []) if context is None else (context.done, context.broken, context.notes)
        finding = conclude(row.id, row.bar, trials, [*more, *broken], notes)
        self.say(f"{row.id}: {'held' if finding.held else 'NOT held'} after {time.monotonic() - began_s:.0f} s")
        return finding

    async def close(self) -> None:
        """Stops the cluster that is running, if there is one."""
        stack, self._stack = self._stack, AsyncExitStack()
        self._needs = self._cluster = None
        self._goldens = {}
        await stack.aclose()

    async def _context(self, row: Row) -> Context:
        settings = self.settings
        cluster = await self._open(row.needs)
        load = replace(settings.model.load, seed=settings.seed)
        if settings.streams is not None:
            load = replace(load, streams=settings.streams)
        return Context(
            row_id=row.id,
            cluster=cluster,
            seed=settings.seed,
            repeats=settings.repeats or row.repeats,
            load=load,
            goldens=self._goldens,
            say=lambda text: self.say(f"  {text}"),
            soak_s=settings.soak_s,
            golden_s=settings.golden_s,
        )

    async def _open(self, needs: Needs) -> Cluster:
        if self._cluster is not None and self._needs == needs:
            return self._cluster
        await self.close()
        self.say(f"  starting {needs}")
        home = self.settings.home / f"cluster-{next(self._homes)}"
        home.mkdir(parents=True)
        self._cluster = await self._stack.enter_async_context(needs.open(self.settings.model.path, home))
        self._needs = needs
        return self._cluster
