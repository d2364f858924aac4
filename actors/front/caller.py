"""Who asks: the tenant whose turn it is, and the account that pays for the request's tokens."""

from actors.front.accounts import Account, Accounts


class Caller:
    """Of one request. `tenant` is a short name, never a key; empty where the server has no keys."""

    def __init__(self, tenant: str = "") -> None:
        self.tenant = tenant

    @property
    def is_counted(self) -> bool:
        """True where every request counts towards a limit, refused or not."""
        return False

    def reserve(self, num_tokens: int) -> None:
        """The request may use so many tokens. Raises ApiError 429 where the key may not."""

    def use(self, num_tokens: int) -> None:
        """It has used so many."""

    def end(self) -> None:
        """The request is over, however it ended."""


NOBODY = Caller()
"""Where there are no keys: no limits, and one tenant for all."""


class KeyHolder(Caller):
    """One that showed a key. It has begun; call `end` exactly once."""

    def __init__(self, account: Account, accounts: Accounts) -> None:
        super().__init__(account.entry.whose)
        self._account = account
        self._accounts = accounts
        self._reserved = 0
        self._used = 0

    @property
    def is_counted(self) -> bool:
        """See Caller."""
        entry = self._account.entry
        return entry.requests_per_minute is not None or entry.tokens_per_minute is not None

    def reserve(self, num_tokens: int) -> None:
        """See Caller."""
        self._account.reserve(num_tokens, self._accounts.now())
        self._reserved += num_tokens

    def use(self, num_tokens: int) -> None:
        """See Caller."""
        self._used += num_tokens

    def end(self) -> None:
        """See Caller."""
        self._account.end()
        self._account.settle(self._reserved, self._used, self._accounts.now())
