"""Which tokens a sequence that follows a grammar may say next: the grammar's word against all else that is forbidden.

The grammar itself is `model.grammar.compiled`'s knowledge, and what else is forbidden `cluster.sequence`'s.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cluster.sequence import Sequence as TokenSequence
from model.grammar.compiled import GrammarFailed, Matcher


@dataclass(slots=True)
class MaskCounters:
    """Totals since start: masks found, and the seconds that took."""

    masks: int = 0
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Followed:
    """The grammar of one sequence, and what following it costs."""

    matcher: Matcher
    counters: MaskCounters = field(default_factory=MaskCounters)
    clock: Callable[[], float] = time.perf_counter

    def observe(self, token: int) -> None:
        """Account for a token that was put out. A grammar that fails at it says so when the next one is due."""
        try:
            self.matcher.observe(token)
        except GrammarFailed:
            return

    def rewind(self, num_output: int) -> None:
        """Back to where that many tokens had been put out; where that fails, it says so when the next one is due."""
        try:
            self.matcher.rewind(min(num_output, self.matcher.num_tokens))
        except GrammarFailed:
            return

    def allowed_ids(self, ahead: Sequence[int], sequence: TokenSequence, forbidden: Collection[int]) -> Tensor:
        """Ids, ascending, after the output and the tokens `ahead`; never empty. Raises GrammarFailed."""
        began_s = self.clock()
        ids = _allowed(self.matcher, ahead, sequence, forbidden)
        self.counters.masks += 1
        self.counters.seconds += self.clock() - began_s
        return torch.from_numpy(ids)


def _allowed(
    matcher: Matcher, ahead: Sequence[int], sequence: TokenSequence, forbidden: Collection[int]
) -> NDArray[np.int64]:
    """The output may end where its grammar may: with an end-of-sequence token, or a stop token that is no text. Where
    nothing but an end is left it must end, even if the end is forbidden: an answer cannot go on without its grammar.
    """
    following, vocabulary = matcher.next(ahead), matcher.vocabulary
    ids = following.ids
    if following.may_end:
        ids = _with(ids, {*vocabulary.eos_ids, *(sequence.stop_token_ids & vocabulary.special_ids)})
    if forbidden:
        ids = ids[np.isin(ids, list(forbidden), invert=True)]
    if not ids.size and following.may_end:
        ids = np.array(vocabulary.eos_ids, np.int64)
    if not ids.size:
        raise GrammarFailed("no token of this model's vocabulary can go on with the text, or it is forbidden")
    return ids


def _with(ids: NDArray[np.int64], more: Collection[int]) -> NDArray[np.int64]:
    """Both, ascending, each once; `ids` may be nearly the whole vocabulary, and is not sorted again."""
    added = np.array(sorted(more), np.int64)
    if ids.size:
        added = added[ids[np.searchsorted(ids, added).clip(max=ids.size - 1)] != added]
    return np.insert(ids, np.searchsorted(ids, added), added)
