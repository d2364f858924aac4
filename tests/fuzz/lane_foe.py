"""Hostile frames on an expert's lane: the socket beside its gRPC port, which its compute thread reads itself.

Half of the hellos have a good ticket, so that what follows them is read; most frames have a good checksum.
"""

import asyncio
import os
import random
import socket
from typing import Any

import grpc

from actors.channels import WireCredentials, open_channel
from actors.machine import machine_id
from actors.shared_rows import SharedRows
from protos.expert_pb2 import AttachReply, AttachRequest
from protos.lane import Hello, LaneRequest, Segment
from tests.fuzz.expert_foe import FAR_US, SERVICE, TOKEN, WIDTH, Golden
from tests.fuzz.mutation import damaged
from tests.fuzz.target import Target
from tests.fuzz.wire_targets import _resealed

ROWS = 16
FRAMES_A_LANE = 64
WAIT_S = 120.0


def _never(data: bytes) -> object:
    raise NotImplementedError


_FRAMES = Target(
    name="lane_frames",
    decode=_never,
    errors=(),
    seeds=(
        LaneRequest(9, 0, 1, FAR_US, 0, (Segment(0, 0, 2),), 77).pack(),
        LaneRequest(8, 1, 1, 1, 3, (Segment(0, 1, 1), Segment(0, 5, 2)), 77).pack(),
    ),
    repair=_resealed,
)


PATIENCE_S = 120.0
"""For a ticket. Without one in so long this system has no lanes."""


async def attack_lane(places: Any, *, messages: int, seed: int, report: Any) -> None:
    """Lane after lane, each with frames until the other side ends it; goldens go on by gRPC."""
    chance = random.Random(seed)
    async with open_channel(places.expert_info["address"], WireCredentials(TOKEN)) as channel:
        golden = Golden(channel)
        await golden.ask(report)
        lanes = 0
        while report.messages < messages:
            reply = await _attach(channel)
            _one_lane(chance, reply, seed, report)
            lanes += 1
            if lanes % 10 == 0:
                await golden.ask(report)
        await golden.ask(report)


async def _attach(channel: grpc.aio.Channel) -> AttachReply:
    attach: Any = channel.unary_unary(SERVICE + "Attach", AttachRequest.SerializeToString, AttachReply.FromString)
    async with asyncio.timeout(PATIENCE_S):
        while True:
            reply: AttachReply = await attach(AttachRequest(machine_id=machine_id(), lanes=["shm"]), timeout=30)
            if reply.lane == "shm":
                return reply
            await asyncio.sleep(0.2)  # only so many tickets are out; those of bad hellos have to grow old


def _one_lane(chance: random.Random, reply: AttachReply, seed: int, report: Any) -> None:
    rows, replies = SharedRows.create(ROWS, WIDTH), SharedRows.create(ROWS, WIDTH)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as lane:
        lane.settimeout(WAIT_S)
        try:
            lane.connect(f"\0{reply.endpoint}")
            report.messages += 1
            if not _greet(chance, lane, reply.ticket, rows, replies):
                report.answers["hello refused"] += 1
                return
            for _ in range(FRAMES_A_LANE):
                lane.send(damaged(_FRAMES, seed, report.messages))
                report.messages += 1
                if not _drained(lane, report):
                    report.answers["lane ended"] += 1
                    return
        except (BrokenPipeError, ConnectionResetError):
            report.answers["lane ended"] += 1
        finally:
            for region in (rows, replies):
                os.close(region.fd)


def _greet(chance: random.Random, lane: socket.socket, ticket: bytes, rows: SharedRows, replies: SharedRows) -> bool:
    """Says hello, wrongly three times out of eight; whether it was welcome."""
    kind = chance.randrange(8)
    shown = chance.randbytes(16) if kind == 0 else ticket
    width, num = (WIDTH, ROWS) if kind != 1 else chance.choice(((0, 0), (WIDTH, 2**62), (2**32 - 1, ROWS)))
    hello = Hello(shown, width, num, ROWS).pack()
    fds = [rows.fd, replies.fd] if kind != 2 else [rows.fd] * chance.choice((1, 3))
    socket.send_fds(lane, [hello if chance.random() < 0.95 else chance.randbytes(44)], fds)
    return bool(lane.recv(64))


def _drained(lane: socket.socket, report: Any) -> bool:
    """Reads the answers that are there; False when the other side has ended the lane."""
    lane.setblocking(False)
    try:
        while True:
            if not lane.recv(4096):
                return False
            report.answers["reply"] += 1
    except BlockingIOError:
        return True
    finally:
        lane.settimeout(WAIT_S)
