"""One expert's feed-forward networks, and the experts of a model that runs alone.

`ExpertColumn` is what an expert actor holds; `LocalExperts` is the in-process twin of the remote experts.
Choosing which rows go to which expert is `model.dispatch`'s work.

Tensor suffixes: M rows of one call, D model dim, F ffn dim, N routed rows.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.canary import Digest, canary_rows
from model.device_calls import GraphedCall, GraphedCalls, Staging, prepare_device
from model.dispatch import DispatchPlan
from model.kernels import Kernel, PackedLinear, arithmetic, get_kernel, numerics_domain, self_test
from model.memory import release_freed_memory
from model.numerics import RowClass, bit_marks, calibrate_rows, map_rows, row_candidates
from model.storage.weight_source import TensorReader

OnTensor = Callable[[str, int], None]
Calibrations = dict[Hashable, RowClass]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertFFN:
    """SwiGLU (arXiv 2002.05202): y = w2(silu(w1 x) * (w3 x)).

    `gate_up` is w1 and w3, or the two as one weight, w1 above w3, where the kernel is faster so.
    """

    gate_up: tuple[PackedLinear, ...]
    w2: PackedLinear
    w2_class: RowClass | None = None
    """Where w2 is called with other row counts than the rest: libraries cut its long sums up by them."""

    @property
    def kernels(self) -> tuple[str, ...]:
        """The kernel of each weight after per-tensor fall-back."""
        return (*(linear.kernel for linear in self.gate_up), self.w2.kernel)

    @property
    def weight_bytes(self) -> int:
        return sum(linear.weight_bytes for linear in self.gate_up) + self.w2.weight_bytes

    @property
    def flops_per_row(self) -> int:
        return 6 * self.w2.in_features * self.w2.out_features

    def __call__(self, x_MD: Tensor) -> Tensor:
        """y_MD, for a row count of the calibrated class only."""
        return self._down(_swiglu(*self._gate_up(x_MD)))

    def stages(self, x_MD: Tensor) -> Tensor:
        """y_MD, and beside it what stands for every bit of the first products, which the last one may round away."""
        gate_MF, up_MF = self._gate_up(x_MD)
        marks = [bit_marks(gate_MF), bit_marks(up_MF)]
        return torch.cat((*marks, self._down(_swiglu(gate_MF, up_MF))), dim=1)

    def canary(self, device: torch.device) -> bytes:
        """A digest of each product's answer to known rows, of the step between them, and of weights that can be shown.

        Product by product, because on the way through the next one most of a small difference is rounded away.
        """
        digest = Digest()
        gate_MF, up_MF = self._gate_up(canary_rows(self.gate_up[0].in_features, device))
        y_MD = self.w2(canary_rows(self.w2.in_features, device))
        for answer in (gate_MF, up_MF, _swiglu(gate_MF, up_MF), y_MD):
            digest.answers(answer)
        for linear in (*self.gate_up, self.w2):
            for held in linear.held:
                digest.weights(held)
        return digest.value()

    def _down(self, hidden_MF: Tensor) -> Tensor:
        return self.w2(hidden_MF) if self.w2_class is None else map_rows(self.w2, hidden_MF, self.w2_class)

    def _gate_up(self, x_MD: Tensor) -> tuple[Tensor, Tensor]:
        if len(self.gate_up) == 1:
            both_MF, width = self.gate_up[0](x_MD), self.w2.in_features
            return both_MF[:, :width], both_MF[:, width:]
        return self.gate_up[0](x_MD), self.gate_up[1](x_MD)


def _swiglu(gate_MF: Tensor, up_MF: Tensor) -> Tensor:
    """On CPUs silu is spelled x / (1 + exp(-x)): torch's own rounds a buffer's last elements by another formula."""
    if gate_MF.is_cuda:
        return torch.nn.functional.silu(gate_MF).mul_(up_MF)
    hidden_MF = gate_MF.neg().exp_().add_(1.0)
    return torch.div(gate_MF, hidden_MF, out=hidden_MF).mul_(up_MF)


class ExpertColumn:
    """One logical expert's FFNs for a range of layers. A row's result does not depend on its neighbours."""

    def __init__(
        self,
        expert: int,
        ffns: Mapping[int, ExpertFFN],
        device: torch.device,
        calibrated: Calibrations,
        *,
        graphs: bool = True,
    ) -> None:
        if not ffns:
            raise ValueError(f"expert {expert} was given no layers")
        self.expert = expert
        self.device = device
        self._ffns: dict[int, ExpertFFN] = {}
        self._graphed: dict[int, GraphedCall] = {}
        self._row_classes: dict[int, RowClass] = {}
        self._staging = Staging(device) if device.type == "cuda" else None
        self._graphs = GraphedCalls() if graphs and device.type == "cuda" else None
        if device.type == "cuda":
            ffns = {layer: replace(ffn, w2_class=_w2_row_class(ffn, device, calibrated)) for layer, ffn in ffns.items()}
        self._hold(ffns, {layer: _ffn_row_class(ffn, device, calibrated) for layer, ffn in ffns.items()})

    @classmethod
    def load(
        cls,
        checkpoint: TensorReader,
        expert: int,
        layers: range,
        kernel: str,
        device: torch.device | str,
        on_tensor: OnTensor | None = None,
        calibrated: Calibrations | None = None,
        *,
        graphs: bool = True,
    ) -> "ExpertColumn":
        """Read and pack one tensor at a time, so that memory peaks at the packed weights and one fp32 tensor.

        `on_tensor(name, packed bytes)` is called for each. `calibrated` lets columns of one process share
        row classes. Without `graphs` a GPU is given kernel after kernel, for comparison. Raises KernelError when
        `kernel` is not usable here, CheckpointError when a tensor is not.
        """
        device = torch.device(device)
        prepare_device(device)
        chosen = get_kernel(kernel, device)
        self_test(kernel, device)
        ffns = {layer: _load_ffn(checkpoint, layer, expert, chosen, device, on_tensor) for layer in layers}
        return cls(expert, ffns, device, {} if calibrated is None else calibrated, graphs=graphs)

    def absorb(self, other: "ExpertColumn") -> None:
        """Holds the layers of another column of this expert, too, which was packed for the same device.

        Rows may be on their way through the layers held before. Raises ValueError for a column that does not fit.
        """
        if (other.expert, other.device) != (self.expert, self.device):
            raise ValueError(f"expert {other.expert} on {other.device} is no part of {self.expert} on {self.device}")
        self._hold(other._ffns, other._row_classes)

    def _hold(self, ffns: Mapping[int, ExpertFFN], row_classes: Mapping[int, RowClass]) -> None:
        if self._graphs is not None:
            self._graphed |= {at: self._graphs.wrap(ffn) for at, ffn in ffns.items()}
        self._row_classes |= row_classes
        self._ffns |= ffns

    def forward(self, layer: int, x_MD: Tensor) -> Tensor:
        """y_MD (fp32) of this expert in `layer`; KeyError for a layer that the column does not hold.

        The answer is where the column is, but for rows that come from the host: theirs goes back there.
        """
        call, row_class = self._ffns[layer], self._row_classes[layer]
        if self._staging is None and x_MD.dtype is torch.float32 and not torch.is_grad_enabled():
            return map_rows(call, x_MD, row_class)  # the hot loop of a CPU: each call that does nothing costs
        with torch.no_grad():
            if self._staging is None:
                return map_rows(call, x_MD.to(self.device, torch.float32), row_class)
            if x_MD.device.type != "cpu":
                return self._on_gpu(layer, x_MD.to(torch.float32)).clone()
            return self._staging.to_host(self._on_gpu(layer, self._staging.to_device(x_MD).to(torch.float32)))

    def forward_into(self, layer: int, x_MD: Tensor, out_MD: Tensor) -> None:
        """`forward`, of fp32 rows where the column is, to where the answers belong."""
        if self._staging is None:
            out_MD.copy_(self.forward(layer, x_MD))
            return
        with torch.no_grad():
            out_MD.copy_(self._on_gpu(layer, x_MD))

    def _on_gpu(self, layer: int, x_MD: Tensor) -> Tensor:
        """y_MD, to be copied before the next call."""
        row_class, rows = self._row_classes[layer], len(x_MD)
        graphed = self._graphed.get(layer)
        if graphed is not None and 1 <= rows <= row_class.buckets[-1]:
            answers_MD = graphed.padded(x_MD, row_class.bucket(rows))
            if answers_MD is not None:
                return answers_MD
        return map_rows(self._ffns[layer], x_MD, row_class)

    def canary(self, layer: int) -> bytes:
        """What stays the same, bit for bit, as long as this layer's weights and arithmetic do.

        Only answers of one thread, or of threads set up alike, may be compared.
        """
        with torch.no_grad():
            return self._ffns[layer].canary(self.device)

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers held, ascending."""
        return tuple(sorted(self._ffns))

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights."""
        return sum(ffn.weight_bytes for ffn in self._ffns.values())

    @property
    def kernel(self) -> str:
        """The kernels in use, joined by `+` where some tensors fell back to another."""
        return "+".join(sorted({name for ffn in self._ffns.values() for name in ffn.kernels}))

    @property
    def numerics_domain(self) -> str:
        """Replicas of this expert with the same domain give the same bits."""
        kernels = "+".join(map(arithmetic, self.kernel.split("+")))
        inner = [ffn.w2_class for ffn in self._ffns.values() if ffn.w2_class is not None]
        classes = "/".join(sorted({str(row_class) for row_class in (*self._row_classes.values(), *inner)}))
        return numerics_domain(self.device, {"kernel": kernels, "ffn_rows": classes})


class LocalExperts:
    """All experts of a model in this process: what `run` of the remote experts computes elsewhere."""

    def __init__(self, columns: Sequence[ExpertColumn]) -> None:
        self._columns = {column.expert: column for column in columns}
        if len(self._columns) != len(columns):
            raise ValueError("two columns hold the same expert")

    @property
    def columns(self) -> tuple[ExpertColumn, ...]:
        """By ascending expert."""
        return tuple(self._columns[expert] for expert in sorted(self._columns))

    def run(self, layer: int, plan: DispatchPlan) -> Tensor:
        """out_ND: the rows of `plan`, each through its expert in `layer`."""
        if len(plan.counts) == 1:
            return self._columns[0].forward(layer, plan.x_ND)
        x_ND = plan.x_ND
        out_ND = torch.empty_like(x_ND)
        for expert, count in enumerate(plan.counts):
            if count:
                rows = plan.rows(expert)
                self._columns[expert].forward_into(layer, x_ND[rows], out_ND[rows])
        return out_ND


def _load_ffn(
    checkpoint: TensorReader,
    layer: int,
    expert: int,
    kernel: Kernel,
    device: torch.device,
    on_tensor: OnTensor | None,
) -> ExpertFFN:
    def packed(*parts: str) -> PackedLinear:
        names = [f"layers.{layer}.experts.{expert}.{part}" for part in parts]
        weight = kernel.pack_parts(_read_each(checkpoint, names, device))
        release_freed_memory()
        if on_tensor is not None:
            for name in names:
                on_tensor(name, weight.weight_bytes // len(names))
        return weight

    gate_up = (packed("w1", "w3"),) if kernel.fuses else (packed("w1"), packed("w3"))
    return ExpertFFN(gate_up, packed("w2"))


def _read_each(checkpoint: TensorReader, names: Sequence[str], device: torch.device) -> Iterator[Tensor]:
    for name in names:
        yield checkpoint.read(name, torch.float32, device)
        release_freed_memory()


def _w2_row_class(ffn: ExpertFFN, device: torch.device, calibrated: Calibrations) -> RowClass:
    """Calibrated by itself, once per shape and kernel."""
    w2 = ffn.w2
    key = ("w2", w2.out_features, w2.in_features, w2.kernel)
    if key not in calibrated:
        candidates = row_candidates(2 * w2.out_features * w2.in_features, device)
        calibrated[key] = calibrate_rows(w2, w2.in_features, candidates, device=device)
    return calibrated[key]


def _ffn_row_class(ffn: ExpertFFN, device: torch.device, calibrated: Calibrations) -> RowClass:
    """Calibrated over all stages of the FFN, once per shape and kernel."""
    width = ffn.w2.out_features
    key = ("ffn", width, ffn.w2.in_features, ffn.kernels)
    if key not in calibrated:
        candidates = row_candidates(ffn.flops_per_row, device)
        calibrated[key] = calibrate_rows(ffn.stages, width, candidates, device=device)
    return calibrated[key]
