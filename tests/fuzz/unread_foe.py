"""Peers who send as much as a port lets them and take no answer: without the token, and with it.

What the port then holds must be no more than `actors.port_limits` declares for so many connections, while right
requests are still answered.
"""

import struct
from typing import Any

import torch

from actors.channels import WireCredentials, open_channel
from actors.port_limits import COORDINATOR_PORT, EXPERT_PORT, PortLimits
from protos.coordinator_pb2 import GenerateRequest
from tests.fuzz import cluster_process, coordinator_foe, expert_foe, unread_peer

CONNECTIONS = 4
NOISE_BYTES = 40 << 20
"""What a process's memory grows by beside, once: allocators keep what was freed, and refusals wait for their reader."""


async def expert_unread(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """See `_unread`; with the token, rows of a wrong shape to Forward, whose refusals nobody reads."""
    del messages, seed  # the port says how much it takes
    wrong = expert_foe.request_of(torch.ones(2, 31), expert_rows=[2])
    address = places.expert_info["address"]
    async with open_channel(address, WireCredentials(expert_foe.TOKEN)) as channel:
        golden = expert_foe.Golden(channel)
        at = (address, expert_foe.SERVICE + "Forward", places.expert.pid)
        await _unread(at, wrong, EXPERT_PORT, golden, report)


async def coordinator_unread(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """See `_unread`; with the token, requests to Generate that are refused, which nobody reads."""
    del messages, seed
    wrong = GenerateRequest(submit=coordinator_foe.submit_of(1, prompt_token_ids=[])).SerializeToString()
    address = places.cluster_facts["address"]
    async with open_channel(address, WireCredentials(coordinator_foe.TOKEN)) as channel:
        golden = coordinator_foe.Golden(channel)
        at = (address, coordinator_foe.SERVICE + "Generate", places.cluster.pid)
        await _unread(at, wrong, COORDINATOR_PORT, golden, report)


async def _unread(at: tuple[str, str, int], wrong: bytes, limits: PortLimits, golden: Any, report: Any) -> None:
    """A peer without the token, then one with it; the memory while each holds on to what it sent."""
    address, path, pid = at
    report.allowed = CONNECTIONS * limits.unread_bytes + NOISE_BYTES
    await golden.ask(report)
    for token in ("", expert_foe.TOKEN):
        before = cluster_process.rss(pid)
        message = (b"\0" + struct.pack(">I", len(wrong)) + wrong).hex() if token else ""
        plan: dict[str, Any] = {"address": address, "path": path, "token": token, "message": message}
        if token:
            plan |= {"longest_s": 150, "enough_bytes": CONNECTIONS * limits.streams * limits.window_bytes}
        else:
            plan["longest_s"] = 4  # calls are ended and begun again as long as one likes
        peer, facts = await unread_peer.spawn(**plan, connections=CONNECTIONS)
        try:
            await golden.ask(report)
            grown = cluster_process.rss(pid) - before
            report.rss_growth = max(report.rss_growth, grown)
            report.messages += facts["sent"] // (5 + len(wrong)) if token else facts["ended"]
            report.answers["calls ended"] += facts["ended"]
            report.answers["calls held"] += facts["streams"] if token else 0
            report.answers["bytes held"] += facts["sent"] if token else 0
            report.crashes += facts["closed"]
        finally:
            await cluster_process.end(peer)
