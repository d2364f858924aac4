"""Which coordinator may have a prompt's beginning in its KV cache: a guess, from where prompts went before.

Each coordinator has a cache of its own, so who has computed a prefix has less to do for the next prompt with it. A
front door remembers beginnings of prompts, by the same unforgeable names as blocks have, and whom they were given to.
A wrong guess costs nothing but the advantage. Who is asked is `actors.front.coordinator_pool`'s decision.
"""

from collections import OrderedDict
from collections.abc import Sequence

from cluster.prefix_hash import BlockKey, block_key

SPAN = 128
"""Tokens by which remembered beginnings grow."""

MAX_SPANS = 32
"""Of one prompt: what it shares beyond them is not known."""

MAX_BEGINNINGS = 1 << 14
MAX_HOLDERS = 4
"""Coordinators remembered for one beginning, the latest ones."""


class PrefixAffinity:
    """Used by one front door. Bounded: the beginnings used longest ago are forgotten first."""

    def __init__(self, max_beginnings: int = MAX_BEGINNINGS) -> None:
        self._max_beginnings = max_beginnings
        self._holders: OrderedDict[BlockKey, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def beginnings(self, root: BlockKey, prompt: Sequence[int]) -> list[BlockKey]:
        """The names of a prompt's beginnings, shortest first; `root` is of those that may share it."""
        keys: list[BlockKey] = []
        for start in range(0, min(len(prompt) // SPAN, MAX_SPANS) * SPAN, SPAN):
            keys.append(block_key(keys[-1] if keys else root, prompt[start : start + SPAN]))
        return keys

    def known_tokens(self, keys: Sequence[BlockKey], address: str) -> int:
        """How many tokens of a prompt that coordinator has probably computed."""
        count = 0
        while count < len(keys) and address in self._holders.get(keys[count], ()):
            count += 1
        return count * SPAN

    def note(self, keys: Sequence[BlockKey], address: str) -> None:
        """A prompt with these beginnings was given to that coordinator."""
        for key in keys:
            others = [one for one in self._holders.pop(key, ()) if one != address]
            self._holders[key] = (address, *others[: MAX_HOLDERS - 1])
        while len(self._holders) > self._max_beginnings:
            self._holders.popitem(last=False)
