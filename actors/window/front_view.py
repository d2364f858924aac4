"""The window of one front door: it looks through what /metrics looks through, and so asks nobody more often."""

import json
import time
from collections.abc import Callable

from prometheus_client import Histogram

from actors.front.front_door import FrontDoor
from actors.front.metrics import FrontMetrics
from actors.metrics.facts import facts_of
from actors.window.broadcast import Broadcast, Frame
from actors.window.reading import Buckets, FrontCounts, History, Reading
from actors.window.snapshot import make_snapshot

ENDING = "draining"


class FrontView:
    """Makes a frame of every look, for all viewers of this front door."""

    def __init__(self, front: FrontDoor, clock: Callable[[], float] = time.monotonic) -> None:
        self.broadcast = Broadcast(self.look)
        self._front = front
        self._clock = clock
        self._history = History()

    async def look(self) -> Frame:
        """One snapshot, as an event. While the cluster drains it is a stream's last: nobody holds up the end."""
        await self._front.scrape.refresh()
        reading = self._read()
        self._history = self._history.after(reading)
        snapshot = make_snapshot(reading, self._history, "ingress")
        text = json.dumps(snapshot, separators=(",", ":"), allow_nan=False)
        return Frame(f"event: snapshot\ndata: {text}\n\n".encode("ascii"), snapshot["cluster"]["state"] == ENDING)

    def _read(self) -> Reading:
        front = self._front
        facts = [facts_of(reply) for reply in front.coordinators.last_snapshots.values() if reply.coordinator_id]
        return Reading(
            at_s=front.wall_clock(),
            clock_s=self._clock(),
            status=front.status.last,
            status_age_s=front.status.age_s,
            coordinators=facts,
            coordinators_age_s=front.coordinators.last_snapshots_age_s,
            front=counts_of(front.metrics),
        )


def counts_of(metrics: FrontMetrics) -> FrontCounts:
    """What the front door has counted until now."""
    return FrontCounts(
        num_inflight=int(next(iter(metrics.inflight.collect())).samples[0].value),
        ttft=_buckets(metrics.ttft),
        itl=_buckets(metrics.itl),
    )


def _buckets(histogram: Histogram) -> Buckets:
    (family,) = histogram.collect()
    found = [one for one in family.samples if one.name.endswith("_bucket")]
    return Buckets(tuple(float(one.labels["le"]) for one in found), tuple(int(one.value) for one in found))
