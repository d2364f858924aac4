"""The grammars of one coordinator: compiled beside the event loop, one after another, and kept for those who ask again.

Everything here is bounded: those that are kept, and those that wait. What compiling means, and its limits, are
`actors.coordinator.grammar_workshop`'s.
"""

import asyncio
import contextlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from actors.coordinator.grammar_mask import Followed, MaskCounters
from actors.coordinator.grammar_workshop import Workshop, WorkshopBusy
from model.grammar.compiled import Compiled, GrammarFailed, Matcher
from model.grammar.spec import GrammarError, GrammarSpec
from model.grammar.vocabulary import Vocabulary

MAX_KEPT = 64
MAX_WAITING = 32
STACK_BYTES = 16 << 20
INLINE_TOKENS = 64
"""Tokens of an answer that goes on from elsewhere which are followed at once; more are followed in the thread."""


class GrammarsBusy(Exception):
    """As many grammars as may wait are waiting, or there was no time; later there may be room."""


@dataclass(slots=True)
class GrammarCounters:
    """Totals since start. `hits` found their grammar, or its refusal, as it was left by another request."""

    compiled: int = 0
    refused: int = 0
    hits: int = 0


class Grammars:
    """Use it from one event loop."""

    def __init__(self, vocabulary: Vocabulary, *, max_kept: int = MAX_KEPT, max_waiting: int = MAX_WAITING) -> None:
        self.counters = GrammarCounters()
        self.masks = MaskCounters()
        self.workshop = Workshop(vocabulary)
        self._max_kept = max_kept
        self._max_waiting = max_waiting
        self._kept: OrderedDict[GrammarSpec, Compiled | GrammarError] = OrderedDict()
        self._waiting: dict[GrammarSpec, asyncio.Future[Compiled]] = {}
        self._thread = ThreadPoolExecutor(1, "grammar")
        self._closed = False

    async def followed(self, spec: GrammarSpec, generated_ids: Sequence[int] = ()) -> Followed:
        """One for a text that begins with `generated_ids`. Raises GrammarError or GrammarsBusy."""
        matcher = (await self._compiled(spec)).matcher()
        if len(generated_ids) <= INLINE_TOKENS:
            _follow(matcher, generated_ids)
        else:
            await asyncio.get_running_loop().run_in_executor(self._thread, _follow, matcher, generated_ids)
        return Followed(matcher, self.masks)

    def close(self) -> None:
        """Ends the process and, once idle, the thread. May be called again."""
        if not self._closed:
            self._closed = True
            self._thread.submit(self.workshop.close)
            self._thread.shutdown(wait=False)

    async def _compiled(self, spec: GrammarSpec) -> Compiled:
        kept = self._kept.get(spec)
        if kept is not None:
            self.counters.hits += 1
            self._kept.move_to_end(spec)
            if isinstance(kept, GrammarError):
                raise GrammarError(str(kept))
            return kept
        waiting = self._waiting.get(spec)
        if waiting is None:
            if len(self._waiting) >= self._max_waiting:
                raise GrammarsBusy(f"{self._max_waiting} grammars wait to be compiled, the most that may")
            waiting = self._waiting[spec] = asyncio.ensure_future(self._compile(spec))
            waiting.add_done_callback(lambda done: done.cancelled() or done.exception())
        else:
            self.counters.hits += 1
        return await asyncio.shield(waiting)

    async def _compile(self, spec: GrammarSpec) -> Compiled:
        try:
            with _stack(STACK_BYTES):
                work = asyncio.get_running_loop().run_in_executor(self._thread, self.workshop.compile, spec)
            compiled = await work
        except GrammarError as error:
            self.counters.refused += 1
            self._keep(spec, error)
            raise
        except (WorkshopBusy, RuntimeError) as error:  # RuntimeError: the thread takes nothing new any more
            raise GrammarsBusy(str(error)) from None
        finally:
            del self._waiting[spec]
        self.counters.compiled += 1
        self._keep(spec, compiled)
        return compiled

    def _keep(self, spec: GrammarSpec, found: Compiled | GrammarError) -> None:
        self._kept[spec] = found
        while len(self._kept) > self._max_kept:
            self._kept.popitem(last=False)


@contextlib.contextmanager
def _stack(size: int) -> Iterator[None]:
    """Threads that begin meanwhile have stacks of that size."""
    before = threading.stack_size(size)
    try:
        yield
    finally:
        threading.stack_size(before)


def _follow(matcher: Matcher, generated_ids: Sequence[int]) -> None:
    for place, token in enumerate(generated_ids):
        try:
            matcher.observe(token)
        except GrammarFailed as error:
            raise GrammarError(f"generated_token_ids[{place}] does not follow it: {error}") from None
