"""Hostile messages to real processes, a few thousand each: `python -m tests.fuzz ports` sends 100,000."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from actors.port_limits import COORDINATOR_PORT, EXPERT_PORT
from tests.fuzz.ports import ATTACKS, Places, attack, victims
from tests.fuzz.unread_foe import CONNECTIONS

pytestmark = pytest.mark.anyio
MESSAGES = 1500


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def places(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> AsyncIterator[Places]:
    home: Path = tmp_path_factory.mktemp("ports")
    async with victims(home) as found:
        yield found


@pytest.mark.parametrize("name", ATTACKS)
async def test_a_port_bears_what_comes(places: Places, name: str) -> None:
    report = await attack(name, places, messages=MESSAGES, seed=1)
    assert report.messages >= MESSAGES
    assert report.crashes == 0, report
    assert report.golden_wrong == 0, report
    assert report.held, report
    assert json.loads(json.dumps(report.line()))["port"] == name
    if name.endswith("without_token"):
        assert set(report.answers) == {"UNAUTHENTICATED"}, "nobody looked at what strangers sent"
    else:
        assert report.golden_asked > 2
        assert len(report.answers) > 1, "some were answered and some refused"
    if name.endswith("_unread"):
        limits = COORDINATOR_PORT if name.startswith("coordinator") else EXPERT_PORT
        assert report.answers["calls held"] == CONNECTIONS * limits.streams, "as many calls as the port allows"
        assert report.answers["bytes held"] >= CONNECTIONS * limits.streams * limits.window_bytes
        assert report.allowed < 100 << 20, "the bound of so few connections is small beside what a port held once"
