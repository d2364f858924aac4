"""Everything the HTTP routes stand on, as one value: the model's text tools, the coordinators, clocks and limits.

It knows nothing of HTTP or Ray; `actors.front.http_app` makes routes of it, `actors.ingress` fills it from a
cluster.
"""

import asyncio
import functools
import itertools
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actors.coordinator.submit_check import SubmitLimits
from actors.front.accounts import Accounts
from actors.front.caller import Caller
from actors.front.coordinator_pool import Coordinator, CoordinatorPool
from actors.front.key_file import Keys
from actors.front.metrics import FrontMetrics
from actors.front.overload import Overload
from actors.front.proxy_hold import BY_INGRESS, HOLD_HEADER, hold_value
from actors.front.request_trace import SpanMaker
from actors.front.room_watch import ASK_S, RoomWatch
from actors.front.routed_experts import RoutedShape
from actors.front.scrape import Look, Scrape, StatusWatch, nobody
from actors.front.stream_memory import StreamMemory
from model.storage.config_reader import read_config
from model.text.chat_template import ChatTemplate
from model.text.tokenizer import Tokenizer, load_tokenizer
from model.text.tokenizer_info import tokenizer_info

Result = TypeVar("Result")

LONGEST_HOLD_S = 0.25
"""What leaves the coordinators' queues meanwhile is less than they hold, where `max_queue_wait_s` is not short."""

LINGER_HOLDS = 4
"""As many times as long as a refusal speaks for others the coordinators are asked after the last who came: a proxy asks
about twice in that time, and later where the machine is busy.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontLimits:
    """What one front door bears. Sizes in bytes or characters, times in seconds.

    `max_choices` bounds prompts times `n` of one request, `max_requests` the generation requests at one time.
    A stream may be resumed until `resume_s` after an event.
    A coordinator that is silent `deadline_grace_s` after a request's deadline is no longer waited for. Text
    longer than `inline_chars` is tokenised on a thread, so that the event loop goes on. For `hold_s` a refusal for
    overload speaks for others, at a proxy that can do that.
    """

    max_body_bytes: int = 16 * 1024 * 1024
    max_choices: int = 128
    max_requests: int = 1024
    body_timeout_s: float = 60.0
    inline_chars: int = 2048
    deadline_grace_s: float = 5.0
    resume_s: float = 300.0
    hold_s: float = LONGEST_HOLD_S


@dataclass(frozen=True, kw_only=True)
class FrontDoor:
    """What all requests share. Make it with `load_front`.

    `eos_ids` are the tokens that end a sequence by either the model's or the tokenizer's word.
    `max_model_len` is in tokens, `created` in seconds since 1970, `vocab_size` the model's, not the
    tokenizer's. `routed_shape` is that of `routed_experts` in answers, None where they have none; `tokenizer_info` is
    the tokenizer's configuration for clients. `keys` None lets everybody in; browsers' pages from `cors_origins` may
    ask. `is_guarded` where it stands behind `actors.front.proxy_guard`.
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
    routed_shape: RoutedShape | None = None
    tokenizer_info: Mapping[str, Any] = field(default_factory=dict)
    status: StatusWatch = field(default_factory=StatusWatch)
    spans: SpanMaker | None = None
    limits: FrontLimits = FrontLimits()
    overload: Overload = field(default_factory=Overload)
    keys: Keys | None = None
    accounts: Accounts = field(default_factory=Accounts)
    cors_origins: tuple[str, ...] = ()
    is_guarded: bool = False
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

    @functools.cached_property
    def submit_limits(self) -> SubmitLimits:
        """What the coordinators hold every request to; it is held to the same here, before it is sent."""
        return SubmitLimits(
            vocab_size=self.vocab_size,
            max_model_len=self.max_model_len,
            request_timeout_s=self.request_timeout_s,
            routed_experts=self.routed_shape is not None,
        )

    @functools.cached_property
    def scrape(self) -> Scrape:
        """Looks at coordinators and supervisor before a page of metrics is written."""
        return Scrape(self.coordinators.snapshots, self.status.refresh)

    @functools.cached_property
    def room_watch(self) -> RoomWatch:
        """Asks the coordinators for room while requests are refused."""
        return RoomWatch(self.overload, self.coordinators.room, pause_s=min(ASK_S, self.limits.hold_s / 2))

    @functools.cached_property
    def memory(self) -> StreamMemory:
        """The tokens of streams that may be resumed."""
        return StreamMemory(self.limits.resume_s)

    def hold(self, caller: Caller, by: str = BY_INGRESS) -> dict[str, str]:
        """Headers of a refusal for overload, by which a guarded proxy refuses others in its words."""
        if not self.is_guarded or caller.is_counted:
            return {}
        return {HOLD_HEADER: hold_value(self.limits.hold_s, by)}

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
        await self.scrape.close()
        await self.room_watch.close()
        await self.coordinators.close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        if self.spans is not None:
            await asyncio.to_thread(self.spans.close)


def load_front(
    model_dir: Path,
    coordinators: Sequence[Coordinator],
    *,
    model_id: str,
    max_model_len: int,
    system_fingerprint: str,
    request_timeout_s: float,
    limits: FrontLimits | None = None,
    look: Look = nobody,
    routed_experts: bool = False,
    keys: Keys | None = None,
    cors_origins: tuple[str, ...] = (),
    spans: SpanMaker | None = None,
    is_guarded: bool = False,
) -> FrontDoor:
    """A front door for the checkpoint in `model_dir`: reads its configuration, tokenizer and chat template.

    `look` asks the supervisor how the cluster is, for metrics; `spans` makes the spans of requests, if there are
    to be any. Raises ModelConfigError, TokenizerError or ChatTemplateError.
    """
    model = read_config(model_dir)
    tokenizer = load_tokenizer(model_dir)
    eos_ids = {*model.eos_token_ids, *tokenizer.eos_ids}
    template = ChatTemplate.load(model_dir, tokenizer)
    pool = CoordinatorPool(coordinators)
    status = StatusWatch(look)
    limits = limits or FrontLimits()
    return FrontDoor(
        model_id=model_id,
        system_fingerprint=system_fingerprint,
        created=int(time.time()),
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        eos_ids=frozenset(token for token in eos_ids if token < model.vocab_size),
        request_timeout_s=request_timeout_s,
        tokenizer=tokenizer,
        chat_template=template,
        coordinators=pool,
        metrics=FrontMetrics(
            model_id,
            lambda: pool.last_snapshots,
            lambda: pool.resubmissions,
            lambda: status.last,
            max_model_len=max_model_len,
        ),
        routed_shape=RoutedShape.of(model) if routed_experts else None,
        tokenizer_info=tokenizer_info(model_dir, tokenizer, template),
        status=status,
        spans=spans,
        limits=limits,
        overload=Overload(linger_s=LINGER_HOLDS * limits.hold_s if is_guarded else 0.0),
        keys=keys,
        cors_origins=cors_origins,
        is_guarded=is_guarded,
    )
