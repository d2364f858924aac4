"""One sequence on its way through a coordinator: its tokens, its limits and where it stands.

The scheduler owns the changing fields. How a token is sampled, and what text it is, is not known here.
"""

from collections.abc import Sequence as Items
from dataclasses import InitVar, dataclass, field
from enum import Enum

from cluster.ids import SequenceId
from cluster.prefix_hash import COMMON_ROOT, BlockKey, block_key
from cluster.prompt_lookup import PromptLookup

_NONE: frozenset[int] = frozenset()


class SequenceError(ValueError):
    """A sequence whose limits make no sense. Names the field."""


class FinishReason(Enum):
    """Why a sequence got its last token."""

    STOP = "stop"
    """An end-of-sequence or stop token, which is the last output token."""
    LENGTH = "length"
    """`max_tokens`, or the longest sequence that the model or the KV cache can hold."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    """The deadline passed."""
    ERROR = "error"


class SequenceStatus(Enum):
    """Where a sequence is: queued (new or preempted), holding KV blocks, or done."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A prompt, its output so far, and the limits that end it. Compared by identity.

    `deadline_s` is on the scheduler's clock. `max_tokens` 0 scores the prompt and generates nothing; it is
    allowed only with `wants_prompt_logprobs`. `eos_token_ids` and `stop_token_ids` both end the sequence,
    `ignore_eos` disarms the former. `generated_ids` is the output that it begins with, when it goes on from
    elsewhere. `prefix_root` names those with whom it may share KV blocks (`cluster.prefix_hash.root_key`). `tenant` is
    whose fair share it is served from; among its tenant's a lower `priority` starts first. With `follows_grammar`,
    end-of-sequence tokens are sampled only where the output may or must end: they always end it. The fields after it
    belong to the scheduler:

    - `output_ids`: tokens generated. A preempted sequence keeps them.
    - `num_computed`: tokens, of prompt and output together, whose keys and values are in the KV cache.
    - `peak_computed`: the most that `num_computed` has ever been; below it everything is a recomputation.
    - `block_table`: KV blocks held, in order of position.
    - `num_published`: of these, from the first, those that others may share; nobody writes them any more.
    - `era`: that of the allocator when it got its first block.
    - `num_cached`: positions that were in the KV cache when it first ran.
    - `arrival`: order of arrival in this scheduler; of one tenant and priority, lower goes first.
    - `turn`: order in which it was first given KV blocks, -1 before; preempted ones come back in this order.
    - `admitted_s`: when it was first given KV blocks, on the scheduler's clock.
    - `lookup`: what its next tokens are guessed from, once it has been guessed for.
    """

    seq_id: SequenceId
    prompt_ids: Items[int]
    max_tokens: int
    min_tokens: int = 0
    eos_token_ids: frozenset[int] = _NONE
    stop_token_ids: frozenset[int] = _NONE
    ignore_eos: bool = False
    deadline_s: float | None = None
    wants_prompt_logprobs: bool = False
    wants_routed_experts: bool = False
    prefix_root: BlockKey = COMMON_ROOT
    generated_ids: InitVar[Items[int]] = ()
    tenant: str = ""
    priority: int = 0
    follows_grammar: bool = False

    output_ids: list[int] = field(default_factory=list, init=False)
    num_computed: int = field(default=0, init=False)
    peak_computed: int = field(default=0, init=False)
    block_table: list[int] = field(default_factory=list, init=False)
    num_published: int = field(default=0, init=False)
    era: int = field(default=0, init=False)
    num_cached: int = field(default=0, init=False)
    arrival: int = field(default=-1, init=False)
    turn: int = field(default=-1, init=False)
    admitted_s: float = field(default=0.0, init=False)
    status: SequenceStatus = field(default=SequenceStatus.WAITING, init=False)
    finish_reason: FinishReason | None = field(default=None, init=False)
    num_preemptions: int = field(default=0, init=False)
    lookup: PromptLookup | None = field(default=None, init=False)
    _keys: list[BlockKey] = field(default_factory=list, init=False, repr=False)
    _told_elsewhere: int = field(default=0, init=False, repr=False)

    def __post_init__(self, generated_ids: Items[int]) -> None:
        if not self.prompt_ids:
            raise SequenceError("prompt_ids is empty, but must have at least 1 token")
        if self.max_tokens < 0:
            raise SequenceError(f"max_tokens is {self.max_tokens}, but must be at least 0")
        if self.max_tokens == 0 and not self.wants_prompt_logprobs:
            raise SequenceError("max_tokens is 0, but must be at least 1 unless prompt_logprobs are wanted")
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise SequenceError(
                f"min_tokens is {self.min_tokens}, but must be from 0 to max_tokens ({self.max_tokens})"
            )
        if generated_ids and len(generated_ids) >= self.max_tokens:
            raise SequenceError(
                f"generated_ids has {len(generated_ids)} tokens, "
                f"but must have fewer than max_tokens ({self.max_tokens})"
            )
        for place, token in enumerate(generated_ids):
            if place >= self.min_tokens and token in self.stop_ids:
                raise SequenceError(f"generated_ids[{place}] is {token}, which ends the sequence: nothing can follow")
        self.output_ids.extend(generated_ids)
        self._told_elsewhere = self.num_tokens - 1 if generated_ids else 0

    @property
    def num_prompt(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed(self) -> int:
        """Known tokens that are not in the KV cache yet; 1 while decoding."""
        return self.num_tokens - self.num_computed

    @property
    def num_reusable(self) -> int:
        """Positions, from the first, that need not be computed here if the KV cache has them.

        The last token is computed in any case, for its logits; so is what has yet to be scored, and what has experts
        yet to be told (positions before the last of `generated_ids` were told elsewhere).
        """
        most = self.num_tokens - 1
        if self.wants_prompt_logprobs and self.peak_computed < self.num_prompt - 1:
            most = min(most, self.peak_computed)
        if self.wants_routed_experts:
            most = min(most, max(self.peak_computed, self._told_elsewhere))
        return most

    @property
    def num_cached_prompt(self) -> int:
        """`num_cached` of the prompt alone."""
        return min(self.num_cached, self.num_prompt)

    @property
    def is_finished(self) -> bool:
        """True from the moment it is decided, even while a running step still computes the sequence."""
        return self.status is SequenceStatus.FINISHED

    @property
    def stop_ids(self) -> frozenset[int]:
        """Every token that ends the sequence."""
        ignored = self.ignore_eos and not self.follows_grammar
        return self.stop_token_ids if ignored else self.stop_token_ids | self.eos_token_ids

    def forbidden_ids(self, ahead: int = 0) -> frozenset[int]:
        """Tokens that must not be sampled next, or after `ahead` more: below `min_tokens`, those that end it.

        Where the output follows a grammar they may have to be sampled all the same: see `ends`.
        """
        if len(self.output_ids) + ahead < self.min_tokens:
            return self.stop_ids
        return self.eos_token_ids if self.follows_grammar and self.ignore_eos else _NONE

    def ends(self, token: int) -> bool:
        """True where the output ends with its last token, which is `token`."""
        if self.follows_grammar and token in self.eos_token_ids:
            return True
        return token in self.stop_ids and len(self.output_ids) > self.min_tokens

    def tokens_left(self, max_model_len: int) -> int:
        """The most tokens that may still be sampled."""
        return min(self.max_tokens - len(self.output_ids), max_model_len - self.num_tokens)

    def final_computed(self, max_model_len: int) -> int:
        """The most positions this can ever hold in the KV cache; its last token is never computed."""
        return max(self.num_prompt, min(self.num_prompt + self.max_tokens, max_model_len) - 1)

    def advance(self, num_computed: int) -> None:
        """Note that the KV cache now holds `num_computed` positions."""
        assert self.num_computed < num_computed <= self.num_tokens, (self.num_computed, num_computed)
        self.num_computed = num_computed
        self.peak_computed = max(self.peak_computed, num_computed)

    def start_over(self) -> None:
        """Keep nothing but the tokens: wait, with all of them to be computed again."""
        self.block_table.clear()
        self.num_published = self.num_computed = 0
        self._keys.clear()
        self.lookup = None
        self.turn = -1
        self.num_preemptions += 1
        self.status = SequenceStatus.WAITING
        self.finish_reason = None

    def receive(self, token: int | None, max_model_len: int) -> FinishReason | None:
        """Append a sampled token, if any, and say whether that ends the sequence."""
        if token is not None:
            self.output_ids.append(token)
            if self.ends(token):
                return FinishReason.STOP
        return FinishReason.LENGTH if self.tokens_left(max_model_len) <= 0 else None

    def token_ids(self, start: int, stop: int) -> tuple[int, ...]:
        """Known tokens at positions start..stop, prompt and output as one."""
        assert 0 <= start <= stop <= self.num_tokens, (start, stop, self.num_tokens)
        prompt = self.num_prompt
        if start >= prompt:
            return tuple(self.output_ids[start - prompt : stop - prompt])
        return (*self.prompt_ids[start:stop], *self.output_ids[: max(0, stop - prompt)])

    def block_key(self, index: int, block_size: int) -> BlockKey:
        """The name of its block number `index`, all of whose tokens must be known."""
        keys = self._keys
        while len(keys) <= index:
            start = len(keys) * block_size
            parent = keys[-1] if keys else self.prefix_root
            keys.append(block_key(parent, self.token_ids(start, start + block_size)))
        return keys[index]
