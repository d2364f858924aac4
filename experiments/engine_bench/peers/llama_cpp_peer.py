"""Peer process: llama.cpp through llama-cpp-python's low-level interface, many sequences in one batch.

Everything is the library's default but what the machine decides: as many threads as cores, a context made to measure
for each batch size (before the clock starts). So keys and values are fp16 and flash attention is its own choice.
"""

import ctypes
import time
from typing import Any

import numpy as np

from experiments.engine_bench.peers.child import Handler, Request, serve

NUM_BATCH = 2048  # tokens of one llama_decode, the default
NUM_UBATCH = 512  # tokens that it computes at a time, the default
CONTEXT_ROUND = 256


class LlamaCppPeer:
    """One model, and a context for each (batch, length) seen."""

    def __init__(self, gguf: str, threads: int) -> None:
        import llama_cpp

        self._lib: Any = llama_cpp
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model: Any = llama_cpp.llama_model_load_from_file(gguf.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {gguf}")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._threads = threads
        self._contexts: dict[tuple[int, int], Any] = {}
        self._batch: Any = llama_cpp.llama_batch_init(NUM_BATCH, 0, 1)
        self.facts = {
            "library": f"llama-cpp-python {llama_cpp.__version__}",
            "weights": "fp16 GGUF",
            "kv_cache": "fp16 (its default)",
            "threads": threads,
            "flash_attention": "auto (its default)",
            "n_batch": NUM_BATCH,
            "n_ubatch": NUM_UBATCH,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def handle(self, request: Request) -> dict[str, Any]:
        """{"prompts", "output_len"} -> {"tokens", "arrivals_s"}."""
        prompts, output_len = request["prompts"], request["output_len"]
        context = self._context(len(prompts), max(map(len, prompts)) + output_len)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(context), True)
        tokens: list[list[int]] = [[] for _ in prompts]
        arrivals: list[list[float]] = [[] for _ in prompts]
        began_s = time.perf_counter()

        def take(sampled: dict[int, int]) -> None:
            now_s = time.perf_counter() - began_s
            for sequence, token in sampled.items():
                tokens[sequence].append(token)
                arrivals[sequence].append(now_s)

        flat = [
            (sequence, position, token, position == len(prompt) - 1)
            for sequence, prompt in enumerate(prompts)
            for position, token in enumerate(prompt)
        ]
        for first in range(0, len(flat), NUM_BATCH):
            take(self._decode(context, flat[first : first + NUM_BATCH]))
        for step in range(output_len - 1):
            rows = [(s, len(prompt) + step, tokens[s][-1], True) for s, prompt in enumerate(prompts)]
            take(self._decode(context, rows))
        return {"tokens": tokens, "arrivals_s": arrivals}

    def _decode(self, context: Any, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Computes rows of (sequence, position, token, wants a next token); returns the likeliest next tokens."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (sequence, position, token, wanted) in enumerate(rows):
            batch.token[row] = token
            batch.pos[row] = position
            batch.n_seq_id[row] = 1
            batch.seq_id[row][0] = sequence
            batch.logits[row] = wanted
        status = self._lib.llama_decode(context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status} for {len(rows)} rows")
        return {rows[row][0]: self._best(context, row) for row in range(len(rows)) if rows[row][3]}

    def _best(self, context: Any, row: int) -> int:
        logits = self._lib.llama_get_logits_ith(context, row)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab_size,))
                   .argmax())  # fmt: skip

    def _context(self, batch: int, length: int) -> Any:
        room = -(-length // CONTEXT_ROUND) * CONTEXT_ROUND
        if (batch, room) not in self._contexts:
            params = self._lib.llama_context_default_params()
            params.n_ctx = batch * room
            params.n_seq_max = batch
            params.n_batch = NUM_BATCH
            params.n_ubatch = NUM_UBATCH
            params.n_threads = params.n_threads_batch = self._threads
            context = self._lib.llama_init_from_model(self._model, params)
            if not context:
                raise RuntimeError(f"llama.cpp has no memory for {batch} sequences of {room} tokens")
            self._contexts[batch, room] = context
        return self._contexts[batch, room]


def start(request: Request) -> tuple[dict[str, Any], Handler]:
    """{"model", "threads"} -> the facts, and the handler; the model is a .gguf file."""
    peer = LlamaCppPeer(request["model"], request["threads"])
    return {"facts": peer.facts}, peer.handle


if __name__ == "__main__":
    serve(start)
