"""The backbone: embeddings, attention, norms, routers and the output head; everything but the experts.

A layer is cut in two halves around its experts, and `Backbone.forward` is a generator that stops there, so
that the single process and the cluster share every line but the call that computes experts. Experts are
`model.experts`' work, kernels `model.kernels`', exactness under batching `model.numerics`'.

Activations are fp32 everywhere. On CUDA weights are bf16 and products plain torch; written plainly, and not
run there by the test suite.

Tensor suffixes: T tokens, D model dim, E experts, N routed rows, H query heads, G kv heads, d head_dim, M
rows of one call, R rows whose logits are wanted, V vocabulary.
"""

from collections.abc import Generator
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor
from torch.nn import functional

from model.attention import PagedAttention
from model.attention_plan import AttentionPlan
from model.batch import ForwardBatch
from model.config import ModelConfig
from model.dispatch import DispatchPlan, combine, dispatch
from model.experts import Calibrations, ExpertColumn, LocalExperts, OnTensor
from model.kernels import PackedLinear, default_kernel, get_kernel, numerics_domain, self_test
from model.kv_cache import KVCache
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
class NormedLinear:
    """RMSNorm and then a product, as one row-wise function, so that both are calibrated together."""

    norm_D: Tensor
    eps: float
    linear: PackedLinear | None
    keep_normed: bool = False

    def __call__(self, x_MD: Tensor) -> Tensor:
        """The product of the normalised rows; with `keep_normed`, behind these; without a weight, these alone."""
        normed_MD = functional.rms_norm(x_MD, self.norm_D.shape, self.norm_D, self.eps)
        if self.linear is None:
            return normed_MD
        out = self.linear(normed_MD)
        return torch.cat((normed_MD, out), dim=1) if self.keep_normed else out


@dataclass(frozen=True, slots=True, eq=False)
class Rowwise:
    """A row-wise function with the row class that makes it independent of batching."""

    fn: RowFunction
    row_class: RowClass

    def __call__(self, x_MI: Tensor) -> Tensor:
        return map_rows(self.fn, x_MI, self.row_class)


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """A layer's share of the backbone: norm and q, k, v; the output product; norm and router logits."""

    qkv: Rowwise
    output: Rowwise
    router: Rowwise


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What all layers of one forward share."""

    kv: KVCache
    attention: AttentionPlan
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

        `on_tensor(name, bytes held)` is called after each. Raises KernelError or CheckpointError.
        """
        self_test(kernel, device)
        return _BackboneLoader(checkpoint, kernel, torch.device(device), on_tensor).load()

    @property
    def numerics_domain(self) -> str:
        """Everything that decides the bits of logits, but the weights and the experts."""
        classes = {str(part.row_class) for layer in self._layers for part in (layer.qkv, layer.output, layer.router)}
        parts = {
            "kernel": self.kernel,
            "rows": "/".join(sorted(classes)),
            "head_rows": str(self._head.row_class),
            "attention_rows": self._attention.numerics,
        }
        return numerics_domain(self.device, parts)

    def forward(self, batch: ForwardBatch, kv: KVCache) -> Generator[ExpertCall, Tensor, Tensor]:
        """One step. Yields an ExpertCall per layer, is sent its out_ND, and returns logits_RV in fp32.

        Keys and values of the batch's tokens are written to `kv`. ValueError for a token outside the
        vocabulary, a position past the model's context or a block table that is too short; nothing has been
        written then.
        """
        step, h_TD = self.begin(batch, kv)
        for index in range(len(self._layers)):
            h_TD, plan = self.before_experts(index, h_TD, step)
            out_ND = yield ExpertCall(index, plan)
            h_TD = self.after_experts(h_TD, out_ND, plan)
        return self.logits(h_TD, batch.logits_rows)

    @torch.no_grad()
    def begin(self, batch: ForwardBatch, kv: KVCache) -> tuple[Step, Tensor]:
        """The step's plan, and the embedded tokens h_TD."""
        began_s = perf_counter()
        ids_T = batch.token_ids_T
        if int(ids_T.min()) < 0 or int(ids_T.max()) >= self.config.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.config.vocab_size - 1}")
        cos_T1d, sin_T1d = self._rope.rows(batch.positions_T)
        step = Step(kv, self._attention.plan(batch, kv.block_size), cos_T1d, sin_T1d)
        h_TD = functional.embedding(ids_T.to(self.device), self._embed_VD).to(torch.float32)
        self.times.prepare_s += perf_counter() - began_s
        return step, h_TD

    @torch.no_grad()
    def before_experts(self, index: int, h_TD: Tensor, step: Step) -> tuple[Tensor, DispatchPlan]:
        """The layer's first half: attention added to h_TD, and the rows for its experts."""
        began_s = perf_counter()
        layer, config = self._layers[index], self.config
        heads, kv_heads = config.num_heads, config.num_kv_heads
        qkv_TXd = layer.qkv(h_TD).view(len(h_TD), heads + 2 * kv_heads, config.head_dim)
        apply_rope_(qkv_TXd[:, : heads + kv_heads], step.cos_T1d, step.sin_T1d)
        step.kv.write(index, step.attention.slots_T, qkv_TXd[:, heads:], step.attention.cleared)
        mixed_TX = self._attention.run(qkv_TXd[:, :heads], step.kv.kv(index), step.attention)
        h_TD = h_TD + layer.output(mixed_TX)
        attended_s = perf_counter()
        routed_TX = layer.router(h_TD)
        routed_s = perf_counter()
        width = config.hidden_size
        plan = dispatch(routed_TX[:, :width], self._router_logits(routed_TX), config.top_k)
        self.times.attention_s += attended_s - began_s
        self.times.router_s += routed_s - attended_s
        self.times.dispatch_s += perf_counter() - routed_s
        return h_TD, plan

    def _router_logits(self, routed_TX: Tensor) -> Tensor:
        """The router's columns; a dense model has none, and its only expert needs no score."""
        if self.config.is_moe:
            return routed_TX[:, self.config.hidden_size :]
        return routed_TX.new_zeros(len(routed_TX), 1)

    @torch.no_grad()
    def after_experts(self, h_TD: Tensor, out_ND: Tensor, plan: DispatchPlan) -> Tensor:
        """The layer's second half: the experts' answers combined and added."""
        began_s = perf_counter()
        h_TD = h_TD + combine(out_ND.to(self.device), plan)
        self.times.combine_s += perf_counter() - began_s
        return h_TD

    @torch.no_grad()
    def logits(self, h_TD: Tensor, rows: tuple[int, ...]) -> Tensor:
        """logits_RV of the chosen rows, fp32."""
        began_s = perf_counter()
        logits_RV = self._head(h_TD.index_select(0, torch.tensor(rows, dtype=torch.long, device=self.device)))
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
        norm_D = self._vector("norm", torch.float32)
        name = "embed" if self._config.tied_embeddings else "lm_head"
        head = self._normed("head", norm_D, self._linear(name))
        return Backbone(self._config, embed_VD, layers, head, self._bytes, "+".join(sorted(self._kernels)))

    def _layer(self, prefix: str) -> Layer:
        attn_norm_D = self._vector(f"{prefix}.attn_norm", torch.float32)
        qkv = self._normed("qkv", attn_norm_D, self._linear(*(f"{prefix}.{part}" for part in ("wq", "wk", "wv"))))
        wo = self._linear(f"{prefix}.wo")
        output = Rowwise(wo, self._row_class("output", wo, wo))
        ffn_norm_D = self._vector(f"{prefix}.ffn_norm", torch.float32)
        gate = self._linear(f"{prefix}.gate") if self._config.is_moe else None
        return Layer(qkv, output, self._normed("router", ffn_norm_D, gate))

    def _normed(self, role: str, norm_D: Tensor, linear: PackedLinear | None) -> Rowwise:
        fn = NormedLinear(norm_D, self._config.norm_eps, linear, keep_normed=role == "router")
        return Rowwise(fn, self._row_class(role, fn, linear))

    def _row_class(self, role: str, fn: RowFunction, linear: PackedLinear | None) -> RowClass:
        """Calibrated once per role, kernel and shape."""
        width = self._config.hidden_size if linear is None else linear.in_features
        outputs = 1 if linear is None else linear.out_features
        key = (role, width, outputs, None if linear is None else linear.kernel)
        if key not in self._calibrated:
            candidates = row_candidates(2 * width * outputs)
            self._calibrated[key] = calibrate_rows(fn, width, candidates, device=self._device)
        return self._calibrated[key]

    def _vector(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """A tensor kept as it is: a norm in fp32, the embedding table in the checkpoint's dtype."""
        tensor = self._checkpoint.read(name, dtype, self._device)
        self._count(name, tensor.nbytes)
        return tensor

    def _linear(self, *names: str) -> PackedLinear:
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
        packed = self._kernel.pack(weight_OI)
        del weight_OI
        release_freed_memory()
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
