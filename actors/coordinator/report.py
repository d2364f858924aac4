"""How a coordinator describes itself: its state, and its counters as the wire and as the supervisor read them."""

import os
from collections.abc import Sequence
from typing import Any

from actors.coordinator.engine import Engine
from actors.coordinator.grammars import Grammars
from actors.coordinator.loading import LoadedModel, LoadProgress
from actors.dispatch.remote_experts import RemoteStats, ReplicaStanding
from cluster.load import IntArray
from cluster.replica_times import ReplicaReport
from model.phase_times import PhaseTimes
from protos.coordinator_pb2 import LayerLoad, ReplicaHealth, ReplicaTimes, SnapshotReply


class CoordinatorReport:
    """`state` is loading, ready, draining or failed; `detail` says what it waits for or why it failed."""

    def __init__(self, coordinator_id: str, node_id: str, block_size: int) -> None:
        self.coordinator_id = coordinator_id
        self.node_id = node_id
        self.block_size = block_size
        self.address = ""
        self.state = "loading"
        self.detail = ""
        self.progress = LoadProgress()

    def turn(self, state: str, detail: str = "") -> None:
        """A new state."""
        self.state, self.detail = state, detail

    def snapshot(
        self,
        model: LoadedModel | None,
        engine: Engine | None,
        map_epoch: int,
        stats: RemoteStats | None,
        standings: Sequence[ReplicaStanding] = (),
        waiting_for: str = "",
        times: Sequence[ReplicaReport] = (),
    ) -> SnapshotReply:
        """What is known so far; a coordinator without a model, an engine or experts leaves their fields at 0.

        `waiting_for` is what its steps wait for, and its detail where it has no other.
        """
        reply = SnapshotReply(
            coordinator_id=self.coordinator_id,
            pid=os.getpid(),
            node_id=self.node_id,
            address=self.address,
            state=self.state,
            detail=self.detail or (f"waiting for {waiting_for}" if waiting_for else ""),
            map_epoch=map_epoch,
            kv_block_size=self.block_size,
        )
        if model is not None:
            reply.kernel = model.backbone.kernel
            reply.numerics_domain = model.backbone.numerics_domain
            reply.weight_bytes = model.backbone.weight_bytes
            reply.weights_id = model.weights_id
            _add_phases(reply, model.backbone.times)
        if engine is not None:
            _add_engine(reply, engine)
        if stats is not None:
            _add_experts(reply, stats)
        reply.replica_health.extend(_health(one) for one in standings)
        reply.replica_times.extend(_times(one) for one in times)
        return reply

    def info(self, snapshot: SnapshotReply) -> dict[str, Any]:
        """A snapshot and the loading progress as plain values; `node` is `node_id`, loads are lists per layer,
        `replica_health` and `replica_times` are lists of dicts.
        """
        facts: dict[str, Any] = {one.name: getattr(snapshot, one.name) for one in snapshot.DESCRIPTOR.fields}
        for name in ("load", "window_load", "divisible_load"):
            facts[name] = [list(layer.tokens) for layer in facts[name]]
        for name in ("replica_health", "replica_times"):
            facts[name] = [
                {field.name: getattr(one, field.name) for field in one.DESCRIPTOR.fields} for one in facts[name]
            ]
        return facts | {
            "node": self.node_id,
            "loaded_bytes": self.progress.loaded_bytes,
            "bytes_total": self.progress.total_bytes,
            "load_s": self.progress.load_s,
        }


def _add_engine(reply: SnapshotReply, engine: Engine) -> None:
    scheduler, load = engine.scheduler, engine.load
    load.roll(engine.now())
    reply.num_running = scheduler.num_running
    reply.num_waiting = scheduler.num_waiting
    reply.num_waiting_tenants = scheduler.num_waiting_tenants
    reply.displaced_total = engine.counters.displaced
    reply.kv_blocks_total = scheduler.blocks.num_blocks
    reply.kv_blocks_free = scheduler.blocks.num_free
    reply.steps_total = scheduler.counters.steps
    reply.prompt_tokens_total = scheduler.counters.prompt_tokens
    reply.generated_tokens_total = scheduler.counters.generated_tokens
    reply.preemptions_total = scheduler.counters.preemptions
    reply.draft_tokens_total = scheduler.counters.draft_tokens
    reply.accepted_draft_tokens_total = scheduler.counters.accepted_draft_tokens
    reply.prefix_queries_tokens_total = scheduler.counters.prefix_queries
    reply.prefix_hits_tokens_total = scheduler.counters.prefix_hits
    reply.kv_blocks_cached = scheduler.blocks.num_cached
    reply.max_model_len = scheduler.max_model_len
    reply.step_s_total = engine.counters.step_s
    reply.expert_wait_s_total = engine.counters.expert_wait_s
    reply.sampling_s_total = engine.counters.sampling_s
    tap = engine.routing.tap
    reply.trace_listeners = tap.num_listeners
    reply.trace_tokens_total = tap.tokens_total
    reply.trace_dropped_tokens_total = tap.dropped_total
    reply.load.extend(_layers(load.total))
    reply.window_load.extend(_layers(load.window.load))
    reply.divisible_load.extend(_layers(load.divisible))
    reply.batches_total = load.batches
    reply.window_s = load.window.covered_s
    reply.queue_s = engine.live.queue_s(engine.now())


def add_grammars(reply: SnapshotReply, grammars: Grammars) -> None:
    """What following grammars took so far."""
    reply.grammars_compiled_total = grammars.counters.compiled
    reply.grammars_refused_total = grammars.counters.refused
    reply.grammar_hits_total = grammars.counters.hits
    reply.grammar_masks_total = grammars.masks.masks
    reply.grammar_mask_s_total = grammars.masks.seconds


def _add_phases(reply: SnapshotReply, times: PhaseTimes) -> None:
    reply.prepare_s_total = times.prepare_s
    reply.attention_s_total = times.attention_s
    reply.router_s_total = times.router_s
    reply.dispatch_s_total = times.dispatch_s
    reply.combine_s_total = times.combine_s
    reply.head_s_total = times.head_s


def _add_experts(reply: SnapshotReply, stats: RemoteStats) -> None:
    """All that is read of what dispatch counts."""
    reply.expert_retries_total = stats.retries
    reply.expert_calls_total = stats.calls
    reply.hedges_total = stats.hedges
    reply.hedges_won_total = stats.hedges_won
    reply.expert_compute_us_total = stats.compute_us
    reply.expert_queue_us_total = stats.queue_us
    reply.wire_messages_total = stats.wire.messages
    reply.wire_bytes_sent_total = stats.wire.bytes_sent
    reply.wire_bytes_received_total = stats.wire.bytes_received


def _health(one: ReplicaStanding) -> ReplicaHealth:
    return ReplicaHealth(
        replica_id=one.replica_id, state=one.state, detail=one.detail, ejections_total=one.ejections_total
    )


def _times(one: ReplicaReport) -> ReplicaTimes:
    return ReplicaTimes(
        replica_id=one.replica_id,
        calls_total=one.calls_total,
        tokens_total=one.tokens_total,
        compute_us_total=one.compute_us_total,
        a_us=one.a_s * 1e6,
        b_us=one.b_s * 1e6,
        busy_share=one.busy_share,
    )


def _layers(load_LE: IntArray) -> list[LayerLoad]:
    return [LayerLoad(tokens=load_E) for load_E in load_LE.tolist()]
