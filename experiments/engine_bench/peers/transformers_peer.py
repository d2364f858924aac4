"""Peer process: Hugging Face transformers in fp32, a static batch of equal lengths with its key-value cache.

Experts are computed as `eager` or as `grouped_mm`, whichever was faster for this batch size and this phase when both
were tried, so that the comparison is with its best.
"""

import time
from typing import Any

from experiments.engine_bench.peers.child import Handler, Request, serve

IMPLEMENTATIONS = ("eager", "grouped_mm")
TRIAL_TOKENS = 4


class TransformersPeer:
    """One model. `choices` maps (batch, is_prefill) to the experts' implementation."""

    def __init__(self, model_dir: str, threads: int) -> None:
        import torch
        import transformers

        torch.set_num_threads(threads)
        self._torch = torch
        auto: Any = transformers.AutoModelForCausalLM
        self._model: Any = auto.from_pretrained(model_dir, dtype=torch.float32).eval()
        self._choices: dict[tuple[int, bool], str] = {}
        self.facts = {
            "library": f"transformers {transformers.__version__}",
            "weights": "fp32",
            "kv_cache": "fp32",
            "threads": threads,
            "attention": str(self._model.config._attn_implementation),
        }

    def handle(self, request: Request) -> dict[str, Any]:
        """{"prompts", "output_len"} -> {"tokens", "arrivals_s", "facts"}."""
        prompts, output_len = request["prompts"], request["output_len"]
        if (len(prompts), True) not in self._choices:
            self._try_both(prompts)
        tokens, arrivals = self._generate(prompts, output_len)
        chosen = {f"experts_b{batch}_{'prefill' if first else 'decode'}": how for (batch, first), how in
                  sorted(self._choices.items())}  # fmt: skip
        return {"tokens": tokens, "arrivals_s": [arrivals] * len(prompts), "facts": chosen}

    def _try_both(self, prompts: list[list[int]]) -> None:
        """After a first forward that is not timed, for it pays for what is made once."""
        batch = len(prompts)
        spent: dict[str, tuple[float, float]] = {}
        for how in IMPLEMENTATIONS:
            self._choices |= {(batch, True): how, (batch, False): how}
            self._generate([prompt[:8] for prompt in prompts], 2)
            _, arrivals = self._generate(prompts, TRIAL_TOKENS)
            spent[how] = (arrivals[0], arrivals[-1] - arrivals[0])
        for phase in (0, 1):
            self._choices[batch, phase == 0] = min(IMPLEMENTATIONS, key=lambda how: spent[how][phase])

    def _generate(self, prompts: list[list[int]], output_len: int) -> tuple[list[list[int]], list[float]]:
        torch, batch = self._torch, len(prompts)
        steps: list[Any] = []
        arrivals: list[float] = []
        past = None
        began_s = time.perf_counter()
        with torch.inference_mode():
            ids = torch.tensor(prompts)
            for step in range(output_len):
                self._model.set_experts_implementation(self._choices[batch, step == 0])
                out = self._model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
                past = out.past_key_values
                ids = out.logits[:, -1].argmax(-1, keepdim=True)
                steps.append(ids)
                arrivals.append(time.perf_counter() - began_s)
        return torch.cat(steps, 1).tolist(), arrivals


def start(request: Request) -> tuple[dict[str, Any], Handler]:
    """{"model", "threads"} -> the facts, and the handler."""
    peer = TransformersPeer(request["model"], request["threads"])
    return {"facts": peer.facts}, peer.handle


if __name__ == "__main__":
    serve(start)
