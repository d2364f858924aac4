"""The `routed_experts` of an answer in vLLM's form: a .npy array of (tokens, layers, top_k) expert ids, in base64.

The tokens are those of prompt and answer but for the last one, which no layer has seen. Off unless the server was
started with `enable_return_routed_experts`; then every answer has it that is not a stream, as in vLLM, unless the
request says `return_routed_experts: false`.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actors.front.openai_errors import unsupported
from actors.front.openai_schema import GenerationRequest
from model.config import ModelConfig
from model.expert_ids import id_dtype


@dataclass(frozen=True, slots=True)
class RoutedShape:
    """Of the model's ids for one token."""

    num_layers: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, model: ModelConfig) -> "RoutedShape":
        """The model's."""
        return cls(model.num_layers, model.num_experts, model.top_k)

    def encode(self, rows: Sequence[bytes], num_prompt: int, num_tokens: int) -> str | None:
        """The array of an answer of `num_tokens` tokens, of which more may have been computed; None without rows.

        Raises ValueError for rows of another model, or too few of them.
        """
        if not rows:
            return None
        wanted = num_prompt + max(0, num_tokens - 1)
        if len(rows) < wanted:
            raise ValueError(f"{len(rows)} positions came with experts, but the answer has {wanted}")
        flat = np.frombuffer(b"".join(rows[:wanted]), id_dtype(self.num_experts))
        file = io.BytesIO()
        np.save(file, flat.reshape(wanted, self.num_layers, self.top_k), allow_pickle=False)
        return base64.b64encode(file.getvalue()).decode("ascii")


def wants_routed_experts(request: GenerationRequest, shape: RoutedShape | None) -> bool:
    """Whether the answer is to have them. Raises ApiError where they are asked for and cannot be had."""
    if request.return_routed_experts and shape is None:
        raise unsupported("return_routed_experts", "needs a server started with --enable-return-routed-experts.")
    if request.return_routed_experts and request.stream:
        raise unsupported("return_routed_experts", "is not supported with 'stream'.")
    return shape is not None and not request.stream and request.return_routed_experts is not False
