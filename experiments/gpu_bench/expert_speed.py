"""How long one expert of Mixtral 8x7B takes for so many rows, with and without CUDA graphs, against its floors.

The layers' weights take turns, so that they come from memory and not from a cache.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch

from experiments.gpu_bench.random_weights import RandomWeights
from experiments.gpu_bench.timing import Ceilings, seconds
from model.experts import Calibrations, ExpertColumn

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
LAYERS = 4
_CALLS = 40


@dataclass(frozen=True, slots=True)
class ExpertSpeed:
    """Microseconds of one call. The floor is the larger of reading the weights once and doing the arithmetic."""

    kernel: str
    rows: int
    row_class: str
    graph_us: float
    direct_us: float
    floor_us: float

    def to_json(self) -> dict[str, object]:
        """A line of the report."""
        return {"type": "expert", **asdict(self), "of_floor": self.floor_us / self.graph_us}


def expert_speeds(kernel: str, ceilings: Ceilings) -> Iterator[ExpertSpeed]:
    """For each number of rows. Raises KernelError where the kernel cannot be used."""
    weights = RandomWeights.of(layers=LAYERS)
    calibrated: Calibrations = {}
    columns = [
        ExpertColumn.load(weights, 0, range(LAYERS), kernel, "cuda", calibrated=calibrated, graphs=graphs)
        for graphs in (True, False)
    ]
    read_s = columns[0].weight_bytes / LAYERS / ceilings.copy_bytes_s
    flops = 6 * weights.config.hidden_size * weights.config.ffn_size
    speed_up = 2 if kernel == "fp8" else 1
    for rows in ROWS:
        x_MD = torch.randn(rows, weights.config.hidden_size, device="cuda")
        times = [_seconds(column, x_MD) for column in columns]
        compute_s = rows * flops / (ceilings.bf16_flop_s * speed_up)
        row_class = columns[0].numerics_domain.partition("ffn_rows=")[2].partition(" ")[0]
        yield ExpertSpeed(kernel, rows, row_class, 1e6 * times[0], 1e6 * times[1], 1e6 * max(read_s, compute_s))


def _seconds(column: ExpertColumn, x_MD: torch.Tensor) -> float:
    return seconds(lambda number: column.forward(number % LAYERS, x_MD), _CALLS)
