"""Steps of a whole Mixtral 8x7B in one process on one GPU: decode and prefill, against the weights they must read.

Weights are random and made on the device. Sampling is greedy and part of a step; planning, transport and HTTP are not.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median

import torch
from torch import Tensor

from experiments.gpu_bench.random_weights import RandomWeights
from experiments.gpu_bench.timing import Ceilings
from model.batch import ForwardBatch
from model.dispatch import DispatchPlan
from model.experts import LocalExperts
from model.kv_cache import KVCache, default_kv_dtype
from model.sampling.sampler import Sampled, SamplerState, SamplingParams, sample
from model.transformer import Backbone, load_local, run_local

BLOCK = 32
CONTEXT = 512
_STEPS = 12


@dataclass(frozen=True, slots=True)
class StepSpeed:
    """One kind of step. `busy` is the share of its time in which the GPU computed; the floor reads each weight once."""

    kernel: str
    layers: int
    kind: str
    tokens: int
    step_ms: float
    floor_ms: float
    active_experts: float
    busy: float
    launches: int

    def to_json(self) -> dict[str, object]:
        """A line of the report."""
        return {"type": "step", **asdict(self), "tok_s": 1e3 * self.tokens / self.step_ms}


class _Counting(LocalExperts):
    """Counts the experts that are asked."""

    asked = 0

    def run(self, layer: int, plan: DispatchPlan) -> Tensor:
        self.asked += sum(count > 0 for count in plan.counts)
        return super().run(layer, plan)


class Model:
    """Mixtral 8x7B with as many layers as are asked for."""

    def __init__(self, kernel: str, layers: int, most_tokens: int) -> None:
        self.kernel = kernel
        self.weights = RandomWeights.of(layers=layers)
        self.backbone: Backbone
        self.backbone, local = load_local(self.weights, kernel, "cuda")
        self.experts = _Counting(local.columns)
        blocks = most_tokens // BLOCK
        self.kv = KVCache(self.weights.config, blocks, BLOCK, default_kv_dtype("cuda"), "cuda")
        for layer in range(layers):
            self.kv.kv(layer).normal_()
        self._expert_bytes = local.columns[0].weight_bytes / layers

    def step(self, batch: ForwardBatch, states: Sequence[SamplerState]) -> list[int]:
        """A token for each sequence."""
        logits = run_local(self.backbone, batch, self.kv, self.experts)
        return [one.token for one in sample(logits, states, [None] * len(states)) if isinstance(one, Sampled)]

    def measure(self, kind: str, batch: ForwardBatch, count: int, ceilings: Ceilings) -> StepSpeed:
        """Medians over a few steps, and one under the profiler."""
        states = [SamplerState(SamplingParams(temperature=0.0), []) for _ in range(count)]
        spent: list[float] = []
        for number in range(_STEPS + 3):
            self.experts.asked = 0
            began_s = time.perf_counter()
            assert len(self.step(batch, states)) == count
            if number >= 3:
                spent.append(time.perf_counter() - began_s)
        step_s, asked = median(spent), self.experts.asked
        kernels_s, launches = self._profiled(batch, states)
        kv_bytes = sum(item.context_len for item in batch.sequences) * self.kv.nbytes / (self.kv.num_blocks * BLOCK)
        read = self.weights.backbone_bytes + asked * self._expert_bytes + kv_bytes
        layers = self.weights.config.num_layers
        return StepSpeed(
            self.kernel,
            layers,
            kind,
            batch.num_tokens,
            1e3 * step_s,
            1e3 * read / ceilings.copy_bytes_s,
            asked / layers,
            kernels_s / step_s,
            launches,
        )

    def _profiled(self, batch: ForwardBatch, states: Sequence[SamplerState]) -> tuple[float, int]:
        """Seconds in which kernels ran in one step, and how many there were."""
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            self.step(batch, states)
            torch.cuda.synchronize()
        events = [event for event in profile.events() if event.device_type.name == "CUDA"]
        return sum(event.device_time for event in events) / 1e6, len(events)


def decode_batch(sequences: int) -> ForwardBatch:
    """Each sequence's next token, at contexts of 512 tokens."""
    blocks = CONTEXT // BLOCK
    tables = [range(at * blocks, (at + 1) * blocks) for at in range(sequences)]
    return ForwardBatch.build([[7 + 3 * at] for at in range(sequences)], [CONTEXT - 1] * sequences, tables)


def prefill_batch(tokens: int) -> ForwardBatch:
    """One prompt."""
    return ForwardBatch.build([[(7 * at) % 32000 for at in range(tokens)]], [0], [range(tokens // BLOCK)])
