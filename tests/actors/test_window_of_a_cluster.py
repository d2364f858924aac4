"""The window onto real coordinators and experts in one loop: through a front door and by the supervisor alike."""

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.channels import WireCredentials
from actors.front.coordinator_client import CoordinatorClient
from actors.front.coordinator_pool import CoordinatorPool
from actors.front.front_door import FrontDoor
from actors.front.scrape import StatusWatch
from actors.supervision.in_process import InProcessRuntime
from actors.supervision.status import ClusterStatus
from actors.supervision.supervisor import Supervisor
from actors.window.front_view import FrontView
from actors.window.reading import History, Reading
from actors.window.snapshot import Snapshot, make_snapshot
from tests.support.checkpoints import write_mixtral
from tests.support.front import make_front, run
from tests.support.supervised import NODES, TOKEN, asking, config_of, ready, supervised, until
from tests.support.tokenizers import write_byte_tokenizer

LAYERS, EXPERTS = 3, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    path.mkdir()
    write_mixtral(path, layers=LAYERS, experts=EXPERTS, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


def front_of(model: Path, one: Supervisor, status: ClusterStatus) -> FrontDoor:
    async def look() -> ClusterStatus | None:
        return ClusterStatus.from_dict(await one.status())

    clients = [CoordinatorClient(row.address, WireCredentials(TOKEN)) for row in status.coordinators]
    return make_front(model, coordinators=CoordinatorPool(clients), status=StatusWatch(look))


async def until_seen(view: FrontView, holds: Callable[[Snapshot], bool]) -> Snapshot:
    """The first frame's snapshot for which it holds."""
    snapshot: Any = None
    try:
        async with asyncio.timeout(120):
            while True:
                snapshot = json.loads((await view.look()).data.split(b"data: ")[1])
                if holds(snapshot):
                    return dict(snapshot)
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"not seen: {snapshot}") from None


def states(snapshot: Snapshot) -> dict[str, tuple[str, str]]:
    return {row["replica_id"]: (row["state"], row["standing"]) for row in snapshot["replicas"]}


def well(snapshot: Snapshot) -> bool:
    return set(states(snapshot).values()) == {("ready", "healthy")}


def test_a_front_door_sees_load_a_killed_expert_and_its_return(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime(NODES)
        async with supervised(config_of(model), runtime) as one:
            status = await until(one, ready)
            front = front_of(model, one, status)
            await front.coordinators.connect()
            view = FrontView(front)
            async with asking(status):
                told = await until_seen(view, lambda s: bool(s["totals"]["generated_tokens_per_s"]) and well(s))
                assert (told["load"]["num_layers"], told["load"]["num_experts"]) == (LAYERS, EXPERTS)
                assert all(sum(row) > 0 for row in told["load"]["tokens"])
                assert all(0.5 <= even <= 1.0 for even in told["load"]["balancedness"])
                assert states(told) == dict.fromkeys(("expert-0-r0", "expert-1-r0"), ("ready", "healthy"))
                assert all(row["busy_share"] > 0 for row in told["replicas"])
                assert told["copies"] == [{"expert_id": expert, "ready": 1, "wanted": 1} for expert in range(EXPERTS)]
                assert told["coordinators"][0]["kv_total"] > told["coordinators"][0]["kv_used"] >= 0
                assert told["epochs"][-1]["epoch"] == told["cluster"]["map_epoch"] == status.map_epoch

                next(actor for actor in runtime.spawned if "expert-1" in actor.name).kill()
                # It is back within a look here; a process takes seconds: tests/e2e/test_window.py.
                hurt = await until_seen(view, lambda s: any("expert 1 has 0 of 1 copy" in e for e in s["events"]))
                assert states(hurt)["expert-0-r0"][0] == "ready"
                newer = status.map_epoch + 2
                whole = await until_seen(view, lambda s: s["cluster"]["map_epoch"] >= newer and well(s))
                assert whole["epochs"][0]["epoch"] == status.map_epoch
                assert whole["epochs"][-1]["epoch"] == whole["cluster"]["map_epoch"]
            await front.close()

    run(work())


def test_the_supervisor_tells_the_same_load_as_the_coordinators(model: Path) -> None:
    async def work() -> None:
        async with supervised(config_of(model)) as one:
            status = await until(one, ready)
            async with asking(status):
                pass
            front = front_of(model, one, status)
            await front.coordinators.connect()
            view = FrontView(front)
            async with asyncio.timeout(120):
                while True:  # what was asked last may still be under way
                    # Each layer routes every token: so it is once no step is under way.
                    mine = await until_seen(view, lambda s: len(set(map(sum, s["load"]["tokens"]))) == 1)
                    seen, facts = await one.window()
                    reading = Reading(at_s=0.0, clock_s=0.0, status=ClusterStatus.from_dict(seen), coordinators=facts)
                    told = make_snapshot(reading, History().after(reading), "supervisor")
                    if told["load"]["tokens"] == mine["load"]["tokens"]:
                        break
                    await asyncio.sleep(0.05)  # it looks once a second
            assert sum(mine["load"]["tokens"][0]) > 0
            assert told["front"] is None
            assert {row["replica_id"] for row in told["replicas"]} == {row["replica_id"] for row in mine["replicas"]}
            assert json.loads(json.dumps(told, allow_nan=False)) == told
            await front.close()

    run(work())
