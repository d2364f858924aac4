"""What a single process routes, token by token: the oracle of everything that records which experts tokens took."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from model.batch import ForwardBatch
from model.dispatch import DispatchPlan
from model.kv_cache import KVCache
from tests.support.engines import TinyModel

Ids = npt.NDArray[Any]


def plan_experts(plan: DispatchPlan) -> list[list[int]]:
    """Each token's experts, by falling weight and then id, read row by row from a plan."""
    expert_of_row = [expert for expert, count in enumerate(plan.counts) for _ in range(count)]
    tokens = []
    for token, slots in enumerate(plan.slots_TK.tolist()):
        weights = plan.weights_TK[token].tolist()
        assert all(int(plan.tokens_N[slot]) == token for slot in slots)
        ranked = sorted((-weight, expert_of_row[slot]) for slot, weight in zip(slots, weights, strict=True))
        tokens.append([expert for _, expert in ranked])
    return tokens


def routed_alone(model: TinyModel, token_ids: Sequence[int]) -> Ids:
    """experts_TLK of one forward over all these tokens, in this process, without a cluster."""
    config = model.backbone.config
    num_blocks = len(token_ids) // 32 + 1
    kv = KVCache(config, num_blocks, 32)
    batch = ForwardBatch.build([list(token_ids)], [0], [list(range(num_blocks))])
    steps = model.backbone.forward(batch, kv)
    layers = []
    try:
        call = next(steps)
        while True:
            layers.append(plan_experts(call.plan))
            call = steps.send(model.local.run(call.layer, call.plan))
    except StopIteration:
        return np.array(layers).transpose(1, 0, 2)


def routed_by_transformers(oracle: transformers.MixtralForCausalLM, token_ids: Sequence[int]) -> Ids:
    """experts_TLK by the largest router logits that transformers computes."""
    with torch.no_grad():
        out = oracle(torch.tensor([list(token_ids)]), output_router_logits=True)
    top_k = oracle.config.num_experts_per_tok
    layers = [logits.view(-1, logits.shape[-1]).topk(top_k).indices for logits in out.router_logits]
    return torch.stack(layers, dim=1).numpy()


def read_rows(rows: Sequence[bytes], model: TinyModel) -> Ids:
    """Rows as they are told, as experts_TLK."""
    config = model.backbone.config
    ids = np.frombuffer(b"".join(rows), np.uint8 if config.num_experts <= 256 else "<u2")
    return ids.reshape(len(rows), config.num_layers, config.top_k)
