"""One expert's feed-forward networks, and the experts of a model that runs alone.

`ExpertColumn` is what an expert actor holds; `LocalExperts` is the in-process twin of the remote experts.
Choosing which rows go to which expert is `model.dispatch`'s work.

Tensor suffixes: M rows of one call, D model dim, F ffn dim, N routed rows.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.device_calls import GraphedCalls, Staging
from model.dispatch import DispatchPlan
from model.kernels import Kernel, PackedLinear, arithmetic, get_kernel, numerics_domain, self_test
from model.memory import release_freed_memory
from model.numerics import RowClass, RowFunction, calibrate_rows, map_rows, row_candidates
from model.storage.weight_source import WeightSource

OnTensor = Callable[[str, int], None]
Calibrations = dict[Hashable, RowClass]


@dataclass(frozen=True, slots=True, eq=False)
class ExpertFFN:
    """SwiGLU (arXiv 2002.05202): y = w2(silu(w1 x) * (w3 x)).

    `gate_up` is w1 and w3, or the two as one weight, w1 above w3, where the kernel is faster so.
    """

    gate_up: tuple[PackedLinear, ...]
    w2: PackedLinear

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
        """y_MD, for a row count of the calibrated class only.

        silu is spelled x / (1 + exp(-x)): torch's own rounds the last elements of a buffer by another
        formula.
        """
        if len(self.gate_up) == 1:
            both_MF, width = self.gate_up[0](x_MD), self.w2.in_features
            gate_MF, up_MF = both_MF[:, :width], both_MF[:, width:]
        else:
            gate_MF, up_MF = self.gate_up[0](x_MD), self.gate_up[1](x_MD)
        hidden_MF = gate_MF.neg().exp_().add_(1.0)
        return self.w2(torch.div(gate_MF, hidden_MF, out=hidden_MF).mul_(up_MF))


class ExpertColumn:
    """One logical expert's FFNs for a range of layers. A row's result does not depend on its neighbours."""

    def __init__(
        self, expert: int, ffns: Mapping[int, ExpertFFN], device: torch.device, calibrated: Calibrations
    ) -> None:
        if not ffns:
            raise ValueError(f"expert {expert} was given no layers")
        self.expert = expert
        self.device = device
        self._ffns = dict(ffns)
        self._calls: Mapping[int, RowFunction] = self._ffns
        self._staging = Staging(device) if device.type == "cuda" else None
        if device.type == "cuda":
            graphs = GraphedCalls()
            self._calls = {layer: graphs.wrap(ffn) for layer, ffn in self._ffns.items()}
        self._row_classes = {layer: _ffn_row_class(ffn, device, calibrated) for layer, ffn in ffns.items()}

    @classmethod
    def load(
        cls,
        checkpoint: WeightSource,
        expert: int,
        layers: range,
        kernel: str,
        device: torch.device | str,
        on_tensor: OnTensor | None = None,
        calibrated: Calibrations | None = None,
    ) -> "ExpertColumn":
        """Read and pack one tensor at a time, so that memory peaks at the packed weights and one fp32 tensor.

        `on_tensor(name, packed bytes)` is called for each. `calibrated` lets columns of one process share
        row classes. Raises KernelError when `kernel` is not usable here, CheckpointError when a tensor is
        not.
        """
        device = torch.device(device)
        chosen = get_kernel(kernel, device)
        self_test(kernel, device)
        ffns = {layer: _load_ffn(checkpoint, layer, expert, chosen, device, on_tensor) for layer in layers}
        return cls(expert, ffns, device, {} if calibrated is None else calibrated)

    def forward(self, layer: int, x_MD: Tensor) -> Tensor:
        """y_MD (fp32) of this expert in `layer`; KeyError for a layer that the column does not hold.

        The answer is where the column is, but for rows that come from the host: theirs goes back there.
        """
        call, row_class = self._calls[layer], self._row_classes[layer]
        with torch.no_grad():
            if self._staging is None or x_MD.device.type != "cpu":
                return map_rows(call, x_MD.to(self.device, torch.float32), row_class)
            rows_MD = self._staging.to_device(x_MD).to(torch.float32)
            return self._staging.to_host(map_rows(call, rows_MD, row_class))

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
        classes = "/".join(sorted({str(row_class) for row_class in self._row_classes.values()}))
        return numerics_domain(self.device, {"kernel": kernels, "ffn_rows": classes})


class LocalExperts:
    """All experts of a model in this process: what `run` of the remote experts computes elsewhere."""

    def __init__(self, columns: Sequence[ExpertColumn]) -> None:
        self._columns = {column.expert: column for column in columns}
        if len(self._columns) != len(columns):
            raise ValueError("two columns hold the same expert")

    def run(self, layer: int, plan: DispatchPlan) -> Tensor:
        """out_ND: the rows of `plan`, each through its expert in `layer`."""
        if len(plan.counts) == 1:
            return self._columns[0].forward(layer, plan.x_ND)
        x_ND = plan.x_ND
        out_ND = torch.empty_like(x_ND)
        for expert, count in enumerate(plan.counts):
            if count:
                rows = plan.rows(expert)
                out_ND[rows] = self._columns[expert].forward(layer, x_ND[rows])
        return out_ND


def _load_ffn(
    checkpoint: WeightSource,
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


def _read_each(checkpoint: WeightSource, names: Sequence[str], device: torch.device) -> Iterator[Tensor]:
    for name in names:
        yield checkpoint.read(name, torch.float32, device)
        release_freed_memory()


def _ffn_row_class(ffn: ExpertFFN, device: torch.device, calibrated: Calibrations) -> RowClass:
    """Calibrated over the whole FFN, once per shape and kernel."""
    width = ffn.w2.out_features
    key = ("ffn", width, ffn.w2.in_features, ffn.kernels)
    if key not in calibrated:
        calibrated[key] = calibrate_rows(ffn, width, row_candidates(ffn.flops_per_row, device), device=device)
    return calibrated[key]
