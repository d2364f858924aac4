"""Loads an expert's weights layer by layer: from the first peer that gives them right, else from disk, at a pace.

A layer is packed whole or not at all, so whatever fails half-way is begun again elsewhere, and what was verified stays.
Everything here but making it happens in the thread that loads. What comes over the wire is `actors.expert.fetching`'s;
what becomes of a layer that is packed, `actors.expert.actor`'s.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from actors.expert.behind import step_back
from actors.expert.compute_thread import ComputeThread
from actors.expert.fetching import MAX_STRIKES, Peer, PeerError, PeerWeights
from actors.expert.model_facts import ModelFacts
from actors.expert.replica import LoadProgress
from actors.expert.service import LoadError
from cluster.throttle import Throttle, begin, take
from model.experts import Calibrations, ExpertColumn
from model.kernels import default_kernel
from model.storage.checkpoint import Checkpoint
from model.storage.torch_dtypes import to_torch
from model.storage.weight_source import TensorReader
from protos.weight_parts import PARTS

LOG = logging.getLogger(__name__)

MIN_BYTES_PER_S = 1 << 16
"""Slower than this, a peer might take a receiver that waits for one that is gone."""

BURST_BYTES = 1 << 20

PATIENT_ROUNDS = 5
"""Where there is no disk to fall back to, the peers are asked so often, with a pause in between."""

PAUSE_S = 1.0


class Pace:
    """Holds who loads to a rate of bytes, and tells it to stop. `sleep(seconds)` returns True to stop at once."""

    def __init__(
        self,
        bytes_per_s: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], bool] | None = None,
    ) -> None:
        if bytes_per_s is not None and bytes_per_s < MIN_BYTES_PER_S:
            raise ValueError(f"load_bytes_per_s is {bytes_per_s}, expected at least {MIN_BYTES_PER_S}, or None")
        self._stopped = threading.Event()
        self._clock = clock
        self._sleep = sleep or self._stopped.wait
        self._throttle = None if bytes_per_s is None else Throttle(bytes_per_s, BURST_BYTES)
        self._state = None if self._throttle is None else begin(self._throttle, clock())

    def __call__(self, num_bytes: int) -> None:
        """Returns when so many bytes may have come. Raises LoadError after `stop`."""
        wait_s = 0.0
        if self._throttle is not None and self._state is not None:
            wait_s, self._state = take(self._throttle, self._state, num_bytes, self._clock())
        self.wait(wait_s)

    def wait(self, seconds: float) -> None:
        """Returns after so many seconds. Raises LoadError after `stop`."""
        if self._stopped.is_set() or (seconds > 0 and self._sleep(seconds)):
            raise LoadError("stopped while loading")

    def stop(self) -> None:
        """From any thread: loading ends at its next byte."""
        self._stopped.set()


class LoadThread(ComputeThread):
    """A thread that reads and packs. It stands behind others unless it is `in_front`, as it must be in a process that
    computes rows already: both need Python's lock.
    """

    def __init__(self, name: str, num_threads: int, *, in_front: bool) -> None:
        super().__init__(name, num_threads, None if in_front else step_back)
        self.in_front = in_front


class LayerLoader:
    """Packs one layer of one expert at a time. `progress` counts what was packed, and whence it came.

    `peers` are asked in their order. Without `disk` there are only they; `why_no_disk` is for the error when they fail.
    """

    def __init__(
        self,
        *,
        facts: ModelFacts,
        disk: Checkpoint | None,
        why_no_disk: str,
        peers: Sequence[Peer],
        kernel: str,
        device: torch.device,
        checksums: Mapping[str, int],
        pace: Pace,
        progress: LoadProgress,
    ) -> None:
        self.facts = facts
        self._disk = None if disk is None else disk.paced(pace)
        self._why_no_disk = why_no_disk
        self.peers = peers
        self._kernel = default_kernel(to_torch(facts.stored_dtype), device) if kernel == "auto" else kernel
        self._device = device
        self._checksums = checksums
        self._pace = pace
        self._progress = progress
        self._calibrated: Calibrations = {}

    def load(self, expert: int, layer: int) -> ExpertColumn:
        """Raises LoadError where nobody gives the layer, and what the disk or the kernel raise."""
        column = self._from_peers(expert, layer)
        if column is not None:
            return column
        if self._disk is None:
            asked = ", ".join(peer.address for peer in self.peers) or "nobody"
            raise LoadError(f"expert {expert}, layer {layer}: not had from peers ({asked}), and {self._why_no_disk}")
        column = self._pack(self._disk, expert, layer)
        num_bytes = sum(self._disk.nbytes(f"layers.{layer}.experts.{expert}.{part}") for part in PARTS)
        self._progress.loaded_from_disk_bytes += num_bytes
        self._progress.bytes_loaded += num_bytes
        return column

    def _from_peers(self, expert: int, layer: int) -> ExpertColumn | None:
        for asked in range(1 if self._disk is not None else PATIENT_ROUNDS):
            willing = [peer for peer in self.peers if peer.strikes < MAX_STRIKES]
            if asked and willing:
                self._pace.wait(PAUSE_S)
            for peer in willing:
                column = self._from_peer(peer, expert, layer)
                if column is not None:
                    return column
        return None

    def _from_peer(self, peer: Peer, expert: int, layer: int) -> ExpertColumn | None:
        """None where this peer does not give the layer right."""
        pieces = peer.fetch(expert, layer)
        weights = PeerWeights(pieces, expert, layer, self.facts, self._checksums, self._pace)
        try:
            column = self._pack(weights, expert, layer)
        except PeerError as error:
            peer.strikes += error.is_fault
            LOG.warning("expert %d, layer %d: %s", expert, layer, error)
            return None
        finally:
            pieces.close()
        self._progress.loaded_from_peer_bytes += weights.received_bytes
        self._progress.bytes_loaded += weights.received_bytes
        return column

    def _pack(self, source: TensorReader, expert: int, layer: int) -> ExpertColumn:
        layers = range(layer, layer + 1)
        return ExpertColumn.load(source, expert, layers, self._kernel, self._device, None, self._calibrated)


def open_disk(model: str, checksums: Mapping[str, int]) -> Checkpoint:
    """The checkpoint on this machine, held to these checksums. Raises as `Checkpoint.open` does."""
    return Checkpoint.open(Path(model)).expecting(checksums)


def check_range(facts: ModelFacts, expert: int, layers: range) -> None:
    """Raises LoadError for what the model does not have."""
    if not 0 <= expert < facts.num_experts:
        raise LoadError(f"expert {expert} does not exist: the model has {facts.num_experts}")
    if not layers or layers.start < 0 or layers.stop > facts.num_layers:
        raise LoadError(f"layers {layers.start}..{layers.stop - 1} are not within 0..{facts.num_layers - 1}")
