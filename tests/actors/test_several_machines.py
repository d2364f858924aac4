"""A cluster over machines with addresses of their own: who listens where, who goes where, one certificate for all.

The machines are three loopback addresses; everything else is real: gRPC, mutual TLS, the supervisor's rounds.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import actors.supervision.supervisor as supervisor_module
from actors.front.coordinator_client import CoordinatorClient
from actors.supervision.in_process import ONE_NODE, InProcessRuntime
from actors.supervision.launch import Endpoints
from cluster.placement import COORDINATOR_HOST, EXPERT_HOST
from tests.actors.test_supervisor import config_of, ready, supervised, until
from tests.support.checkpoints import write_mixtral
from tests.support.front import run
from tests.support.pki import make_pki
from tests.support.tokenizers import write_byte_tokenizer

NAME = "octavo.internal"
HEAD = replace(ONE_NODE, node_id="head", address="127.0.0.2", roles=frozenset({"octavo_control_host"}))
COORDINATORS = replace(ONE_NODE, node_id="coordinators", address="127.0.0.3", roles=frozenset({COORDINATOR_HOST}))
EXPERTS = replace(ONE_NODE, node_id="experts", address="127.0.0.4", roles=frozenset({EXPERT_HOST}))


@pytest.fixture(autouse=True)
def _quick_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "ROUND_S", 0.02)
    monkeypatch.setattr(supervisor_module, "STARTING_ROUND_S", 0.02)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny"
    path.mkdir()
    write_mixtral(path, layers=2, experts=2, dtype=torch.float16)
    write_byte_tokenizer(path)
    return path


def test_everybody_listens_at_the_own_machine_and_is_known_by_one_name(model: Path, tmp_path: Path) -> None:
    pki = make_pki(tmp_path / "pki", names=(NAME,))
    tls = {"tls_cert": str(pki / "node.crt"), "tls_key": str(pki / "node.key"), "tls_ca": str(pki / "ca.crt")}
    config = config_of(model, bind_host="node", transport="grpc", tls_server_name=NAME, **tls)

    async def work() -> None:
        runtime = InProcessRuntime((HEAD,))
        async with supervised(config, runtime) as one:
            await until(one, lambda status: any("no node is for experts" in event for event in status.events))
            assert runtime.spawned == [], "the head is up first, and is for nobody"
            runtime.nodes_now = (HEAD, COORDINATORS, EXPERTS)
            status = await until(one, ready)
            assert [row.address.rpartition(":")[0] for row in status.replicas] == ["127.0.0.4"] * 2
            assert [row.address.rpartition(":")[0] for row in status.coordinators] == ["127.0.0.3"]
            held = {(actor.node_id, actor.role) for actor in runtime.spawned}
            assert held == {("experts", EXPERT_HOST), ("coordinators", COORDINATOR_HOST)}, "so that none is idle"
            found = await one.endpoints()
            assert found is not None
            endpoints = Endpoints(**found)
            assert endpoints.credentials.tls_server_name == NAME
            client = CoordinatorClient(endpoints.coordinators[0], endpoints.credentials)
            assert (await client.snapshot()).state == "ready", "it has its experts, over mutual TLS"
            await client.close()

    run(work())


def test_a_coordinator_waits_for_a_node_that_takes_it(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime((HEAD, EXPERTS))
        async with supervised(config_of(model, bind_host="node"), runtime) as one:
            status = await until(one, lambda status: [row.state for row in status.replicas] == ["ready"] * 2)
            assert status.state != "ready"
            assert not any(actor.name.startswith("coordinator/") for actor in runtime.spawned)
            runtime.nodes_now = (HEAD, EXPERTS, COORDINATORS)
            assert (await until(one, ready)).coordinators[0].address.startswith("127.0.0.3:")

    run(work())


def test_a_node_for_everybody_has_no_role_to_hold(model: Path) -> None:
    async def work() -> None:
        runtime = InProcessRuntime()
        async with supervised(config_of(model), runtime) as one:
            await until(one, ready)
            assert {actor.role for actor in runtime.spawned} == {None}

    run(work())
