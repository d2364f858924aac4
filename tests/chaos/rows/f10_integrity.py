"""F10: bits flip: in what is said, in a checkpoint on disk, in the memory of a replica that serves."""

import asyncio
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from model.storage.checkpoint import Checkpoint
from model.storage.integrity import verified
from tests.chaos.clusters import NUM_EXPERTS, Cluster, Process, Served, ServedChaos, in_use
from tests.chaos.context import Context, Live
from tests.chaos.figures import Bar
from tests.chaos.player import playing
from tests.chaos.row import row
from tests.support.process_memory import find, first_bytes, flip
from tests.support.served_cluster import environment, free_port, run

ROOT = Path(__file__).resolve().parent.parent.parent.parent
FLIP_TESTS = "tests/actors/test_bit_flips.py"  # four kinds of messages, 2,500 flips each
QUARANTINE_S = 60.0
POLL_S = 0.1


@row(
    "F10",
    fault="10,000 bit flips in payloads; a flipped bit in a checkpoint file; in one replica's memory",
    promise="all caught; start refused naming the tensor; quarantined <= 60 s",
    bar=Bar(text="100 %", recover_s=QUARANTINE_S),
    needs=Served(("--replicas", "2")),
    repeats=3,
)
async def bits_flip(ctx: Context) -> None:
    """Memory: what was said between the flip and the canary cannot be had back, so those tokens are not compared."""
    assert isinstance(ctx.cluster, ServedChaos)
    ctx.require(await flips_in_messages(), f"a flipped bit in a message passed: see {FLIP_TESTS}")
    ctx.note("10,000 flips in messages: none passed")
    model = Path((await ctx.cluster.status()).model_path)
    refused = await asyncio.to_thread(flip_on_disk, model, ctx.rng)
    ctx.require(not refused, f"damaged checkpoint: {refused}")
    ctx.note("a damaged tensor on disk: start refused, and named")
    for _ in ctx.trials():
        await flip_in_memory(ctx, model)
    await ctx.trial(nothing)


async def flips_in_messages() -> bool:
    """Whether every flip is an error, silence or without a meaning; in a process that has no Ray."""
    command = (sys.executable, "-m", "pytest", "-q", FLIP_TESTS)
    process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=asyncio.subprocess.DEVNULL)
    return await process.wait() == 0


def flip_on_disk(model: Path, draw: random.Random) -> str:
    """What is wrong with how `octavo serve` takes a copy of the checkpoint with one flipped bit; empty, if nothing."""
    with tempfile.TemporaryDirectory() as home:
        own = Path(home) / "own"
        shutil.copytree(model, own)
        checkpoint = verified(Checkpoint.open(own), Path(home)).checkpoint
        layer, expert = draw.randrange(checkpoint.config.num_layers), draw.randrange(NUM_EXPERTS)
        stored, first, count = checkpoint.stored(f"layers.{layer}.experts.{expert}.w2")
        with stored.path.open("r+b") as file:
            at = stored.start + first + draw.randrange(count)
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << draw.randrange(8)]))
        said = run(["serve", str(own), "--port", str(free_port())], environment(Path(home) / "home"))
        last = (said.stderr.strip().splitlines() or [""])[-1]
        if said.returncode != 1 or repr(stored.name) not in last or "CRC-32C" not in last:
            return f"exit {said.returncode}: {last[:200]}"
    return ""


async def flip_in_memory(ctx: Context, model: Path) -> None:
    """The highest bit of a weight's exponent, in a replica that computes; counted until that is condemned."""
    await ctx.cluster.wait_whole()
    victim = await in_use(ctx.cluster, ctx.rng.randrange(NUM_EXPERTS))
    async with playing(ctx.cluster.url, ctx.cluster.model_id, ctx.load) as player:
        player.start()
        await player.until_flowing()
        places = await asyncio.to_thread(find, _first_of(model, victim, ctx.rng), victim.pid)
        ctx.require(bool(places), f"{victim.name}'s weights were not found in its memory")
        for place in places:
            flip(place, 14, victim.pid)
        began_s = time.monotonic()
        quarantined_s = await _until_condemned(ctx.cluster, victim) - began_s
        await ctx.cluster.wait_whole()
        await player.finish()
    failed = sum(stream.error is not None for stream in player.streams)
    ctx.require(quarantined_s <= QUARANTINE_S, f"quarantined after {quarantined_s:.0f} s")
    ctx.note(f"memory: quarantined after {quarantined_s:.1f} s")
    ctx.count(failed=failed, recover_s=quarantined_s, requests=len(player.streams))


async def nothing(_live: Live) -> None:
    """No fault: after all of the above every token is right again."""


def _first_of(model: Path, victim: Process, draw: random.Random) -> bytes:
    checkpoint = Checkpoint.open(model)
    layer, expert = draw.randrange(checkpoint.config.num_layers), draw.choice(victim.expert_ids)
    return first_bytes("fp16", checkpoint.read(f"layers.{layer}.experts.{expert}.w1", torch.float32))


async def _until_condemned(cluster: Cluster, victim: Process) -> float:
    """When the process was seen to serve no more, or to serve for far too long."""
    until_s = time.monotonic() + 2 * QUARANTINE_S
    while True:
        now = next(one for one in await cluster.replicas() if one.name == victim.name)
        if now.pid != victim.pid or now.state != "ready" or time.monotonic() > until_s:
            return time.monotonic()
        await asyncio.sleep(POLL_S)
