"""What a key may use: three limits, refusals in OpenAI's words, what was not used given back, changes that hold."""

import pytest

from actors.front.accounts import Account, Accounts, duration
from actors.front.api_keys import KeyEntry, digest
from actors.front.caller import NOBODY, KeyHolder
from actors.front.openai_errors import ApiError


def entry(**limits: int) -> KeyEntry:
    return KeyEntry(name="a", sha256=digest("a"), **limits)  # type: ignore[arg-type]


def refusal(account: Account, tokens: int | None = None, now_s: float = 0.0) -> ApiError:
    with pytest.raises(ApiError) as refused:
        account.begin(now_s) if tokens is None else account.reserve(tokens, now_s)
    assert (refused.value.status, refused.value.code) == (429, "rate_limit_exceeded")
    return refused.value


def told(account: Account, now_s: float = 0.0) -> dict[str, str]:
    return {name.decode().removeprefix("x-ratelimit-"): value.decode() for name, value in account.headers(now_s)}


def test_requests_a_minute() -> None:
    account = Account(entry(requests_per_minute=2), 0.0)
    for _ in range(2):
        account.begin(0.0)
        account.end()
    refused = refusal(account)
    assert refused.message == (
        "Rate limit reached for requests on requests per min (RPM): Limit 2, Used 2, Requested 1. "
        "Please try again in 30s."
    )
    assert refused.retry_after_s == 30
    assert told(account) == {"limit-requests": "2", "remaining-requests": "0", "reset-requests": "1m0s"}
    account.begin(30.0)


def test_at_one_time() -> None:
    account = Account(entry(concurrency=2), 0.0)
    account.begin(0.0)
    account.begin(0.0)
    assert "at one time: Limit 2, Running 2, Requested 1" in refusal(account).message
    account.end()
    account.begin(0.0)
    assert told(account) == {}, "OpenAI has no header for it"


def test_tokens_a_minute_are_taken_before_and_settled_after() -> None:
    accounts = Accounts(lambda: 0.0)
    account = accounts.of(entry(tokens_per_minute=600))
    account.begin(0.0)
    holder = KeyHolder(account, accounts)
    holder.reserve(500)
    assert told(account)["remaining-tokens"] == "100"
    refused = refusal(account, 200)
    assert "tokens per min (TPM): Limit 600, Used 500, Requested 200. Please try again in 10s." in refused.message
    holder.use(90)
    holder.use(10)
    holder.end()
    assert (told(account)["remaining-tokens"], account.running) == ("500", 0)
    account.begin(0.0)
    holder = KeyHolder(account, accounts)
    holder.reserve(100)
    holder.use(700)
    holder.end()
    assert told(account)["remaining-tokens"] == "0"
    assert "Requested 1. Please try again in 20.1s." in refusal(account).message, "a debt is paid before the next"


def test_a_request_that_alone_is_too_large_is_told_so_and_not_to_come_back() -> None:
    refused = refusal(Account(entry(tokens_per_minute=600), 0.0), 601)
    assert "The request alone is more than that" in refused.message
    assert refused.retry_after_s is None


def test_a_refused_request_takes_nothing() -> None:
    account = Account(entry(requests_per_minute=5, concurrency=1, tokens_per_minute=10), 0.0)
    account.begin(0.0)
    for _ in range(10):
        refusal(account)
    account.end()
    account.reserve(10, 0.0)
    for _ in range(10):
        refusal(account)
    assert told(account)["remaining-requests"] == "4"


def test_new_limits_take_hold_and_what_is_used_stays_used() -> None:
    accounts = Accounts(lambda: 0.0)
    account = accounts.of(entry(requests_per_minute=10))
    for _ in range(8):
        account.begin(0.0)
    assert accounts.of(entry(requests_per_minute=20)) is account
    assert told(account)["remaining-requests"] == "12"
    accounts.of(entry(requests_per_minute=4, tokens_per_minute=7))
    assert (told(account)["remaining-requests"], told(account)["remaining-tokens"]) == ("0", "7")
    accounts.of(entry())
    assert told(account) == {}
    account.begin(0.0)


def test_accounts_of_keys_that_are_gone_go_once_nothing_runs() -> None:
    accounts = Accounts(lambda: 0.0)
    account = accounts.of(entry(concurrency=1))
    account.begin(0.0)
    accounts.keep(())
    assert accounts.of(entry(concurrency=1)) is account
    account.end()
    accounts.keep(())
    assert accounts.of(entry(concurrency=1)) is not account


def test_without_keys_nobody_is_limited() -> None:
    NOBODY.reserve(10**12)
    NOBODY.use(10**12)
    NOBODY.end()
    assert NOBODY.tenant == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0201, "21ms"), (1, "1s"), (1.51, "1.6s"), (59.95, "60s"), (60, "1m0s"), (123.4, "2m4s")],
)
def test_durations_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text
