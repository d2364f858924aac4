"""What is measured (cells) on which clusters (variants): plain values, and the names they go by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, TypeVar

from cluster.block_allocator import blocks_for
from cluster.config import ClusterConfig
from experiments.engine_bench.failures import BenchError

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """`batch` prompts of `prompt_len` tokens, submitted together; `output_len` tokens for each."""

    batch: int
    prompt_len: int
    output_len: int

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prompt_len", 1), ("output_len", 2)):
            if getattr(self, name) < least:
                raise BenchError(f"{name} is {getattr(self, name)}, but must be at least {least}")

    @property
    def tokens(self) -> int:
        """Positions that one sequence takes."""
        return self.prompt_len + self.output_len

    def kv_blocks(self, block_size: int) -> int:
        """Blocks with which no sequence waits for another."""
        return self.batch * blocks_for(self.tokens, block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One cluster. The fields are those of ClusterConfig."""

    transport: str = "auto"
    kernel: str = "auto"
    replicas: int = 1
    experts_per_actor: int = 1

    def config(self, base: ClusterConfig, namespace: str) -> ClusterConfig:
        """`base` as this variant. Raises ConfigError."""
        changes: dict[str, Any] = asdict(self)
        return replace(base, namespace=namespace, **changes)


def variants(
    transports: Sequence[str], kernels: Sequence[str], replicas: Sequence[int], experts_per_actor: Sequence[int]
) -> dict[str, Variant]:
    """Every combination by name. A name says what differs: `octavo` alone, else `octavo transport=grpc` and so on."""
    choices: dict[str, Sequence[Any]] = {
        "transport": _distinct(transports),
        "kernel": _distinct(kernels),
        "replicas": _distinct(replicas),
        "experts_per_actor": _distinct(experts_per_actor),
    }
    named: dict[str, Variant] = {}
    for values in product(*choices.values()):
        chosen = dict(zip(choices, values, strict=True))
        differing = [f"{name}={value}" for name, value in chosen.items() if len(choices[name]) > 1]
        named[" ".join(["octavo", *differing])] = Variant(**chosen)
    return named


def cells(batches: Sequence[int], prompt_len: int, output_len: int) -> tuple[Cell, ...]:
    """One cell a batch size, in the order given."""
    return tuple(Cell(batch=batch, prompt_len=prompt_len, output_len=output_len) for batch in _distinct(batches))


def parse_batches(one_by_one: Sequence[int], listed: str | None) -> tuple[int, ...]:
    """`--batch 1 --batch 16` and `--batches 1,16` together; 1, 16 and 32 where neither is given."""
    parts = [part.strip() for part in (listed or "").split(",") if part.strip()]
    try:
        batches = (*one_by_one, *(int(part) for part in parts))
    except ValueError:
        raise BenchError(f"--batches is {listed!r}, but must be whole numbers with commas between them") from None
    return batches or (1, 16, 32)


def _distinct(values: Sequence[T]) -> list[T]:
    return list(dict.fromkeys(values))
