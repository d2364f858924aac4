"""Remembers that the coordinators are full, so that what they would refuse is refused before work is spent on it.

Only they know when there is room again, and a busy one takes a moment to say no. So after a refusal nobody else is sent
to find out: `actors.front.room_watch` asks them beside the requests, as long as there are any, and as many as they have
room for are let through. Each tenant apart: a full queue has room for who has little in it.
"""

import itertools
import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from actors.front.openai_errors import overloaded

HOLD_S = 0.5
"""How long a word of the coordinators counts; what leaves their queues in that time is less than they hold."""
ANSWER_S = 1.0
"""Who has been asked and is silent for so long has given no word."""
MAX_TENANTS = 1024
"""Whose last refusal is remembered."""
MAX_ASKED = 64
"""Tenants that are asked for at one time."""
MAX_TOKENS = 1 << 31


@dataclass(frozen=True, slots=True)
class Wanted:
    """Room for requests of `tenant`, each with so many tokens of prompt."""

    tenant: str
    num_tokens: int


@dataclass(slots=True)
class _Refusal:
    """Times by the clock. `room` are requests that may still come through, `num_through` came since the coordinators
    were asked, `num_before` since they were asked before that; at `wanted_s` one came in vain.
    """

    num_tokens: int
    until_s: float = 0.0
    retry_at_s: float = 0.0
    room: int = 0
    num_through: int = 0
    num_before: int = 0
    is_wanted: bool = False
    wanted_s: float = -math.inf


class Overload:
    """One front door's. `clock` is in seconds and does not run backwards.

    Behind a proxy that refuses in its place it does not see everybody who comes: after a request that came in vain
    others are expected for `linger_s`.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, *, linger_s: float = 0.0) -> None:
        self._clock = clock
        self._linger_s = linger_s
        self._refusals: OrderedDict[str, _Refusal] = OrderedDict()

    def note_refused(self, retry_after_s: float, tenant: str = "", num_tokens: int = 1) -> None:
        """All coordinators have refused a request with so long a prompt, and say when to come back."""
        now_s = self._clock()
        refusal = self._refusals.setdefault(tenant, _Refusal(num_tokens))
        self._refusals.move_to_end(tenant)
        refusal.num_tokens = min(num_tokens, MAX_TOKENS)
        refusal.until_s = max(refusal.until_s, now_s + HOLD_S)
        refusal.retry_at_s = now_s + retry_after_s
        refusal.room = 0
        while len(self._refusals) > MAX_TENANTS:
            self._refusals.popitem(last=False)

    def check(self, tenant: str = "") -> None:
        """Raises ApiError 429 where the coordinators were full a moment ago and have not told of room since."""
        refusal = self._refusals.get(tenant)
        if refusal is None:
            return
        now_s = self._clock()
        if now_s >= refusal.until_s:
            del self._refusals[tenant]
        elif refusal.room > 0:
            refusal.room -= 1
            refusal.num_through += 1
        else:
            refusal.is_wanted, refusal.wanted_s = True, now_s
            raise overloaded(max(0.0, refusal.retry_at_s - now_s))

    def room(self, tenant: str = "") -> int | None:
        """How many `check` would let through now; None where it refuses nobody. Nothing is counted."""
        refusal = self._refusals.get(tenant)
        return None if refusal is None or self._clock() >= refusal.until_s else refusal.room

    def ask(self) -> list[Wanted]:
        """For whom the coordinators are to be asked now: tenants that were refused since the last time, or lately.

        Until they answer, but not for longer than `ANSWER_S`, what they said before counts.
        """
        now_s = self._clock()
        since_s = now_s - self._linger_s
        wanted = ((name, one) for name, one in self._refusals.items() if one.is_wanted or one.wanted_s > since_s)
        asked = list(itertools.islice(wanted, MAX_ASKED))
        for tenant, one in asked:
            one.is_wanted = False
            one.num_before, one.num_through = one.num_through, 0
            one.until_s = now_s + ANSWER_S
            self._refusals.move_to_end(tenant)
        return [Wanted(tenant, one.num_tokens) for tenant, one in asked]

    def note_room(self, tenant: str, num_requests: int, retry_after_s: float) -> None:
        """The coordinators have room for so many requests; where that is none, they say when to come back.

        Who was let through since they were asked, or shortly before, has perhaps not been counted, and takes a place
        of these: a request that is sent in vain is refused later than any other.
        """
        refusal = self._refusals.get(tenant)
        if refusal is None:
            return
        now_s = self._clock()
        refusal.room = max(0, num_requests - refusal.num_through - refusal.num_before)
        refusal.until_s = now_s + HOLD_S
        if num_requests == 0:
            refusal.retry_at_s = now_s + retry_after_s
