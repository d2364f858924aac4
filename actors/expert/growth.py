"""How a replica comes to hold its layers: one after the other, each served as soon as its canary is known.

Used from the event loop; reading and packing happen in a thread of their own, which stands behind everything else as
long as nobody waits for rows of this process. Where a layer comes from is `actors.expert.loading`'s, the replica's
state `actors.expert.actor`'s.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from functools import partial

import torch

from actors.channels import WireCredentials
from actors.expert.canary import Canaries
from actors.expert.fetching import Peer
from actors.expert.loading import LayerLoader, LoadThread, Pace, check_range, open_disk
from actors.expert.model_facts import ModelFacts
from actors.expert.replica import ExpertReplica
from actors.expert.service import LoadError
from model.config import ModelConfigError
from model.experts import ExpertColumn
from model.memory import collapse_into_huge_pages, release_freed_memory
from model.storage.checkpoint import Checkpoint, CheckpointError

LOG = logging.getLogger(__name__)


class Growth:
    """One replica's. `columns` by expert are what it holds; `watching` are its canaries, once there is need.

    `facts` are what is known of the model without a checkpoint. `bytes_per_s` bounds loading from wherever; `gentle`
    lets it stand behind other processes too.
    """

    def __init__(
        self,
        replica: ExpertReplica,
        canaries: Canaries,
        *,
        kernel: str,
        device: torch.device,
        threads: int,
        checksums: Mapping[str, int],
        facts: ModelFacts | None,
        bytes_per_s: int | None,
        gentle: bool,
    ) -> None:
        self.columns: dict[int, ExpertColumn] = {}
        self.watching: asyncio.Task[None] | None = None
        self._replica = replica
        self._canaries = canaries
        self._kernel = kernel
        self._device = device
        self._threads = threads
        self._checksums = checksums
        self._facts = facts
        self._pace = Pace(bytes_per_s)
        self._gentle = gentle
        self._peers: list[Peer] = []
        self._loader: LayerLoader | None = None
        self._lock = asyncio.Lock()

    async def open(self, model: str, sources: Sequence[str], credentials: WireCredentials) -> Checkpoint | None:
        """Makes ready to load from the replicas at `sources` and from `model`, which is returned if it is there.

        Raises what opening the checkpoint raises, unless peers can stand in for it, and LoadError for an expert or
        layer that the model does not have.
        """
        self._peers = [Peer(address, credentials) for address in sources]
        disk, why_no_disk = None, ""
        try:
            disk = await asyncio.to_thread(open_disk, model, self._checksums)
        except (CheckpointError, ModelConfigError, OSError) as error:
            if not sources or self._facts is None:
                raise
            why_no_disk = f"there is no usable checkpoint here ({type(error).__name__}: {error})"
            LOG.warning("%s: %s", self._replica.replica_id, why_no_disk)
        facts = self._facts if disk is None else ModelFacts.of(disk)
        assert facts is not None, "no facts and no disk was an error above"
        replica = self._replica
        for expert in replica.experts:
            check_range(facts, expert, replica.layers)
        replica.hidden_size = facts.hidden_size
        replica.progress.bytes_total = len(replica.experts) * len(replica.layers) * facts.layer_bytes
        self._loader = LayerLoader(
            facts=facts,
            disk=disk,
            why_no_disk=why_no_disk,
            peers=self._peers,
            kernel=self._kernel,
            device=self._device,
            checksums=self._checksums,
            pace=self._pace,
            progress=replica.progress,
        )
        return disk

    async def load(self, experts: Sequence[int], layers: range) -> int:
        """Loads what is not held yet, layer after layer; returns the bytes of the weights. One call at a time.

        Raises LoadError for what the model does not have and for what nobody gives, and what disk and kernel raise.
        """
        if self._loader is None:
            raise LoadError("nothing is loaded yet")
        for expert in experts:
            check_range(self._loader.facts, expert, layers)
        async with self._lock:
            return await self._load(self._loader, experts, layers)

    def watch(self) -> None:
        """Begins to look at canaries: when all is loaded, or when rows come for layers that are."""
        if self.watching is None:
            self.watching = asyncio.create_task(self._canaries.watch())

    async def part_with_peers(self) -> None:
        """What is loaded from now on comes from disk; calls that run are ended."""
        if self._loader is not None:
            self._loader.peers = ()
        await asyncio.gather(*(peer.close() for peer in self._peers))

    async def tidy(self) -> None:
        """Gives back what loading needed, and moves what it left into huge pages."""
        if self._device.type == "cpu":
            thread = self._thread()
            try:
                await thread.call(release_freed_memory)
                LOG.info("%d MiB in huge pages", await thread.call(collapse_into_huge_pages) >> 20)
            finally:
                await thread.stop()

    async def stop(self) -> None:
        """Loading ends at its next byte."""
        self._pace.stop()
        await self.part_with_peers()
        if self.watching is not None:
            self.watching.cancel()

    async def _load(self, loader: LayerLoader, experts: Sequence[int], layers: range) -> int:
        weight_bytes = 0
        thread = self._thread()
        try:
            for layer in layers:
                if self._serves and not thread.in_front:
                    await thread.stop()
                    thread = self._thread()
                    self.watch()
                for expert in experts:
                    if self._replica.find(layer, expert) is None:
                        column = await thread.call(partial(loader.load, expert, layer))
                        await self._hold(expert, column)
                        weight_bytes += column.weight_bytes
                if self._replica.ready_layers:
                    self._replica.opened.set()
        finally:
            await thread.stop()
        return weight_bytes

    async def _hold(self, expert: int, column: ExpertColumn) -> None:
        await self._canaries.learn(expert, column)
        held = self.columns.setdefault(expert, column)
        if held is not column:
            held.absorb(column)
        self._replica.add(expert, held)

    def _thread(self) -> LoadThread:
        thread = LoadThread(
            f"{self._replica.replica_id}-load", self._threads, in_front=not self._gentle or self._serves
        )
        thread.start()
        return thread

    @property
    def _serves(self) -> bool:
        """Whether rows came already. Who loads then must not stand behind other processes: at times it holds Python's
        lock, which those who compute the rows need.
        """
        return self._replica.counters.messages_total > 0
