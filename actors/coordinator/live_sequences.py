"""The sequences that an engine has promised an end: how each is sampled, its deadline's alarm, its last output.

Where a sequence stands is the scheduler's knowledge; this file only knows who is still owed an answer.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from actors.coordinator.engine_io import Failure, GenerationOutput, GenerationRequest
from actors.coordinator.step_sampling import Choice
from cluster.ids import SequenceId
from cluster.sequence import FinishReason, Sequence
from model.sampling.sampler import SamplerState

TIMER_SLACK_S = 0.002


@dataclass(slots=True)
class Live:
    """A sequence, how its rows are read, and the alarm of its deadline."""

    sequence: Sequence
    choice: Choice
    alarm: asyncio.TimerHandle | None = None


class LiveSequences:
    """By id. Used on one event loop."""

    def __init__(self, eos_token_ids: frozenset[int]) -> None:
        self._eos = eos_token_ids
        self._live: dict[SequenceId, Live] = {}
        self._next_id = 0
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
        )
        self._next_id += 1
        state = SamplerState(request.sampling, request.prompt_ids)
        return Live(sequence, Choice(state, request.num_logprobs, request.num_prompt_logprobs))

    def keep(self, live: Live, now_s: float, on_deadline: Callable[[], None]) -> None:
        """Owes the sequence an end from now on; `on_deadline` is called just after its deadline."""
        deadline_s = live.sequence.deadline_s
        if deadline_s is not None:
            delay_s = max(0.0, deadline_s - now_s) + TIMER_SLACK_S
            live.alarm = asyncio.get_running_loop().call_later(delay_s, on_deadline)
        self._live[live.sequence.seq_id] = live
        self._none.clear()
        self._some.set()

    def get(self, seq_id: SequenceId) -> Live | None:
        """The living sequence of that id."""
        return self._live.get(seq_id)

    def choices(self) -> dict[SequenceId, Choice]:
        """How the rows of each are read."""
        return {seq_id: live.choice for seq_id, live in self._live.items()}

    def forget(self, seq_id: SequenceId) -> None:
        """Its end has been said."""
        live = self._live.pop(seq_id)
        if live.alarm is not None:
            live.alarm.cancel()
        if not self._live:
            self._none.set()
            self._some.clear()

    def last_output(self, sequence: Sequence, failure: Failure | None = None) -> GenerationOutput:
        """Forgets a sequence that the scheduler has let go of, and says its end."""
        self.forget(sequence.seq_id)
        return GenerationOutput(
            seq_id=sequence.seq_id,
            num_prompt_tokens=sequence.num_prompt,
            finish_reason=sequence.finish_reason or FinishReason.ERROR,
            failure=failure,
        )

    async def wait_for_some(self) -> None:
        """Returns when at least one lives."""
        await self._some.wait()

    async def wait_for_none(self) -> None:
        """Returns when none lives."""
        await self._none.wait()
