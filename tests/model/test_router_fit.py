"""Routers made from data find the groups that are there, weigh them moderately, and are counted rightly."""

import pytest
import torch
from torch.nn.functional import normalize

from model.upcycling.router_fit import MEDIAN_TOP_WEIGHT, fit_router, measure_router, spherical_kmeans


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clouds(num_groups: int, per_group: int, width: int = 32, noise: float = 0.1) -> torch.Tensor:
    """Groups of rows around random directions, all far from the origin in one common direction: (G, n, D)."""
    directions = normalize(torch.randn(num_groups, 1, width, generator=generator(1)), dim=-1)
    rows = directions + noise * torch.randn(num_groups, per_group, width, generator=generator(2))
    return rows + 5 * torch.ones(width)


def test_kmeans_finds_separate_directions_whatever_their_lengths() -> None:
    axes = torch.eye(4)[:, None] + 0.05 * torch.randn(4, 50, 4, generator=generator())
    lengths = torch.rand(4, 50, 1, generator=generator(3)) * 10 + 0.1
    centroids = spherical_kmeans((axes * lengths).flatten(0, 1), 4, generator())
    assert torch.allclose(centroids.norm(dim=1), torch.ones(4), atol=1e-5)
    nearest = (centroids @ torch.eye(4)).argmax(1)
    assert sorted(nearest.tolist()) == [0, 1, 2, 3]
    assert (centroids.amax(1) > 0.99).all()


def test_kmeans_with_fewer_directions_than_clusters_stays_finite() -> None:
    centroids = spherical_kmeans(torch.ones(20, 3), 4, generator())
    assert centroids.isfinite().all()


def test_a_router_tells_the_groups_apart_though_all_share_a_large_mean() -> None:
    x_GnD = clouds(num_groups=4, per_group=100)
    gate_ED = fit_router(x_GnD.flatten(0, 1), 4, generator())
    top_Gn = (x_GnD @ gate_ED.T).argmax(-1)
    assert all(len(set(group)) == 1 for group in top_Gn.tolist())
    assert len(set(top_Gn[:, 0].tolist())) == 4


def test_a_dimension_that_is_huge_for_every_token_does_not_rule() -> None:
    x_GnD = clouds(num_groups=4, per_group=100)
    x_GnD[..., 0] = 300 + 30 * torch.randn(4, 100, generator=generator(5))
    gate_ED = fit_router(x_GnD.flatten(0, 1), 4, generator())
    top_Gn = (x_GnD @ gate_ED.T).argmax(-1)
    assert len(set(top_Gn[:, 0].tolist())) == 4


def test_the_gate_scale_gives_moderate_weights() -> None:
    x_TD = torch.randn(2000, 48, generator=generator()) * torch.logspace(-3, 2, 48) + 7
    gate_ED = fit_router(x_TD, 8, generator())
    stats = measure_router(x_TD.view(20, 100, 48), gate_ED, top_k=2)
    low, median, high = stats.top_weight
    assert median == pytest.approx(MEDIAN_TOP_WEIGHT, abs=1e-3)
    assert 0.5 <= low < median < high < 0.97


def test_the_same_seed_gives_the_same_router_and_another_seed_another() -> None:
    x_TD = torch.randn(500, 16, generator=generator())
    assert torch.equal(fit_router(x_TD, 4, generator(7)), fit_router(x_TD, 4, generator(7)))
    assert not torch.equal(fit_router(x_TD, 4, generator(7)), fit_router(x_TD, 4, generator(8)))


def test_rows_that_are_all_equal_give_a_finite_gate() -> None:
    assert fit_router(torch.full((50, 8), 3.0), 4, generator()).isfinite().all()


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="3 tokens are too few to tell 4 experts apart"):
        fit_router(torch.randn(3, 8), 4, generator())


def test_measure_counts_by_hand() -> None:
    gate_ED = torch.eye(4)
    logits = [  # one window of four tokens: first experts 0 0 1 2, second experts 1 1 0 0
        [3.0, 2.0, 0.0, 0.0],
        [3.0, 2.0, 0.0, 0.0],
        [2.0, 3.0, 0.0, -1.0],
        [1.0, 0.0, 2.0, -1.0],
    ]
    stats = measure_router(torch.tensor([logits]), gate_ED, top_k=2)
    assert (stats.max_load, stats.min_load) == (2.0, 0.0)  # loads 4 3 1 0, mean 2
    assert stats.same_next == pytest.approx(1 / 3)
    assert stats.same_by_chance == pytest.approx((4 + 1 + 1) / 16)
    assert stats.top_weight[1] == pytest.approx(torch.tensor(1.0).sigmoid().item())


def test_measure_with_one_expert_a_token_counts_only_the_first() -> None:
    x_WSD = torch.tensor([[[2.0, 1.0, 0.0]], [[2.0, 1.0, 0.0]], [[0.0, 1.0, 2.0]]]).repeat(1, 2, 1)
    stats = measure_router(x_WSD, torch.eye(3), top_k=1)
    assert (stats.max_load, stats.min_load) == (2.0, 0.0)
    assert stats.same_next == 1.0
