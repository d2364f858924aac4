"""The balancing loop under a load that is known exactly: noise moves nothing, a shift little and soon, none gives back.

The cluster is real and serves; what its balancing is told of the load is scripted, as a coordinator would count it.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import actors.supervision.supervisor as supervisor_module
from actors.supervision.asking import WINDOW_INTERVALS
from actors.supervision.balancing import Balancing
from actors.supervision.member import View
from actors.supervision.supervisor import Supervisor
from cluster.layout import FloatArray, critical_share
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.layouts import within
from tests.support.supervised import asking, config_of, exactly, supervised, until
from tests.support.tokenizers import write_byte_tokenizer

LAYERS, EXPERTS = 2, 4
EACH = tuple(f"expert-{e}-r0" for e in range(EXPERTS))
INTERVAL_S = 0.2
QUIET_LOOKS = 4 * WINDOW_INTERVALS
ROWS_PER_S = 1e6
HOT = 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=LAYERS, experts=EXPERTS, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)


class Load:
    """A coordinator's counters, up to date whenever they are asked for. All rows together keep one host busy.

    `shares_LE` is of the rows; `noise` is how far each share strays from that, anew in each window.
    """

    def __init__(self) -> None:
        self.shares_LE: FloatArray = np.full((LAYERS, EXPERTS), 1 / EXPERTS)
        self.noise = 0.0
        self.looks = 0
        self._rows_LE = np.zeros((LAYERS, EXPERTS))
        self._at_s = time.monotonic()
        self._rng = np.random.default_rng(7)
        self._stray_LE = np.ones((LAYERS, EXPERTS))
        self._looked = asyncio.Event()

    def __call__(self) -> Mapping[str, View]:
        now_s = time.monotonic()
        if self.looks % WINDOW_INTERVALS == 0:
            self._stray_LE = self._rng.choice([1 - self.noise, 1 + self.noise], (LAYERS, EXPERTS))
        self.looks += 1
        looked, self._looked = self._looked, asyncio.Event()
        looked.set()
        self._rows_LE += self.shares_LE * self._stray_LE * ROWS_PER_S * (now_s - self._at_s) / LAYERS
        self._at_s = now_s
        rows = self._rows_LE.round().astype(int)
        info = {"load": rows.tolist(), "expert_compute_us_total": int(rows.sum() / ROWS_PER_S * 1e6)}
        return {"coordinator-0": View("coordinator-0", 1, info)}

    async def more(self, looks: int) -> None:
        """Returns when it was looked at so many more times."""
        target = self.looks + looks
        while self.looks < target:
            await self._looked.wait()


class Balanced:
    """The cluster, its load, and a balancing that follows it."""

    def __init__(self, cluster: Supervisor, balancing: Balancing, load: Load) -> None:
        self.cluster, self.balancing, self.load = cluster, balancing, load

    @property
    def copies(self) -> int:
        """Loads of experts so far."""
        assert self.balancing.status.failed == []
        return sum(move["kind"] == "copy" for move in self.balancing.status.done)

    def share_of(self, load_LE: FloatArray) -> float:
        return critical_share(self.cluster._balancing._mover.layout.busy_LN(load_LE))

    async def at_rest(self) -> None:
        """Returns when nothing has moved for some windows."""
        async with asyncio.timeout(200):
            before = -1
            while before != self.balancing.status.moves_total or self.balancing.status.proposed:
                before = self.balancing.status.moves_total
                await self.load.more(QUIET_LOOKS)


@asynccontextmanager
async def balanced(model: Path, *, slots: int) -> AsyncIterator[Balanced]:
    """Four experts on three nodes with so many slots each."""
    config = config_of(model, expert_slots=slots, balance_interval_s=INTERVAL_S)
    load = Load()
    async with supervised(config) as one:
        first = await until(one, exactly(*EACH))
        async with asking(first) as client:
            balancing = Balancing(replace(config, balance="on"), one._balancing._mover, load, one._say)
            try:
                yield Balanced(one, balancing, load)
                await client.more()
            finally:
                await balancing.close()


def test_five_percent_of_noise_move_nothing(model: Path) -> None:
    async def work() -> None:
        async with balanced(model, slots=2) as it:
            await it.at_rest()
            before = it.balancing.status.moves_total
            it.load.noise = 0.05
            await it.load.more(10 * WINDOW_INTERVALS)
            assert it.balancing.status.moves_total == before
            assert it.balancing.status.proposed == []

    run(work())


@pytest.mark.parametrize("times", [2, 4])
def test_a_hotter_expert_is_followed_within_two_windows_and_with_few_loads(model: Path, times: int) -> None:
    async def work() -> None:
        async with balanced(model, slots=2) as it:
            await it.at_rest()
            rest, before = it.cluster._balancing._mover.layout, it.copies
            it.load.shares_LE[:, HOT] *= times
            shifted, moves = it.load.looks, it.balancing.status.moves_total
            while not it.balancing.status.proposed and it.balancing.status.moves_total == moves:
                assert it.load.looks - shifted <= 2 * WINDOW_INTERVALS, "two windows went by"
                await it.load.more(1)
            await it.at_rest()
            num = it.copies - before
            work_LE = it.load.shares_LE
            reached = it.share_of(work_LE)
            assert reached < critical_share(rest.busy_LN(work_LE)), "it is better than what was"
            assert all(critical_share(other.busy_LN(work_LE)) > reached for other in within(rest, num - 2))

    run(work())


def test_when_the_load_goes_copies_are_drained(model: Path) -> None:
    async def work() -> None:
        async with balanced(model, slots=2) as it:
            await it.at_rest()
            with_load = await it.cluster.status()
            assert len(with_load["replicas"]) > EXPERTS, "one node has two experts: copies even that out"
            it.load.shares_LE[:] = 0.0
            after = await until(it.cluster, lambda status: len(status.replicas) == EXPERTS)
            held = sorted(expert for one in after.replicas for expert in one.expert_ids)
            assert held == list(range(EXPERTS))
            pids = {actor.name for actor in it.cluster._runtime.spawned if actor.target is not None}  # type: ignore[attr-defined]
            assert sum(name.startswith("expert/") for name in pids) == EXPERTS, "a process that has ended holds nothing"

    run(work())
