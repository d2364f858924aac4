"""Makes a router from data: clusters a layer's FFN inputs, so that an expert owns a kind of token.

Where the hidden states come from is `model.upcycling.calibration`'s work; the gate is an ordinary linear D→E.

Three choices (figures: SmolLM2-135M, 30 layers, 8 experts, text held out from fitting):
- Every dimension is divided by its standard deviation first, or a few large ones rule. It makes routing more
  local (a token's top expert is the next one's in 30 % of cases, not 22 %) at the same load.
- Centroids are kept orthogonal to the mean state. A gate has no bias, so a centroid that leans towards the
  mean would win for every token alike; this way a token's top expert is its k-means cluster exactly.
- The scale is set so that the median weight of the first of two experts is MEDIAN_TOP_WEIGHT: real routers
  decide neither by a coin nor for sure. Left alone, that median would be about 0.97.

Legend: T tokens, D model dim, E experts, W windows of text, S tokens per window.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

MEDIAN_TOP_WEIGHT = 0.65
MAX_ITERATIONS = 50


@dataclass(frozen=True, slots=True)
class RouterStats:
    """What one layer's router does on text it was not fitted to.

    `max_load` and `min_load` are in units of the mean load (top-k counts). `same_next` is the share of tokens
    whose top expert is also the next token's, `same_by_chance` what independent draws from the same loads
    would give. `top_weight`: 5 %, 50 % and 95 % quantiles of the first expert's weight among the first two.
    """

    max_load: float
    min_load: float
    same_next: float
    same_by_chance: float
    top_weight: tuple[float, float, float]


def fit_router(x_TD: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """Cluster FFN inputs into a gate of shape (E, D), fp32; `x_TD` should have far more rows than E."""
    if len(x_TD) < num_experts:
        raise ValueError(f"{len(x_TD)} tokens are too few to tell {num_experts} experts apart")
    x_TD = x_TD.float()
    scale_D = x_TD.std(0, correction=0)
    scale_D = scale_D.clamp_min(1e-3 * float(scale_D.median()) + 1e-20)
    z_TD = x_TD / scale_D
    mean_D = normalize(z_TD.mean(0), dim=0)
    centroids_ED = spherical_kmeans(_without(z_TD, mean_D), num_experts, generator)
    gate_ED = _without(centroids_ED, mean_D) / scale_D
    return gate_ED * _healthy_scale(x_TD @ gate_ED.T)


def spherical_kmeans(z_TD: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Unit centroids (E, D) of the directions of `z_TD`: k-means++, then Lloyd's steps by cosine similarity.

    Dhillon and Modha, "Concept decompositions for large sparse text data using clustering" (2001).
    """
    z_TD = normalize(z_TD, dim=1)
    centroids_ED = _spread_out(z_TD, num_clusters, generator)
    for _ in range(MAX_ITERATIONS):
        nearest_T = (z_TD @ centroids_ED.T).argmax(1)
        sums_ED = torch.zeros_like(centroids_ED).index_add_(0, nearest_T, z_TD)
        empty_E = nearest_T.bincount(minlength=num_clusters) == 0
        moved_ED = torch.where(empty_E[:, None], centroids_ED, normalize(sums_ED, dim=1))
        if torch.equal(moved_ED, centroids_ED):
            break
        centroids_ED = moved_ED
    return centroids_ED


def measure_router(x_WSD: Tensor, gate_ED: Tensor, top_k: int) -> RouterStats:
    """Route windows of consecutive tokens and count; see `RouterStats`."""
    logits_WSE = x_WSD.float() @ gate_ED.float().T
    num_experts = len(gate_ED)
    top = logits_WSE.topk(max(top_k, 2), dim=-1)
    loads_E = top.indices[..., :top_k].flatten().bincount(minlength=num_experts).double()
    first_WS = top.indices[..., 0]
    share_E = first_WS.flatten().bincount(minlength=num_experts).double() / first_WS.numel()
    weight_WS = torch.sigmoid(top.values[..., 0] - top.values[..., 1])
    low, median, high = weight_WS.flatten().quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    return RouterStats(
        max_load=float(loads_E.max() / loads_E.mean()),
        min_load=float(loads_E.min() / loads_E.mean()),
        same_next=float((first_WS[:, 1:] == first_WS[:, :-1]).double().mean()),
        same_by_chance=float(share_E.square().sum()),
        top_weight=(low, median, high),
    )


def _without(z_TD: Tensor, direction_D: Tensor) -> Tensor:
    """Rows with their part along one unit direction taken out."""
    return z_TD - (z_TD @ direction_D)[:, None] * direction_D


def _spread_out(z_TD: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """k-means++: each next centroid is a row drawn in proportion to its distance from those chosen."""
    chosen = [int(torch.randint(len(z_TD), (1,), generator=generator))]
    distance_T = 1 - z_TD @ z_TD[chosen[0]]
    while len(chosen) < count:
        weights_T = distance_T.clamp_min(1e-9)
        chosen.append(int(torch.multinomial(weights_T, 1, generator=generator)))
        distance_T = torch.minimum(distance_T, 1 - z_TD @ z_TD[chosen[-1]])
    return z_TD[chosen]


def _healthy_scale(logits_TE: Tensor) -> float:
    """What to multiply logits by so that the median of sigmoid(first − second) is MEDIAN_TOP_WEIGHT."""
    first_two = logits_TE.topk(2, dim=-1).values
    gap = float((first_two[:, 0] - first_two[:, 1]).median())
    wanted = math.log(MEDIAN_TOP_WEIGHT / (1 - MEDIAN_TOP_WEIGHT))
    return wanted / gap if gap > 0 else 1.0
