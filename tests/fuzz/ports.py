"""Hostile messages to the ports inside a cluster: an expert's, its lane's socket, a coordinator's. Real processes.

Without the token everything must be turned away unread: what is sent then can be parsed by nobody, so that any answer
but UNAUTHENTICATED would show that somebody tried. With the token every message is answered or refused, and goldens,
right requests whose answers are known, are asked all the time.
"""

import asyncio
import json
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.fuzz import cluster_process
from tests.fuzz.coordinator_foe import attack_coordinator, coordinator_strangers
from tests.fuzz.expert_foe import attack_expert, expert_strangers
from tests.fuzz.lane_foe import attack_lane
from tests.fuzz.unread_foe import coordinator_unread, expert_unread
from tests.support import expert_process
from tests.support.checkpoints import write_mixtral
from tests.support.tokenizers import write_byte_tokenizer

MAX_GROWTH_BYTES = 50 << 20
WARM_MESSAGES = 2000
TOKEN = "a-token-for-tests-only"
TICKET_S = 2.0
"""Bad hellos leave tickets behind, of which only so many are out: they grow old sooner here than they would."""


@dataclass
class PortReport:
    """What hostile messages did to one port. `answers` counts replies by what they said; sizes in bytes."""

    port: str
    messages: int = 0
    crashes: int = 0
    golden_asked: int = 0
    golden_wrong: int = 0
    rss_growth: int = 0
    allowed: int = MAX_GROWTH_BYTES
    seconds: float = 0.0
    answers: Counter[str] = field(default_factory=Counter)

    @property
    def held(self) -> bool:
        """Whether all that was promised was kept."""
        return not self.crashes and not self.golden_wrong and self.rss_growth <= self.allowed

    def line(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "answers": dict(self.answers), "held": self.held}


ATTACKS = {
    "expert_without_token": expert_strangers,
    "expert": attack_expert,
    "lane": attack_lane,
    "coordinator_without_token": coordinator_strangers,
    "coordinator": attack_coordinator,
    "expert_unread": expert_unread,
    "coordinator_unread": coordinator_unread,
}


@dataclass(frozen=True)
class Places:
    """Where the victims are."""

    expert: Any
    expert_info: dict[str, Any]
    cluster: Any
    cluster_facts: dict[str, str]


@asynccontextmanager
async def victims(home: Path) -> AsyncIterator[Places]:
    """A real expert process, and a process with a coordinator and its experts."""
    model = home / "model"
    write_mixtral(model, hidden=32, ffn=48, layers=2, experts=2, dtype=torch.float16)
    write_byte_tokenizer(model, 300)
    expert, info = await expert_process.spawn(
        cluster_process.TIDY,
        replica_id="expert-0-r0",
        expert_ids=[0],
        first_layer=0,
        num_layers=2,
        model=str(model),
        kernel="auto",
        device="cpu",
        auth_token=TOKEN,
        lane_ticket_s=TICKET_S,
    )
    try:
        assert info["state"] == "ready", info
        cluster, facts = await cluster_process.spawn(home / "cluster.log", model_dir=str(model), max_model_len=256)
        try:
            yield Places(expert, info, cluster, facts)
        finally:
            await cluster_process.end(cluster)
    finally:
        await expert_process.end(expert)


async def attack(name: str, places: Places, *, messages: int, seed: int) -> PortReport:
    """One attack, after a short one that lets pools and caches fill."""
    victim = places.cluster if name.startswith("coordinator") else places.expert
    report = PortReport(name)
    if not name.endswith("_unread"):  # which measures by itself
        await ATTACKS[name](places, messages=min(messages, WARM_MESSAGES), seed=seed + 1, report=PortReport(name))
    before = cluster_process.rss(victim.pid)
    began = time.monotonic()
    await ATTACKS[name](places, messages=messages, seed=seed, report=report)
    report.seconds = round(time.monotonic() - began, 3)
    if victim.returncode is None:
        report.rss_growth = max(report.rss_growth, cluster_process.rss(victim.pid) - before)
    else:
        report.crashes += 1
    return report


def run_ports(*, messages: int, seed: int, only: str = "") -> int:
    """Every attack, or those named with commas between them, with so many messages each.

    Prints a line of JSON for each. Returns the exit status.
    """

    names = [name for name in only.split(",") if name] or list(ATTACKS)
    if strangers := set(names) - set(ATTACKS):
        raise SystemExit(f"there is no attack {min(strangers)!r}; there are {', '.join(ATTACKS)}")

    async def work() -> bool:
        with tempfile.TemporaryDirectory(prefix="octavo-fuzz-") as home:
            async with victims(Path(home)) as places:
                held = True
                for name in names:
                    report = await attack(name, places, messages=messages, seed=seed)
                    print(json.dumps(report.line()), flush=True)
                    held = held and report.held
                return held

    return 0 if asyncio.run(work()) else 1
