"""From measurements to what one cell says: medians, spreads, ratios within repeats, agreement of tokens."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from experiments.engine_bench.cells import Cell
from experiments.engine_bench.rounds import Measurement
from experiments.engine_bench.shares import StepShares, mean_shares

Tokens = Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over repeats."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """`values` must not be empty."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far the greedy tokens of two contestants are the same, over the same prompts.

    `equal_sequences` of `sequences` are equal to the end; `common_prefix` is the mean share of tokens before the
    first difference. `first_tokens` counts equal first tokens: a peer without those computes something else.
    """

    sequences: int
    equal_sequences: int
    first_tokens: int
    common_prefix: float

    @property
    def is_same_model(self) -> bool:
        """At least nine first tokens of ten: precision may turn a near tie, no more."""
        return self.first_tokens >= 0.9 * self.sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class ContestantSummary:
    """One contestant in one cell."""

    name: str
    prefill_tok_s: Spread
    decode_tok_s: Spread
    prefill_step: StepShares | None
    decode_step: StepShares | None
    kernel_share: Spread | None
    kernel_cpu_share: Spread | None
    memory: Mapping[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """`of` divided by `to`, repeat by repeat."""

    of: str
    to: str
    prefill: Spread
    decode: Spread
    agreement: Agreement


@dataclass(frozen=True, slots=True, kw_only=True)
class CellSummary:
    """All that is said of one cell. Ratios: each variant to each peer, and each later variant to the first."""

    cell: Cell
    repeats: int
    contestants: tuple[ContestantSummary, ...]
    ratios: tuple[Ratio, ...]

    def to_json(self) -> dict[str, object]:
        """The line of stdout."""
        return {"type": "summary", **asdict(self.cell), **{
            name: value for name, value in asdict(self).items() if name != "cell"
        }}  # fmt: skip


def summarise(cell: Cell, measurements: Sequence[Measurement], ours: Sequence[str]) -> CellSummary:
    """Of one cell's measurements, where each contestant has one for every repeat; `ours` are the variants' names."""
    by_name: dict[str, list[Measurement]] = {}
    for one in sorted(measurements, key=lambda one: one.repeat):
        if one.cell == cell:
            by_name.setdefault(one.contestant, []).append(one)
    order = [*ours, *sorted(set(by_name) - set(ours))]
    pairs = [(variant, peer) for variant in ours for peer in order if peer not in ours]
    pairs += [(variant, ours[0]) for variant in ours[1:]]
    return CellSummary(
        cell=cell,
        repeats=len(by_name[order[0]]),
        contestants=tuple(_contestant(name, by_name[name]) for name in order),
        ratios=tuple(_ratio(of, by_name[of], to, by_name[to]) for of, to in pairs),
    )


def whole_repeats(measurements: Sequence[Measurement], per_repeat: int) -> list[Measurement]:
    """Those of repeats that have all their `per_repeat` measurements: the others can give no fair ratio."""
    counts = Counter(one.repeat for one in measurements)
    return [one for one in measurements if counts[one.repeat] == per_repeat]


def agreement(ours: Tokens, theirs: Tokens) -> Agreement:
    """Of sequences over the same prompts, in the same order."""
    prefixes = [_common(one, other) for one, other in zip(ours, theirs, strict=True)]
    lengths = [max(len(one), len(other)) for one, other in zip(ours, theirs, strict=True)]
    return Agreement(
        sequences=len(prefixes),
        equal_sequences=sum(prefix == length for prefix, length in zip(prefixes, lengths, strict=True)),
        first_tokens=sum(prefix > 0 for prefix in prefixes),
        common_prefix=statistics.mean(prefix / length for prefix, length in zip(prefixes, lengths, strict=True)),
    )


def _contestant(name: str, repeats: Sequence[Measurement]) -> ContestantSummary:
    timed = [one for one in repeats if one.kernel_step_s]
    return ContestantSummary(
        name=name,
        prefill_tok_s=Spread.of([one.prefill_tok_s for one in repeats]),
        decode_tok_s=Spread.of([one.decode_tok_s for one in repeats]),
        prefill_step=mean_shares([one.prefill.shares for one in repeats if one.prefill.shares is not None]),
        decode_step=mean_shares([one.decode.shares for one in repeats if one.decode.shares is not None]),
        kernel_share=Spread.of([one.kernel_share for one in timed]) if timed else None,
        kernel_cpu_share=Spread.of([one.kernel_cpu_share for one in timed]) if timed else None,
        memory=max((one.memory for one in repeats), key=_held),
    )


def _ratio(of: str, ours: Sequence[Measurement], to: str, theirs: Sequence[Measurement]) -> Ratio:
    pairs = list(zip(ours, theirs, strict=True))
    return Ratio(
        of=of,
        to=to,
        prefill=Spread.of([one.prefill_tok_s / other.prefill_tok_s for one, other in pairs]),
        decode=Spread.of([one.decode_tok_s / other.decode_tok_s for one, other in pairs]),
        agreement=agreement(
            [ids for one, _ in pairs for ids in one.decode.run.tokens],
            [ids for _, other in pairs for ids in other.decode.run.tokens],
        ),
    )


def _held(memory: Mapping[str, object]) -> int:
    held = memory.get("pss_bytes", 0)
    return held if isinstance(held, int) else 0


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    count = 0
    for ours, theirs in zip(one, other, strict=False):
        if ours != theirs:
            break
        count += 1
    return count
