"""A canary changes with every bit that flips in packed weights, in this very memory, and with nothing else."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from model.canary import NUM_ROWS, Digest, canary_rows, word_sums
from model.experts import ExpertColumn, ExpertFFN
from model.kernels import KERNELS, PackedLinear
from model.packed import int8
from model.packed.bf16 import Bf16Linear
from model.packed.fp8 import Fp8Linear
from model.storage.checkpoint import Checkpoint
from tests.support.checkpoints import write_mixtral
from tests.support.process_memory import find, first_bytes, flip, inverted

CPU = torch.device("cpu")
FLIPS = 300
OUTPUTS, INPUTS = 384, 512  # whole blocks of every layout of the libraries: no bit falls on padding

needs_bf16 = pytest.mark.skipif(not KERNELS["bf16"].usable(CPU), reason="no bf16 arithmetic here")


def weight(scale: float = 0.03, *, outlier: bool = False) -> torch.Tensor:
    """Normal, rounded to fp16; with `outlier` to bf16, and one so large that the others lie far below it."""
    drawn = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(4)) * scale
    if not outlier:
        return drawn.half().float()
    drawn[3, 5] = 0.25
    return drawn.bfloat16().float()


def ffn_of(linear: PackedLinear) -> ExpertFFN:
    """Around one weight under test: a second that is the same, and a last one of another shape."""
    last = KERNELS["fp32"].pack(torch.randn(16, OUTPUTS, generator=torch.Generator().manual_seed(5)))
    return ExpertFFN((linear, linear), last)


def fp16() -> tuple[PackedLinear, bytes, int]:
    packed = KERNELS["fp16"].pack(weight())
    assert packed.kernel == "fp16"
    return packed, first_bytes("fp16", weight()), 2


def fp16_scaled() -> tuple[PackedLinear, bytes, int]:
    """As a checkpoint in bf16 is packed when its smallest weights would leave fp16's range."""
    whole = weight(2.0**-8, outlier=True)
    packed = KERNELS["fp16"].pack(whole.clone())
    unscale: float = packed.unscale  # type: ignore[attr-defined]
    assert unscale != 1.0
    return packed, first_bytes("fp16", whole / unscale), 2


def fp32() -> tuple[PackedLinear, bytes, int]:
    whole = torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(6))
    return KERNELS["fp32"].pack(whole.clone()), first_bytes("fp32", whole), 4


def bf16() -> tuple[PackedLinear, bytes, int]:
    return KERNELS["bf16"].pack(weight()), first_bytes("bf16", weight().bfloat16()), 2


def int8_by(engine: int8.Int8Engine) -> Callable[[], tuple[PackedLinear, bytes, int]]:
    def make() -> tuple[PackedLinear, bytes, int]:
        whole, _ = int8._rounded(weight())
        return int8.pack_with(engine, [weight()]), first_bytes("int8", whole), 1

    return make


int8_engines = [
    pytest.param(int8_by(engine), id=f"int8-{engine.name}") for engine in int8._engines() if int8.is_exact(engine)
]


def seen_at(ffn: ExpertFFN, before: bytes, place: int, bit: int, inverse: bytes | None = None) -> bool:
    """Whether a bit flipped there and back is seen while it is flipped; with `inverse`, only bit 0 and of that."""
    flip(place, bit, unless_not=inverse)
    try:
        return ffn.canary(CPU) != before
    finally:
        flip(place, bit, unless_not=None if inverse is None else bytes([inverse[0] ^ 1]) + inverse[1:])


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(fp16, id="fp16"),
        pytest.param(fp16_scaled, id="fp16-scaled"),
        pytest.param(fp32, id="fp32"),
        pytest.param(bf16, id="bf16", marks=needs_bf16),
        *int8_engines,
    ],
)
def test_every_bit_flipped_in_packed_weights_is_seen(make: Callable[[], tuple[PackedLinear, bytes, int]]) -> None:
    packed, first, itemsize = make()
    ffn = ffn_of(packed)
    before = ffn.canary(CPU)
    inverse = inverted(first)  # and not what is looked for itself
    (place,) = [place for place in find(first) if seen_at(ffn, before, place, 0, inverse)]
    draw = random.Random(7)
    num_bits = 8 * itemsize * OUTPUTS * INPUTS
    seen = sum(seen_at(ffn, before, place, draw.randrange(num_bits)) for _ in range(FLIPS))
    assert ffn.canary(CPU) == before
    assert seen == FLIPS


def test_the_kernels_of_gpus_show_their_weights() -> None:
    """Where no GPU is at hand: that every bit of what they hold goes into the digest."""
    draw = random.Random(8)
    for held in (
        Bf16Linear(weight().bfloat16()).held,
        Fp8Linear(weight().to(torch.float8_e4m3fn), torch.ones(1, OUTPUTS)).held,
    ):
        for tensor in held:
            raw = tensor.view(torch.uint8)
            before = word_sums(tensor)
            for _ in range(FLIPS):
                at, bit = draw.randrange(raw.numel()), 1 << draw.randrange(8)
                raw.view(-1)[at] ^= bit
                assert word_sums(tensor) != before
                raw.view(-1)[at] ^= bit
            assert word_sums(tensor) == before
            swapped = raw.clone().view(-1)
            swapped[[0, -1]] = torch.tensor([swapped[-1], swapped[0]])
            assert bool(swapped[0] == swapped[-1]) or word_sums(swapped) != before


def test_an_odd_number_of_bytes_is_summed_to_its_end() -> None:
    tensor = torch.zeros(777, dtype=torch.uint8)
    sums = {word_sums(tensor)}
    for at in (0, 511, 512, 776):
        tensor[at] = 1
        sums.add(word_sums(tensor))
    assert len(sums) == 5


def test_rows_are_of_ones_and_the_same_everywhere() -> None:
    rows = canary_rows(65, CPU)
    assert rows.shape == (NUM_ROWS, 65)
    assert set(rows.flatten().tolist()) == {-1.0, 1.0}
    assert torch.equal(rows, canary_rows(65, CPU))
    assert len({tuple(row.tolist()) for row in rows}) == NUM_ROWS


def test_a_digest_depends_on_order_and_on_every_bit() -> None:
    def digest(*answers: torch.Tensor) -> bytes:
        made = Digest()
        for answer in answers:
            made.answers(answer)
        return made.value()

    zero, minus_zero = torch.tensor([0.0]), torch.tensor([-0.0])
    assert digest(zero, minus_zero) != digest(minus_zero, zero)
    assert digest(zero) != digest(minus_zero)
    assert digest(torch.tensor([float("nan")])) == digest(torch.tensor([float("nan")]))


@pytest.mark.parametrize("kernel", ["fp32", "fp16", "int8", pytest.param("bf16", marks=needs_bf16)])
def test_columns_of_the_same_weights_agree_and_others_do_not(kernel: str, tmp_path: Path) -> None:
    write_mixtral(tmp_path, dtype=torch.float16)
    checkpoint = Checkpoint.open(tmp_path)
    first, second = (ExpertColumn.load(checkpoint, 1, range(2), kernel, "cpu") for _ in range(2))
    other = ExpertColumn.load(checkpoint, 2, range(2), kernel, "cpu")
    before = [first.canary(layer) for layer in (0, 1)]
    assert [second.canary(layer) for layer in (0, 1)] == before
    assert len({*before, *(other.canary(layer) for layer in (0, 1))}) == 4
    first.forward(0, torch.randn(9, 64))
    assert [first.canary(layer) for layer in (0, 1)] == before
    with pytest.raises(KeyError):
        first.canary(2)


def test_what_lies_between_the_products_is_looked_at_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mixtral(tmp_path)
    column = ExpertColumn.load(Checkpoint.open(tmp_path), 0, range(1), "fp32", "cpu")
    before = column.canary(0)
    monkeypatch.setattr("model.experts._swiglu", lambda gate_MF, up_MF: torch.nn.functional.silu(gate_MF) * up_MF)
    assert column.canary(0) != before
