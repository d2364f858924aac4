"""What each key may use: requests and tokens a minute, and requests at one time. One ingress's; others count apart.

A request takes what it asks for (its prompt, and the tokens that it names as most) before it is computed, and at its
end gives back what it did not use. Who a key belongs to is `actors.front.api_keys`' knowledge, whose turn it is in the
queue the coordinators'.
"""

import math
import time
from collections.abc import Callable

from actors.front.api_keys import KeyEntry
from actors.front.openai_errors import ApiError
from cluster.token_bucket import TokenBucket

BUSY_RETRY_S = 1.0
LIMIT_HEADERS = tuple(
    f"x-ratelimit-{name}-{what}" for what in ("requests", "tokens") for name in ("limit", "remaining", "reset")
)


class Account:
    """One key's."""

    def __init__(self, entry: KeyEntry, now_s: float) -> None:
        self.entry = entry
        self.running = 0
        self._requests = _bucket(None, entry.requests_per_minute, now_s)
        self._tokens = _bucket(None, entry.tokens_per_minute, now_s)

    def change(self, entry: KeyEntry, now_s: float) -> None:
        """The entry was written anew; what is used stays used."""
        self.entry = entry
        self._requests = _bucket(self._requests, entry.requests_per_minute, now_s)
        self._tokens = _bucket(self._tokens, entry.tokens_per_minute, now_s)

    def begin(self, now_s: float) -> None:
        """A request begins; it must `end`. Raises ApiError 429, then nothing is taken."""
        most = self.entry.concurrency
        if most is not None and self.running >= most:
            raise limited(f"at one time: Limit {most}, Running {self.running}, Requested 1", BUSY_RETRY_S)
        if self._tokens is not None and self._tokens.level(now_s) < 1:
            self._refuse("tokens per min (TPM)", self._tokens, 1, now_s)
        if self._requests is not None and not self._requests.take(1, now_s):
            self._refuse("requests per min (RPM)", self._requests, 1, now_s)
        self.running += 1

    def end(self) -> None:
        """A request that began is over."""
        self.running -= 1

    def reserve(self, num_tokens: int, now_s: float) -> None:
        """Takes so many tokens. Raises ApiError 429."""
        if self._tokens is not None and not self._tokens.take(num_tokens, now_s):
            self._refuse("tokens per min (TPM)", self._tokens, num_tokens, now_s)

    def settle(self, reserved: int, used: int, now_s: float) -> None:
        """So many of the tokens that were taken were used, or more than were taken."""
        if self._tokens is not None:
            self._tokens.put(reserved - used, now_s)

    def headers(self, now_s: float) -> list[tuple[bytes, bytes]]:
        """As OpenAI tells what is left: `x-ratelimit-*`, of the limits that there are."""
        told = []
        for what, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket is not None:
                values = (
                    ("limit", str(bucket.per_minute)),
                    ("remaining", str(max(0, math.floor(bucket.level(now_s))))),
                    ("reset", duration(bucket.full_s(now_s))),
                )
                told += [(f"x-ratelimit-{name}-{what}".encode(), value.encode()) for name, value in values]
        return told

    def _refuse(self, what: str, bucket: TokenBucket, asked: int, now_s: float) -> None:
        left = max(0, math.floor(bucket.level(now_s)))
        limit = f"on {what}: Limit {bucket.per_minute}, Used {bucket.per_minute - left}, Requested {asked}"
        wait_s = bucket.wait_s(asked, now_s)
        if math.isinf(wait_s):
            raise limited(f"{limit}. The request alone is more than that", None)
        raise limited(limit, wait_s)


class Accounts:
    """By key. What was used stays used when the keys' file is read anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._accounts: dict[str, Account] = {}

    def of(self, entry: KeyEntry) -> Account:
        """The key's account; its limits are those of `entry`."""
        account = self._accounts.get(entry.sha256)
        if account is None:
            account = self._accounts[entry.sha256] = Account(entry, self.now())
        elif account.entry is not entry:
            account.change(entry, self.now())
        return account

    def keep(self, entries: tuple[KeyEntry, ...]) -> None:
        """Forgets the accounts of keys that are no more and have nothing running."""
        known = {entry.sha256 for entry in entries}
        gone = [one for one, account in self._accounts.items() if one not in known and not account.running]
        for one in gone:
            del self._accounts[one]


def limited(limit: str, retry_after_s: float | None) -> ApiError:
    """429 for a key that has used what it may, in OpenAI's words."""
    again = "" if retry_after_s is None else f" Please try again in {duration(retry_after_s)}."
    return ApiError(
        429,
        f"Rate limit reached for requests {limit}.{again}",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after_s=retry_after_s,
    )


def duration(seconds: float) -> str:
    """As OpenAI writes it: `20ms`, `1.5s`, `2m3s`, rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    if seconds < 60:
        return f"{math.ceil(seconds * 10) / 10:g}s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s"


def _bucket(before: TokenBucket | None, per_minute: int | None, now_s: float) -> TokenBucket | None:
    if per_minute is None:
        return None
    if before is None:
        return TokenBucket(per_minute, now_s)
    used = before.per_minute - before.level(now_s)
    before.per_minute = per_minute
    before.put(per_minute - used - before.level(now_s), now_s)
    return before
