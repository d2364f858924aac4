"""Everything the HTTP routes stand on, as one value: the model's text tools, the coordinators, clocks and limits.

It knows nothing of HTTP or Ray; `actors.front.http_app` makes routes of it, `actors.ingress` fills it from a
cluster.
"""

import asyncio
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from actors.front.coordinator_pool import Coordinator, CoordinatorPool
from actors.front.metrics import FrontMetrics
from model.storage.config_reader import read_config
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer, load_tokenizer

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontLimits:
    """What one front door bears. Sizes in bytes or characters, times in seconds.

    `max_choices` bounds prompts times `n` of one request, `max_requests` the generation requests at one time.
    A coordinator that is silent `deadline_grace_s` after a request's deadline is no longer waited for. Text
    longer than `inline_chars` is tokenised on a thread, so that the event loop goes on.
    """

    max_body_bytes: int = 16 * 1024 * 1024
    max_choices: int = 128
    max_requests: int = 1024
    body_timeout_s: float = 60.0
    inline_chars: int = 2048
    deadline_grace_s: float = 5.0


@dataclass(frozen=True, kw_only=True)
class FrontDoor:
    """What all requests share. Make it with `load_front`.

    `eos_ids` are the tokens that end a sequence by either the model's or the tokenizer's word.
    `max_model_len` is in tokens, `created` in seconds since 1970, `vocab_size` the model's, not the
    tokenizer's.
    """

    model_id: str
    system_fingerprint: str
    created: int
    max_model_len: int
    vocab_size: int
    eos_ids: frozenset[int]
    request_timeout_s: float
    tokenizer: Tokenizer
    chat_template: ChatTemplate
    coordinators: CoordinatorPool
    metrics: FrontMetrics
    limits: FrontLimits = FrontLimits()
    wall_clock: Callable[[], float] = time.time
    draw_seed: Callable[[], int] = lambda: secrets.randbits(64)
    _request_ids: Iterator[int] = field(default_factory=lambda: itertools.count(1), repr=False)
    _threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=2, thread_name_prefix="text"), repr=False
    )

    @functools.cached_property
    def longest_token_bytes(self) -> int:
        """Bytes of the longest token: no text of more than this times N bytes fits into N tokens."""
        return max(len(self.tokenizer.token_bytes(token)) for token in range(self.tokenizer.vocab_size))

    def next_request_id(self) -> int:
        """An id that no other submission of this process has."""
        return next(self._request_ids)

    async def text_work(self, num_chars: int, work: Callable[[], Result]) -> Result:
        """Runs `work` here when the text is short, on a thread when it is long."""
        if num_chars <= self.limits.inline_chars:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    async def close(self) -> None:
        """Ends the coordinators' streams and the threads."""
        await self.coordinators.close()
        self._threads.shutdown(wait=False, cancel_futures=True)


def load_front(
    model_dir: Path,
    coordinators: Sequence[Coordinator],
    *,
    model_id: str,
    max_model_len: int,
    system_fingerprint: str,
    request_timeout_s: float,
    limits: FrontLimits | None = None,
) -> FrontDoor:
    """A front door for the checkpoint in `model_dir`: reads its configuration, tokenizer and chat template.

    Raises ModelConfigError, TokenizerError or ChatTemplateError.
    """
    model = read_config(model_dir)
    tokenizer = load_tokenizer(model_dir)
    eos_ids = {*model.eos_token_ids, *tokenizer.eos_ids}
    pool = CoordinatorPool(coordinators)
    return FrontDoor(
        model_id=model_id,
        system_fingerprint=system_fingerprint,
        created=int(time.time()),
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_ids=frozenset(token for token in eos_ids if token < model.vocab_size),
        request_timeout_s=request_timeout_s,
        tokenizer=tokenizer,
        chat_template=ChatTemplate.load(model_dir, tokenizer),
        coordinators=pool,
        metrics=FrontMetrics(model_id, lambda: pool.last_snapshots),
        limits=limits or FrontLimits(),
    )
