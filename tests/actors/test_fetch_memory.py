"""What giving and fetching weights costs in memory, at both ends, as the system counts it in real processes.

What gRPC holds of a few pieces is sometimes more where threads are kept waiting by others on the machine: what counts
is the least of a few tries. Holding them all would be more in every one.
"""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import torch

from actors.expert.giving import MAX_RECEIVERS
from actors.expert.model_facts import ModelFacts
from model.storage.checkpoint import Checkpoint
from protos import expert_pb2 as pb
from protos.pieces import PIECE_BYTES
from tests.support import expert_process
from tests.support.checkpoints import write_dense_llama
from tests.support.columns import fetch_of
from tests.support.experts import TOKEN, channel_to, run

HIDDEN, FFN, LAYERS = 512, 8192, 8
COLUMN_BYTES = LAYERS * 3 * HIDDEN * FFN * 2
TRIES = 10


def arguments(model: Path) -> dict[str, Any]:
    return {
        "replica_id": "expert-0-r0",
        "expert_ids": [0],
        "first_layer": 0,
        "num_layers": LAYERS,
        "model": str(model),
        "kernel": "fp16",
        "device": "cpu",
        "auth_token": TOKEN,
        "model_facts": ModelFacts.of(Checkpoint.open(model)).plain(),
    }


def memory_of(pid: int, what: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def begin_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


async def least(measure: Callable[[], Awaitable[int]], limit: int) -> int:
    """The first of a few tries that is within the limit, or else the least of all."""
    found: list[int] = []
    while len(found) < TRIES and not (found and min(found) <= limit):
        found.append(await measure())
    return min(found)


async def peak_of_receiver(model: Path, donor: str) -> int:
    """The most that a process has held that loads all of its column from a peer."""
    receiver, had = await expert_process.spawn(**{**arguments(model), "model": "/nothing/here", "sources": [donor]})
    try:
        assert had["loaded_from_peer_bytes"] == COLUMN_BYTES, had["detail"]
        return memory_of(receiver.pid, "VmHWM:")
    finally:
        await expert_process.end(receiver)


async def growth_of_donor(pid: int, address: str) -> int:
    """What a process holds more at most while it gives its column once, and to others who do not read."""
    async with AsyncExitStack() as stack:
        begin_peak(pid)
        before = memory_of(pid, "VmRSS:")
        channel = await stack.enter_async_context(channel_to(address))
        request = pb.FetchColumnRequest(expert_id=0, first_layer=0, num_layers=LAYERS)
        slow = [fetch_of(channel)(request) for _ in range(MAX_RECEIVERS - 1)]
        for call in slow:  # they read one piece, and no more
            stack.callback(call.cancel)
            await call.read()
        sent = 0
        async for data in fetch_of(channel)(request):
            sent += len(data)
        assert sent > COLUMN_BYTES
        return memory_of(pid, "VmHWM:") - before


def test_a_receiver_needs_no_more_than_who_reads_a_disk_and_a_donor_a_few_pieces(tmp_path: Path) -> None:
    write_dense_llama(tmp_path, layers=LAYERS, hidden=HIDDEN, ffn=FFN, vocab=16, dtype=torch.float16)

    async def work() -> None:
        async with AsyncExitStack() as stack:
            donor, info = await expert_process.spawn(**arguments(tmp_path))
            stack.push_async_callback(expert_process.end, donor)
            from_disk = memory_of(donor.pid, "VmHWM:")

            few = 56 * PIECE_BYTES  # what gRPC holds of a few pieces, however many there are in all
            assert few < COLUMN_BYTES // 3
            from_peer = await least(lambda: peak_of_receiver(tmp_path, info["address"]), from_disk + few)
            assert from_peer - from_disk <= few, f"{from_peer} from a peer, {from_disk} from disk"

            limit = 6 * MAX_RECEIVERS * PIECE_BYTES
            assert limit < COLUMN_BYTES
            grown = await least(lambda: growth_of_donor(donor.pid, info["address"]), limit)
            assert grown <= limit, f"grown by {grown} while {COLUMN_BYTES} bytes were sent"

    run(work())
