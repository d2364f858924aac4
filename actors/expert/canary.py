"""Watches over one replica's memory and arithmetic: known rows, again and again, whose answers must not change.

What each layer of each expert answers is learnt right after its weights were read and held to their checksums. From
then on one after the other is asked again in the compute thread, after everything that waits there, at a pace that
covers all of them in `pass_s` seconds but takes no more than a small share of the time. An answer that differs
condemns the replica at once. What it answered since the canary before is not to be had back.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from actors.expert.compute_thread import LAST, ComputeThread
from actors.expert.replica import Column, ExpertReplica
from protos.expert_pb2 import REPLICA_STATE_FAILED

LOG = logging.getLogger(__name__)

PASS_S = 20.0
IDLE_SHARE = 0.05
BUSY_SHARE = 0.01
PATIENCE_S = 1.0
"""A canary that found no gap for so long is the next one to run: a replica that is never idle is watched, too."""


def pause_s(num_canaries: int, cost_s: float, *, busy: bool, pass_s: float = PASS_S) -> float:
    """How long to wait between two canaries of `cost_s` each.

    >>> pause_s(30, 0.001, busy=True), pause_s(30, 0.02, busy=True), pause_s(30, 0.02, busy=False)
    (0.6666666666666666, 2.0, 0.6666666666666666)
    """
    return max(pass_s / num_canaries, cost_s / (BUSY_SHARE if busy else IDLE_SHARE))


class Canaries:
    """One replica's. `on_failure` is called in the compute thread, when the replica has failed already."""

    def __init__(
        self,
        replica: ExpertReplica,
        compute: ComputeThread,
        on_failure: Callable[[], None],
        *,
        pass_s: float = PASS_S,
        patience_s: float = PATIENCE_S,
    ) -> None:
        self._replica = replica
        self._compute = compute
        self._on_failure = on_failure
        self._pass_s = pass_s
        self._patience_s = patience_s
        self._known: dict[tuple[int, int], bytes] = {}
        self._cost_s = 0.0
        self._tokens_seen = 0

    async def learn(self, expert: int, column: Column) -> None:
        """Remembers what a column answers that was loaded just now; layer by layer, so that others get their turn."""
        for layer in sorted(column.layers):
            self._known[layer, expert] = await self._compute.call(partial(column.canary, layer))

    async def watch(self) -> None:
        """Until the replica fails, or for ever."""
        while self._known:
            for layer, expert in sorted(self._known):
                busy = self._is_busy()
                await asyncio.sleep(pause_s(len(self._known), self._cost_s, busy=busy, pass_s=self._pass_s))
                await self.check(layer, expert)
                if self._replica.state == REPLICA_STATE_FAILED:
                    return

    async def check(self, layer: int, expert: int) -> None:
        """One canary, when the compute thread has nothing better to do, or after `patience_s` in any case."""
        done, begun = asyncio.Event(), False
        loop = asyncio.get_running_loop()

        def look() -> None:
            nonlocal begun
            if begun:
                return
            begun = True
            try:
                self._look(layer, expert)
            finally:
                loop.call_soon_threadsafe(done.set)

        self._compute.submit(look, LAST)
        try:
            async with asyncio.timeout(self._patience_s):
                await done.wait()
        except TimeoutError:
            self._compute.submit(look)
            await done.wait()

    def _look(self, layer: int, expert: int) -> None:
        """In the compute thread."""
        column = self._replica.find(layer, expert)
        if column is None or self._replica.state == REPLICA_STATE_FAILED:
            return
        began_s = time.monotonic()
        wrong = self._what_is_wrong(column, layer, expert)
        cost_s = time.monotonic() - began_s
        self._cost_s = cost_s if not self._cost_s else 0.9 * self._cost_s + 0.1 * cost_s
        self._replica.counters.canaries_total += 1
        self._replica.counters.canary_us_total += int(cost_s * 1e6)
        if wrong:
            self._replica.fail(f"quarantined: canary of expert {expert}, layer {layer}: {wrong}")
            LOG.critical("%s: %s", self._replica.replica_id, self._replica.detail)
            self._on_failure()

    def _what_is_wrong(self, column: Column, layer: int, expert: int) -> str:
        try:
            same = column.canary(layer) == self._known[layer, expert]
        except Exception as error:  # a device that cannot compute known rows any more must not compute others
            LOG.exception("%s: a canary raised", self._replica.replica_id)
            return f"{type(error).__name__}: {error}"
        return "" if same else "the answer to known rows is not what it was"

    def _is_busy(self) -> bool:
        tokens = self._replica.counters.tokens_total
        busy = tokens != self._tokens_seen or self._replica.inflight_tokens > 0
        self._tokens_seen = tokens
        return busy
