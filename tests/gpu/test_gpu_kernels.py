"""On a real GPU: products within their stated error, rows that keep their bits, graphs and staging that change none."""

import pytest
import torch

from model.device_calls import LARGEST_GRAPHED_ROWS, MAX_GRAPHS, GraphedCalls, Staging, upload
from model.dispatch import dispatch
from model.kernels import KernelError, check_exp, get_kernel, self_test
from model.numerics import map_rows, same_bits
from model.sampling.sampler import SamplerState, SamplingParams, sample
from tests.support.gpu import CUDA, needs_gpu, needs_kernel, random_column, rows

pytestmark = [pytest.mark.gpu, needs_gpu]

KERNELS = ("fp32", "bf16", "fp8")
ERROR = {"fp32": 1e-5, "bf16": 5e-3, "fp8": 0.1}
"""Of an expert, root mean square over that of its answers."""


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_self_test_passes(kernel: str) -> None:
    needs_kernel(kernel)
    self_test(kernel, CUDA)


def test_kernels_of_the_cpu_are_refused() -> None:
    with pytest.raises(KernelError, match="not available on cuda"):
        get_kernel("int8", CUDA)


def test_silu_and_exp_do_not_depend_on_the_place() -> None:
    check_exp(CUDA)
    check_exp(CUDA, torch.nn.functional.silu)


@pytest.mark.parametrize("kernel", KERNELS)
def test_an_expert_errs_no_more_than_is_stated(kernel: str) -> None:
    needs_kernel(kernel)
    column = random_column(kernel)
    exact = random_column("fp32")
    w1_w3 = [linear.held[0].double() for linear in exact._ffns[0].gate_up]
    w2 = exact._ffns[0].w2.held[0].double()
    x_MD = rows(70, 1024)
    gate, up = x_MD.double() @ w1_w3[0], x_MD.double() @ w1_w3[1]
    expected = (torch.nn.functional.silu(gate) * up) @ w2
    error = float((column.forward(0, x_MD).double() - expected).norm() / expected.norm())
    assert error < ERROR[kernel], error


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("widths", [(1024, 3584), (64, 112), (4096, 14336)])
def test_a_row_has_the_same_bits_alone_and_in_any_company(kernel: str, widths: tuple[int, int]) -> None:
    needs_kernel(kernel)
    hidden, ffn = widths
    column = random_column(kernel, hidden=hidden, ffn=ffn)
    x_MD = rows(700, hidden, seed=3)
    whole = column.forward(0, x_MD)
    for count in (1, 2, 3, 5, 8, 17, 31, 32, 33, 64, 65, 100, 128, 200, 256, 511, 512, 513):
        for start in (0, 700 - count):
            part = slice(start, start + count)
            assert same_bits(column.forward(0, x_MD[part]), whole[part]), (count, start, column.numerics_domain)
    order = torch.randperm(700, generator=torch.Generator().manual_seed(1))
    assert same_bits(column.forward(0, x_MD[order]), whole[order])


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_graph_answers_as_a_direct_call(kernel: str) -> None:
    needs_kernel(kernel)
    column = random_column(kernel, layers=2)
    for layer in range(2):
        for count in (1, 7, 16, 40, 64, 65, 300, 1, 16):
            x_MD = rows(count, 1024, seed=count)
            direct = map_rows(column._ffns[layer], x_MD, column._row_classes[layer])
            assert same_bits(column.forward(layer, x_MD), direct), (layer, count)


def test_both_row_classes_are_part_of_the_domain() -> None:
    column = random_column("bf16", hidden=4096, ffn=14336)
    inner = column._ffns[0].w2_class
    assert inner is not None
    classes = column.numerics_domain.partition("ffn_rows=")[2].split(" ")[0].split("/")
    assert set(classes) == {str(inner), str(column._row_classes[0])}


def test_graphs_are_bounded_and_few() -> None:
    column = random_column("bf16", layers=2)
    for _ in range(2):
        for layer in range(2):
            for count in range(1, 130):
                column.forward(layer, rows(count, 1024))
    assert column._graphs is not None
    buckets = [count for count in column._row_classes[0].buckets if count <= LARGEST_GRAPHED_ROWS]
    assert MAX_GRAPHS - column._graphs.left <= 2 * len(buckets)
    few = GraphedCalls(max_graphs=1)
    call = few.wrap(lambda x: x * 2)
    for count in (1, 2, 4):
        assert torch.equal(call(rows(count, 8)), rows(count, 8) * 2)
    assert few.left == 0


def test_a_call_that_cannot_be_captured_is_made_directly() -> None:
    call = GraphedCalls().wrap(lambda x: x * float(x.sum().item() * 0 + 2))  # reads the device: no graph may
    for _ in range(2):
        assert torch.equal(call(rows(4, 8)), rows(4, 8) * 2)
    assert torch.equal(GraphedCalls().wrap(lambda x: x * 3)(rows(4, 8)), rows(4, 8) * 3), "capturing works again"


def test_rows_from_the_host_go_there_and_back_exactly() -> None:
    staging = Staging(CUDA)
    for count in (1, 40, 3, 500):
        for dtype in (torch.float32, torch.bfloat16):
            x_MI = torch.randn(count, 96).to(dtype)
            on_device = staging.to_device(x_MI)
            assert on_device.device.type == "cuda"
            assert same_bits(staging.to_host(on_device), x_MI)
    column = random_column("bf16")
    for count in (1, 33, 200):
        x_MD = torch.randn(count, 1024)
        there = column.forward(0, x_MD)
        assert there.device.type == "cpu"
        assert same_bits(there, column.forward(0, x_MD.to(CUDA)).cpu())


def test_uploads_are_whole_though_nobody_waits() -> None:
    sent = [torch.full((5000,), float(number)) for number in range(200)]
    there = [upload(x, CUDA) for x in sent]
    assert all(torch.equal(y.cpu(), x) for x, y in zip(sent, there, strict=True))


def test_a_canary_repeats_itself_and_sees_a_flipped_bit() -> None:
    column = random_column("bf16")
    known = column.canary(0)
    column.forward(0, rows(9, 1024))
    assert column.canary(0) == known
    held = column._ffns[0].w2.held[0]
    held.view(torch.int16)[7, 9] ^= 1
    assert column.canary(0) != known


@pytest.mark.parametrize("tokens", [1, 2, 3, 77])
def test_dispatch_is_the_cpus(tokens: int) -> None:
    x_TD, logits_TE = rows(tokens, 16), rows(tokens, 8, seed=4)
    logits_TE[0, 3:6] = logits_TE[0].max() + 1  # equal: the lower id comes first
    there, here = dispatch(x_TD, logits_TE, 2), dispatch(x_TD.cpu(), logits_TE.cpu(), 2)
    assert there.counts == here.counts
    for name in ("tokens_N", "slots_TK", "weights_TK", "x_ND"):
        assert getattr(there, name).device.type == "cuda"
        assert same_bits(getattr(there, name).cpu(), getattr(here, name)), name


def test_greedy_tokens_are_the_cpus() -> None:
    logits = rows(40, 32000)
    logits[3, 17] = logits[3, 4000] = logits[3].max() + 1
    logits[5, 9], logits[6, 11] = torch.nan, torch.inf
    states = [SamplerState(SamplingParams(temperature=0.0), []) for _ in range(40)]
    assert sample(logits, states, [None] * 40) == sample(logits.cpu(), states, [None] * 40)
