"""Load is counted per layer and expert, in total and in a window that forgets."""

import numpy as np
import pytest

from cluster.load import LoadCounter, LoadWindow, balancedness


def test_totals_add_up_and_are_copies() -> None:
    counter = LoadCounter(2, 3)
    counter.add(0, (1, 2, 3))
    counter.add(0, (1, 0, 0))
    counter.add(1, [0, 0, 5])
    assert counter.total.tolist() == [[2, 2, 3], [0, 0, 5]]
    assert counter.window.load.tolist() == counter.total.tolist()
    counter.total[0, 0] = 99
    counter.window.load[0, 0] = 99
    assert counter.total[0, 0] == counter.window.load[0, 0] == 2


@pytest.mark.parametrize("counts", [(1, 2), (1, 2, 3, 4)])
def test_counts_of_other_experts_are_refused(counts: tuple[int, ...]) -> None:
    counter = LoadCounter(2, 3)
    with pytest.raises(ValueError, match=f"counts of {len(counts)} experts, expected 3"):
        counter.add(0, counts)


def test_the_window_forgets_slot_by_slot() -> None:
    window = LoadWindow(1, 1, window_s=30.0, num_slots=3)
    for now_s, expected in [
        (100.0, 1),
        (109.0, 2),
        (111.0, 3),
        (120.0, 4),
        (130.0, 3),
        (140.0, 3),
        (169.0, 2),
        (300.0, 1),
    ]:
        window.roll(now_s)
        window.add(0, (1,))
        assert window.load.tolist() == [[expected]], now_s


def test_the_total_does_not_forget() -> None:
    counter = LoadCounter(1, 1, LoadWindow(1, 1, window_s=1.0, num_slots=1))
    for now_s in (0.0, 10.0, 20.0):
        counter.roll(now_s)
        counter.add(0, (2,))
    assert (counter.total.item(), counter.window.load.item()) == (6, 2)


def test_the_window_says_what_time_it_is_from() -> None:
    window = LoadWindow(1, 1, window_s=30.0, num_slots=3)
    assert window.covered_s == 0.0
    for now_s, covered_s in [(105.0, 0.0), (108.0, 3.0), (110.0, 5.0), (125.0, 20.0), (129.0, 24.0), (130.0, 20.0)]:
        window.roll(now_s)
        assert window.covered_s == pytest.approx(covered_s), now_s
    window.roll(50.0)
    assert window.covered_s == pytest.approx(20.0), "a clock that steps back"
    window.roll(1009.0)
    assert window.covered_s == pytest.approx(29.0)


def test_a_clock_that_steps_back_loses_nothing() -> None:
    window = LoadWindow(1, 1, window_s=30.0, num_slots=3)
    for now_s in (100.0, 50.0, 101.0):
        window.roll(now_s)
        window.add(0, (1,))
    assert window.load.item() == 3


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([[4, 4, 4, 4]], [1.0]),
        ([[8, 0, 0, 0]], [0.25]),
        ([[0, 0]], [1.0]),
        ([[3, 1], [1, 1], [0, 2]], [2 / 3, 1.0, 0.5]),
    ],
)
def test_balancedness_is_mean_over_max_per_layer(load: list[list[int]], expected: list[float]) -> None:
    assert balancedness(load) == pytest.approx(expected)


def test_summing_over_layers_would_hide_the_imbalance() -> None:
    load = np.array([[8, 0], [0, 8]])
    assert balancedness(load) == pytest.approx([0.5, 0.5])
    assert balancedness(load.sum(axis=0, keepdims=True)) == pytest.approx([1.0])


@pytest.mark.parametrize("load", [[1, 2], [[]], [[1, -1]]])
def test_balancedness_refuses_other_shapes_and_negatives(load: object) -> None:
    with pytest.raises(ValueError, match="load_LE has shape"):
        balancedness(load)  # type: ignore[arg-type]


def test_sizes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="num_layers is 0 and num_experts 3"):
        LoadCounter(0, 3)
    with pytest.raises(ValueError, match="num_slots 0"):
        LoadWindow(1, 1, num_slots=0)
    with pytest.raises(ValueError, match="window_s is 0"):
        LoadWindow(1, 1, window_s=0.0)


def test_batches_and_what_of_them_replicas_would_share_are_counted() -> None:
    least = [4.0]
    counter = LoadCounter(2, 3, divisible_rows=lambda: least[0])
    counter.add(0, (9, 9, 9))
    assert counter.divisible.tolist() == [[0, 0, 0], [0, 0, 0]], "nobody was asked yet"
    counter.roll(1.0)
    counter.add(0, (4, 3, 0))
    counter.add(1, (1, 2, 3))
    least[0] = 3.0
    counter.roll(2.0)
    counter.add(1, (1, 2, 3))
    assert counter.divisible.tolist() == [[4, 0, 0], [0, 0, 3]]
    assert counter.batches == 2, "a layer's rows of a batch are counted once for each layer"
