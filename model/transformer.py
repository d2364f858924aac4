"""The backbone: embeddings, attention, norms, routers and the output head; everything but the experts.

A layer is cut in two halves around its experts, and `Backbone.forward` is a generator that stops there, so
that the single process and the cluster share every line but the call that computes experts. Experts are
`model.experts`' work, kernels `model.kernels`', exactness under batching `model.numerics`'.

Activations are fp32 everywhere. On CUDA weights are bf16, but for the routers', and products plain torch.

Tensor suffixes: T tokens, D model dim, E experts, N routed rows, H query heads, G kv heads, d head_dim, M
rows of one call, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Generator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from model.attention import AttentionStep, PagedAttention
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.device_calls import prepare_device, upload
from model.dispatch import Answers, DispatchPlan, combine, dispatch
from model.experts import Calibrations, ExpertColumn, LocalExperts, OnTensor
from model.kernels import Kernel, PackedLinear, backbone_kernel, default_kernel, get_kernel, numerics_domain, self_test
from model.kv_cache import KVCache, write_kv
from model.memory import release_freed_memory
from model.numerics import RowClass, RowFunction, calibrate_rows, map_rows, row_candidates
from model.phase_times import PhaseTimes
from model.rope import RotaryTable, apply_rope_
from model.storage.weight_source import WeightSource


@dataclass(frozen=True, slots=True, eq=False)
class ExpertCall:
    """What `Backbone.forward` asks for: the rows of `plan` through the experts of `layer`.

    In a dense model (one expert) `plan.x_ND` is every token's normalised input to the feed-forward, in
    token order.
    """

    layer: int
    plan: DispatchPlan


@dataclass(frozen=True, slots=True, eq=False)
class RMSNorm:
    """RMSNorm (arXiv 1910.07467) in few operations: torch's own takes many, each over the whole input."""

    weight_D: Tensor
    eps_111: Tensor

    def __call__(self, x_MD: Tensor) -> Tensor:
        """The rows divided by the root of their mean square, times the weight."""
        x_M1D = x_MD.unsqueeze(1)
        mean_M11 = torch.baddbmm(self.eps_111, x_M1D, x_M1D.transpose(1, 2), alpha=1.0 / x_MD.shape[1])
        return (x_MD * mean_M11.view(-1, 1).rsqrt_()).mul_(self.weight_D)


@dataclass(frozen=True, slots=True, eq=False)
class DeviceRMSNorm:
    """The same on a GPU, where torch's own is one kernel."""

    weight_D: Tensor
    eps: float

    def __call__(self, x_MD: Tensor) -> Tensor:
        """As RMSNorm."""
        return functional.rms_norm(x_MD, self.weight_D.shape, self.weight_D, self.eps)


@dataclass(frozen=True, slots=True, eq=False)
class NormedLinear:
    """RMSNorm and then a product, as one row-wise function, so that both are calibrated together."""

    norm: RowFunction
    linear: PackedLinear

    def __call__(self, x_MD: Tensor) -> Tensor:
        """The product of the normalised rows."""
        return self.linear(self.norm(x_MD))

    def stages(self, x_MD: Tensor) -> Tensor:
        """The normalised rows and their product, side by side."""
        x_MD = self.norm(x_MD)
        return torch.cat((x_MD, self.linear(x_MD)), dim=1)


@dataclass(frozen=True, slots=True, eq=False)
class Rowwise:
    """A row-wise function with the row class that makes it independent of batching."""

    fn: RowFunction
    row_class: RowClass

    def __call__(self, x_MI: Tensor) -> Tensor:
        return map_rows(self.fn, x_MI, self.row_class)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's share of the backbone: norm and q, k, v; the output product; the experts' norm; the gate, if any."""

    qkv: Rowwise
    output: Rowwise
    ffn_norm: Rowwise
    gate: Rowwise | None

    @property
    def row_classes(self) -> tuple[RowClass, ...]:
        """Those of all parts."""
        parts = (self.qkv, self.output, self.ffn_norm, self.gate)
        return tuple(part.row_class for part in parts if part is not None)


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of one forward share."""

    kv: KVCache
    attention: AttentionStep
    cos_T1d: Tensor
    sin_T1d: Tensor


class Backbone:
    """A model without its experts. `Backbone.load` is the way to get one."""

    def __init__(
        self,
        config: ModelConfig,
        embed_VD: Tensor,
        layers: tuple[Layer, ...],
        head: Rowwise,
        weight_bytes: int,
        kernel: str,
    ) -> None:
        self.config = config
        self.device = embed_VD.device
        self.weight_bytes = weight_bytes
        self.kernel = kernel
        self.times = PhaseTimes()
        self._embed_VD = embed_VD
        self._layers = layers
        self._head = head
        self._attention = PagedAttention(config, self.device)
        self._rope = RotaryTable(config, self.device)

    @classmethod
    def load(
        cls,
        checkpoint: WeightSource,
        kernel: str,
        device: torch.device | str,
        on_tensor: OnTensor | None = None,
    ) -> "Backbone":
        """Read and pack tensor by tensor: memory peaks at the packed weights and one tensor in fp32.

        `on_tensor(name, bytes held)` is called after each. A `kernel` that is for experts stands for the
        checkpoint's default here. Raises KernelError or CheckpointError.
        """
        kernel = backbone_kernel(kernel, checkpoint.dtype, device)
        prepare_device(device)
        self_test(kernel, device)
        return _BackboneLoader(checkpoint, kernel, torch.device(device), on_tensor).load()

    @property
    def numerics_domain(self) -> str:
        """Everything that decides the bits of logits, but the weights and the experts."""
        classes = {str(row_class) for layer in self._layers for row_class in layer.row_classes}
        parts = {
            "kernel": self.kernel,
            "rows": "/".join(sorted(classes)),
            "head_rows": str(self._head.row_class),
            "attention_rows": self._attention.numerics,
        }
        return numerics_domain(self.device, parts)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Generator[ExpertCall, Answers, Tensor]:
        """One step. Yields an ExpertCall per layer, is sent its out_ND, and returns logits_RV in fp32.

        Keys and values of the batch's tokens are written to `kv`. ValueError for a token outside the
        vocabulary, a position past the model's context or a block table that is too short; nothing has been
        written then.
        """
        step, h_TD = self.begin(batch, kv)
        for index in range(len(self._layers)):
            h_TD, plan = self.before_experts(index, h_TD, step)
            answers = yield ExpertCall(index, plan)
            h_TD = self.after_experts(h_TD, answers, plan)
        return self.logits(h_TD, batch.logits_rows)

    @torch.inference_mode()
    def begin(self, batch: ForwardBatch, kv: KVCache) -> tuple[Step, Tensor]:
        """The step's plan, and the embedded tokens h_TD."""
        began_s = perf_counter()
        ids_T = batch.token_ids_T
        if int(ids_T.min()) < 0 or int(ids_T.max()) >= self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        cos_T1d, sin_T1d = self._rope.rows(batch.positions_T)
        step = Step(kv, self._attention.plan(batch, kv.block_size), cos_T1d, sin_T1d)
        h_TD = functional.embedding(upload(ids_T, self.device), self._embed_VD).to(torch.float32)
        self.times.prepare_s += perf_counter() - began_s
        return step, h_TD

    def before_experts(self, index: int, h_TD: Tensor, step: Step) -> tuple[Tensor, DispatchPlan]:
        """The layer's first half: attention added to h_TD, and the rows for its experts."""
        h_TD, x_TD, logits_TE = self._attend_and_route(self._layers[index], step.kv.kv(index), h_TD, step)
        began_s = perf_counter()
        plan = dispatch(x_TD, logits_TE, self.config.top_k)
        self.times.dispatch_s += perf_counter() - began_s
        return h_TD, plan

    @torch.inference_mode()
    def _attend_and_route(self, layer: Layer, kv: Tensor, h_TD: Tensor, step: Step) -> tuple[Tensor, Tensor, Tensor]:
        """h_TD with attention added, normalised for the experts, and router logits.

        A dense model has no router, and its only expert needs no score.
        """
        began_s = perf_counter()
        heads, kv_heads = self.config.num_heads, self.config.num_kv_heads
        qkv_TXd = layer.qkv(h_TD).view(len(h_TD), heads + 2 * kv_heads, self.config.head_dim)
        apply_rope_(qkv_TXd[:, : heads + kv_heads], step.cos_T1d, step.sin_T1d)
        write_kv(kv, step.attention.slots_T, qkv_TXd[:, heads:], step.attention.cleared)
        mixed_TX = self._attention.run(qkv_TXd[:, :heads], kv, step.attention)
        h_TD = layer.output(mixed_TX).add_(h_TD)
        attended_s = perf_counter()
        x_TD = layer.ffn_norm(h_TD)
        logits_TE = x_TD.new_zeros(len(x_TD), 1) if layer.gate is None else layer.gate(x_TD)
        self.times.attention_s += attended_s - began_s
        self.times.router_s += perf_counter() - attended_s
        return h_TD, x_TD, logits_TE

    def after_experts(self, h_TD: Tensor, answers: Answers, plan: DispatchPlan) -> Tensor:
        """The layer's second half: the experts' answers combined and added."""
        began_s = perf_counter()
        h_TD = h_TD + combine(answers, plan)
        self.times.combine_s += perf_counter() - began_s
        return h_TD

    @torch.no_grad()
    def logits(self, h_TD: Tensor, rows: tuple[int, ...]) -> Tensor:
        """logits_RV of the chosen rows, fp32."""
        began_s = perf_counter()
        logits_RV = self._head(h_TD.index_select(0, upload(torch.tensor(rows, dtype=torch.long), self.device)))
        self.times.head_s += perf_counter() - began_s
        return logits_RV


class _BackboneLoader:
    """Reads a checkpoint's share of the backbone, in order of use, keeping count."""

    def __init__(self, checkpoint: WeightSource, kernel: str, device: torch.device, on_tensor: OnTensor | None) -> None:
        self._checkpoint = checkpoint
        self._config = checkpoint.config
        self._kernel = get_kernel(kernel, device)
        self._device = device
        self._on_tensor = on_tensor
        self._calibrated: Calibrations = {}
        self._kernels: set[str] = set()
        self._bytes = 0

    def load(self) -> Backbone:
        embed_VD = self._vector("embed", None)
        layers = tuple(self._layer(f"layers.{index}") for index in range(self._config.num_layers))
        norm = self._norm("norm")
        name = "embed" if self._config.tied_embeddings else "lm_head"
        head = self._rowwise("head", self._linear(name), norm)
        return Backbone(self._config, embed_VD, layers, head, self._bytes, "+".join(sorted(self._kernels)))

    def _layer(self, prefix: str) -> Layer:
        attn_norm = self._norm(f"{prefix}.attn_norm")
        qkv = self._rowwise("qkv", self._linear(*(f"{prefix}.{part}" for part in ("wq", "wk", "wv"))), attn_norm)
        output = self._rowwise("output", self._linear(f"{prefix}.wo"))
        norm = self._norm(f"{prefix}.ffn_norm")
        width = self._config.hidden_size
        ffn_norm = Rowwise(norm, self._row_class("norm", norm, width, 1))
        gate = self._rowwise("gate", self._gate(f"{prefix}.gate")) if self._config.is_moe else None
        return Layer(qkv, output, ffn_norm, gate)

    def _norm(self, name: str) -> RowFunction:
        weight_D = self._vector(name, torch.float32)
        if self._device.type == "cuda":
            return DeviceRMSNorm(weight_D, self._config.norm_eps)
        return RMSNorm(weight_D, torch.full((1, 1, 1), self._config.norm_eps, device=self._device))

    def _rowwise(self, role: str, linear: PackedLinear, norm: RowFunction | None = None) -> Rowwise:
        shape = (linear.in_features, linear.out_features, linear.kernel)
        if norm is None:
            return Rowwise(linear, self._row_class(role, linear, *shape))
        normed = NormedLinear(norm, linear)
        return Rowwise(normed, self._row_class(role, normed.stages, *shape))

    def _row_class(self, role: str, fn: RowFunction, width: int, outputs: int, kernel: str = "") -> RowClass:
        """Calibrated once per role, kernel and shape."""
        key = (role, width, outputs, kernel)
        if key not in self._calibrated:
            candidates = row_candidates(2 * width * outputs, self._device)
            self._calibrated[key] = calibrate_rows(fn, width, candidates, device=self._device)
        return self._calibrated[key]

    def _gate(self, name: str) -> PackedLinear:
        """In fp32 whatever the kernel: rounding would choose other experts, and on a CPU a packed product costs several
        times more where so little is asked.
        """
        return self._linear(name, kernel=get_kernel("fp32", self._device))

    def _vector(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A tensor kept as it is: a norm in fp32, the embedding table in the checkpoint's dtype."""
        tensor = self._checkpoint.read(name, dtype, self._device)
        self._count(name, tensor.nbytes)
        return tensor

    def _linear(self, *names: str, kernel: Kernel | None = None) -> PackedLinear:
        """The named weights, one above the other, packed as one."""
        shapes = [self._checkpoint.shape(name) for name in names]
        if len(names) == 1:
            weight_OI = self._checkpoint.read(names[0], torch.float32, self._device)
        else:
            weight_OI = torch.empty(sum(rows for rows, _ in shapes), shapes[0][1], device=self._device)
            at = 0
            for name, (rows, _) in zip(names, shapes, strict=True):
                weight_OI[at : at + rows] = self._checkpoint.read(name, torch.float32, self._device)
                at += rows
        packed = (kernel or self._kernel).pack(weight_OI)
        del weight_OI
        release_freed_memory()
        if kernel is None:
            self._kernels.add(packed.kernel)
        for name, (rows, _) in zip(names, shapes, strict=True):
            self._count(name, packed.weight_bytes * rows // packed.out_features)
        return packed

    def _count(self, name: str, held: int) -> None:
        self._bytes += held
        if self._on_tensor is not None:
            self._on_tensor(name, held)


def run_local(backbone: Backbone, batch: ForwardBatch, kv: KVCache, experts: LocalExperts) -> Tensor:
    """One step in this process: logits_RV of the batch's `logits_rows`."""
    steps = backbone.forward(batch, kv)
    try:
        call = next(steps)
        while True:
            call = steps.send(experts.run(call.layer, call.plan))
    except StopIteration as finished:
        logits_RV: Tensor = finished.value
        return logits_RV


def load_local(
    checkpoint: WeightSource, kernel: str | None = None, device: torch.device | str = "cpu"
) -> tuple[Backbone, LocalExperts]:
    """A whole model in this process; without `kernel`, the checkpoint's dtype chooses."""
    kernel = kernel or default_kernel(checkpoint.dtype, device)
    layers = range(checkpoint.config.num_layers)
    calibrated: Calibrations = {}
    columns = [
        ExpertColumn.load(checkpoint, expert, layers, kernel, device, calibrated=calibrated)
        for expert in range(checkpoint.config.num_experts)
    ]
    return Backbone.load(checkpoint, kernel, device), LocalExperts(columns)
