"""What a cluster will consist of, worked out from its configuration, the checkpoint and the GPUs there are.

Pure values: which processes, on which devices, with which arguments, environment and memory. Starting them is the
supervisor's work; where they go is decided in `cluster.placement`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from actors.expert.model_facts import ModelFacts
from cluster.budget import ActorNeed, PackedAs, choose_kv_bytes, packed_bytes
from cluster.config import OWN_NODE, ClusterConfig, Device
from cluster.desired import DesiredReplica, desired_replicas
from cluster.desired_set import DesiredSet, Footprint
from cluster.ids import CoordinatorId
from cluster.layout import Grain
from model.kernel_choice import ROUNDING, cpu_packs_half, lossless_kernel
from model.storage.ledger import COORDINATOR, Expert, Ledger, Owner


@dataclass(frozen=True, slots=True)
class Blueprint:
    """A cluster on paper. `total_gpus` is what all its nodes have together."""

    config: ClusterConfig
    checkpoint: Ledger
    total_gpus: float

    @property
    def experts_device(self) -> Device:
        """cpu or cuda: `auto` takes GPUs where there are any."""
        asked = self.config.experts_device
        return asked if asked != "auto" else ("cuda" if self.total_gpus > 0 else "cpu")

    @property
    def device(self) -> Device:
        """The coordinators' device: `auto` takes GPUs that the experts leave."""
        if self.config.device != "auto":
            return self.config.device
        taken = sum(replica.gpu for replica in self.replicas())
        return "cuda" if self.total_gpus - taken >= self.gpus_per_coordinator * self.config.coordinators else "cpu"

    @property
    def gpus_per_coordinator(self) -> float:
        """A whole GPU, unless the experts were told to share theirs."""
        share = self.config.expert_num_gpus
        return share if share is not None and 0 < share < 1 else 1.0

    @property
    def coordinator_ids(self) -> tuple[CoordinatorId, ...]:
        """coordinator-0, coordinator-1, …"""
        return tuple(CoordinatorId(f"coordinator-{index}") for index in range(self.config.coordinators))

    def replicas(self) -> tuple[DesiredReplica, ...]:
        """The expert replicas that should exist, not yet placed."""
        shape = self.checkpoint.config
        on_gpu = self.experts_device == "cuda"
        first = range(self.config.experts_per_actor)
        need = self._need("expert", [Expert(expert) for expert in first], self.experts_device)
        return desired_replicas(
            self.config,
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            experts_on_gpu=on_gpu,
            memory_bytes=need.host_bytes,
        )

    def desired(self) -> DesiredSet:
        """The same as a set that balancing may change."""
        shape, replicas = self.checkpoint.config, self.replicas()
        one = self._need("expert", [Expert(0)], self.experts_device)
        layer_bytes = -(-one.weight_bytes // shape.num_layers)
        footprint = Footprint(
            gpu=replicas[0].gpu,
            base_bytes=one.host_bytes if one.on_gpu else one.host_bytes - one.weight_bytes,
            host_layer_bytes=0 if one.on_gpu else layer_bytes,
            layer_bytes=layer_bytes,
        )
        return DesiredSet(
            num_layers=shape.num_layers,
            num_experts=shape.num_experts,
            min_copies=self.config.replicas,
            footprint=footprint,
            replicas=replicas,
        )

    def grain(self) -> Grain:
        """What balancing moves: an expert in each of the configured ranges of layers."""
        shape = self.checkpoint.config
        return Grain.even(
            shape.num_layers,
            shape.num_experts,
            num_ranges=self.config.balance_layer_ranges,
            layer_bytes=self.desired().footprint.layer_bytes,
        )

    def needs(self, available_bytes: int) -> tuple[ActorNeed, ...]:
        """Memory of every actor, for a machine with `available_bytes` of memory. Raises BudgetError."""
        experts = [
            self._need(replica.replica_id, [Expert(e) for e in replica.expert_ids], self.experts_device)
            for replica in self.replicas()
        ]
        on_gpu = self.device == "cuda"
        kv_bytes = 0 if on_gpu else choose_kv_bytes(self.config.kv_cache_bytes, available_bytes, on_gpu=False)
        coordinators = [
            self._need(coordinator_id, [COORDINATOR], self.device, kv_bytes=kv_bytes)
            for coordinator_id in self.coordinator_ids
        ]
        return (*coordinators, *experts)

    def bind_host(self, address: str) -> str:
        """Where a process listens on the node with this address."""
        return address if self.config.bind_host == OWN_NODE else self.config.bind_host

    def expert_kwargs(
        self,
        replica: DesiredReplica,
        token: str,
        address: str,
        *,
        sources: Sequence[str] = (),
        load_bytes_per_s: int | None = None,
        gentle: bool = False,
    ) -> Mapping[str, Any]:
        """Arguments of `actors.expert.actor.ExpertActor` on the node with this address.

        `sources` are addresses of replicas to load from first; a `gentle` one lets those that serve go before.
        """
        return {
            "replica_id": replica.replica_id,
            "expert_ids": list(replica.expert_ids),
            "first_layer": replica.first_layer,
            "num_layers": replica.num_layers,
            "node_id": replica.node_id or "",
            "device": self.experts_device,
            "threads": self.config.expert_threads,
            "lane": self.config.transport != "grpc",
            "bind_host": self.bind_host(address),
            "checksums": self._checksums(*(Expert(expert) for expert in replica.expert_ids)),
            "sources": list(sources),
            "load_bytes_per_s": load_bytes_per_s,
            "gentle": gentle,
            "model_facts": ModelFacts.of(self.checkpoint).plain(),
            **self._common(token),
        }

    def coordinator_kwargs(
        self, coordinator_id: CoordinatorId, node_id: str, token: str, threads: int, address: str
    ) -> Mapping[str, Any]:
        """Arguments of `actors.coordinator.actor.Coordinator` on the node with this address."""
        config = replace(
            self.config,
            device=self.device,
            coordinator_threads=threads,
            auth_token=None,
            bind_host=self.bind_host(address),
        )
        return {
            "coordinator_id": coordinator_id,
            "config": config,
            "auth_token": token,
            "node_id": node_id,
            "checksums": self._checksums(COORDINATOR),
        }

    def _checksums(self, *owners: Owner) -> dict[str, int]:
        """What the tensors of these owners are held to, on whatever machine they are read."""
        known = self.checkpoint.checksums
        return {name: known[name] for owner in owners for name in self.checkpoint.names(owner) if name in known}

    def _common(self, token: str) -> dict[str, Any]:
        config = self.config
        return {
            "model": config.model,
            "kernel": config.kernel,
            "auth_token": token,
            "tls_cert": config.tls_cert,
            "tls_key": config.tls_key,
            "tls_ca": config.tls_ca,
            "tls_server_name": config.tls_server_name,
        }

    def _need(self, name: str, owners: list[Owner], device: str, *, kv_bytes: int = 0) -> ActorNeed:
        checkpoint = self.checkpoint
        asked = self.config.kernel
        dtype = checkpoint.stored_dtype
        lossless = lossless_kernel(dtype, device, packs_half=cpu_packs_half())
        kernel = lossless if asked == "auto" or (COORDINATOR in owners and asked in ROUNDING) else asked
        stored = sum(checkpoint.owned_bytes(owner) for owner in owners)
        names = [tensor for owner in owners for tensor in checkpoint.names(owner)]
        elements = dtype.itemsize
        largest = max(checkpoint.nbytes(tensor) // elements * 4 for tensor in names)
        return ActorNeed(
            name=name,
            weight_bytes=packed_bytes(stored, elements, cast(PackedAs, kernel)),
            largest_tensor_bytes=largest,
            kv_bytes=kv_bytes,
            on_gpu=device == "cuda",
        )


def process_env(threads: int) -> Mapping[str, str]:
    """Environment of a process that computes with `threads` threads.

    Waiting threads sleep: active waiting collapses when cores are scarce. Nothing in it must be there when the process
    begins (see `actors.process_start`).
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "GRPC_VERBOSITY": "ERROR",
    }
