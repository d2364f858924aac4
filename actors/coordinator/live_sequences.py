"""The sequences that an engine has promised an end: how each is sampled, its deadline's alarm, what it was told.

Where a sequence stands is the scheduler's knowledge; this file only knows who is still owed an answer.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

from actors.coordinator.engine_io import Failure, GenerationOutput, GenerationRequest
from actors.coordinator.step_sampling import Choice
from cluster.ids import SequenceId
from cluster.sequence import FinishReason, Sequence, SequenceStatus
from model.sampling.sampler import SamplerState

TIMER_SLACK_S = 0.002


@dataclass(slots=True)
class Live:
    """A sequence, how its rows are read, what it was told so far, since when it lives, and its deadline's alarm.

    `routed` are its positions' experts that were not told yet, if it wants them; `next_routed` is the position after
    them. What somebody else computed before was told there.
    """

    sequence: Sequence
    choice: Choice
    num_told: int = 0
    num_scores_told: int = 0
    since_s: float = 0.0
    alarm: asyncio.TimerHandle | None = None
    wants_experts: bool = False
    routed: list[bytes] = field(default_factory=list)
    num_routed_told: int = field(init=False)
    next_routed: int = field(init=False)

    def __post_init__(self) -> None:
        generated = len(self.sequence.output_ids)
        self.num_routed_told = self.next_routed = self.sequence.num_tokens - 1 if generated else 0

    def take_routed(self) -> tuple[bytes, ...]:
        """What comes with the next tokens, or with the end."""
        routed = tuple(self.routed)
        self.routed.clear()
        return routed

    def rewind(self) -> None:
        """Takes back what a step did that nobody heard of: the sequence is where it was when it was last told."""
        sequence, state = self.sequence, self.choice.state
        del sequence.output_ids[self.num_told :]
        if sequence.wants_prompt_logprobs:
            sequence.peak_computed = min(sequence.peak_computed, self.num_scores_told)
        self.routed.clear()
        if self.wants_experts:
            self.next_routed = self.num_routed_told
            sequence.peak_computed = min(sequence.peak_computed, self.num_routed_told)
        params = replace(state.params, seed=state.seed)
        if self.choice.grammar is not None:
            self.choice.grammar.rewind(self.num_told)
        self.choice = replace(self.choice, state=SamplerState(params, sequence.prompt_ids, tuple(sequence.output_ids)))


class LiveSequences:
    """By id. Used on one event loop."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids
        self._live: dict[SequenceId, Live] = {}
        self._next_id = 0
        self.num_wanting_experts = 0
        self._some = asyncio.Event()
        self._none = asyncio.Event()
        self._none.set()

    def __len__(self) -> int:
        return len(self._live)

    @property
    def sequences(self) -> list[Sequence]:
        """All of them, oldest first."""
        return [live.sequence for live in self._live.values()]

    @property
    def inflight_tokens(self) -> int:
        """Tokens that are known but not computed, and tokens that may still be generated."""
        return sum(s.num_uncomputed + s.max_tokens - len(s.output_ids) for s in self.sequences)

    def prepare(self, request: GenerationRequest) -> Live:
        """A sequence with an id of its own, not kept yet. Raises SequenceError."""
        sequence = Sequence(
            seq_id=SequenceId(self._next_id),
            prompt_ids=request.prompt_ids,
            max_tokens=request.max_tokens,
            min_tokens=request.min_tokens,
            eos_token_ids=self._eos,
            stop_token_ids=request.stop_token_ids,
            ignore_eos=request.ignore_eos,
            deadline_s=request.deadline_s,
            wants_prompt_logprobs=request.num_prompt_logprobs is not None,
            wants_routed_experts=request.return_routed_experts,
            prefix_root=request.prefix_root,
            generated_ids=request.generated_ids,
            tenant=request.tenant,
            priority=request.priority,
            follows_grammar=request.grammar is not None,
        )
        self._next_id += 1
        state = SamplerState(request.sampling, request.prompt_ids, request.generated_ids)
        choice = Choice(
            state, request.num_logprobs, request.num_prompt_logprobs, masks=request.masks, grammar=request.grammar
        )
        return Live(sequence, choice, wants_experts=request.return_routed_experts)

    def keep(self, live: Live, now_s: float, on_deadline: Callable[[], None]) -> None:
        """Owes the sequence an end from now on; `on_deadline` is called just after its deadline."""
        deadline_s = live.sequence.deadline_s
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - now_s) + TIMER_SLACK_S
            live.alarm = asyncio.get_running_loop().call_later(delay_s, on_deadline)
        live.num_told = len(live.sequence.output_ids)
        live.since_s = now_s
        self._live[live.sequence.seq_id] = live
        self.num_wanting_experts += live.wants_experts
        self._none.clear()
        self._some.set()

    def queue_s(self, now_s: float) -> float:
        """For how long the oldest of those that have not begun has waited; 0 where all have."""
        for live in self._live.values():  # oldest first; whoever was preempted has begun
            if live.sequence.status is SequenceStatus.WAITING and not live.sequence.num_preemptions:
                return max(now_s - live.since_s, 0.0)
        return 0.0

    def get(self, seq_id: SequenceId) -> Live | None:
        """The living sequence of that id."""
        return self._live.get(seq_id)

    def choices(self) -> dict[SequenceId, Choice]:
        """How the rows of each are read."""
        return {seq_id: live.choice for seq_id, live in self._live.items()}

    def forget(self, seq_id: SequenceId) -> None:
        """Its end has been said, or it never began."""
        live = self._live.pop(seq_id, None)
        if live is not None:
            self.num_wanting_experts -= live.wants_experts
            if live.alarm is not None:
                live.alarm.cancel()
        if not self._live:
            self._none.set()
            self._some.clear()

    def note_told(self, outputs: Iterable[GenerationOutput]) -> None:
        """These are told now; whose end is among them is forgotten."""
        for output in outputs:
            live = self._live.get(output.seq_id)
            if live is None:
                continue
            live.num_told += len(output.token_ids)
            live.num_scores_told += len(output.prompt_logprobs)
            live.num_routed_told += len(output.routed_experts)
            if output.finish_reason is not None:
                self.forget(output.seq_id)

    def rewind(self) -> None:
        """Takes back, of everybody, what was not told."""
        for live in self._live.values():
            live.rewind()

    def last_output(self, sequence: Sequence, failure: Failure | None = None) -> GenerationOutput:
        """The end of a sequence that the scheduler has let go of."""
        live = self._live.get(sequence.seq_id)
        return GenerationOutput(
            seq_id=sequence.seq_id,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached_prompt,
            routed_experts=() if live is None or failure is not None else live.take_routed(),
            finish_reason=sequence.finish_reason or FinishReason.ERROR,
            failure=failure,
        )

    async def wait_for_some(self) -> None:
        """Returns when at least one lives."""
        await self._some.wait()

    async def wait_for_none(self) -> None:
        """Returns when none lives."""
        await self._none.wait()
