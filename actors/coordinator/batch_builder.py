"""Turns the scheduler's plan of a step into tensors, and remembers which rows of the logits are whose.

Decides nothing: who takes part and with which tokens is in the `ScheduledBatch`; what the rows are used for
is `actors.coordinator.step_sampling`'s.
"""

from dataclasses import dataclass

from cluster.scheduler import ScheduledBatch, ScheduledSequence
from model.batch import ForwardBatch


@dataclass(frozen=True, slots=True)
class RowsOf:
    """One share's rows in logits_RV: `prompt` scores prompt tokens, `sample` chooses the next token.

    With guesses `sample` has a row for each and one more: row i chooses the token after i guesses came true.
    """

    item: ScheduledSequence
    prompt: slice
    sample: slice

    @property
    def all(self) -> slice:
        """Every row of the share; they are adjacent."""
        return slice(self.prompt.start, self.sample.stop)

    @property
    def prompt_targets(self) -> tuple[int, ...]:
        """The prompt tokens that the `prompt` rows score, one each."""
        rows, prompt_ids = self.item.prompt_rows, self.item.sequence.prompt_ids
        return tuple(prompt_ids[self.item.start + row + 1] for row in rows)


@dataclass(frozen=True, slots=True)
class StepInput:
    """What the backbone is given, and whose logits come back. A share that needs none is not in `rows`."""

    forward: ForwardBatch
    rows: tuple[RowsOf, ...]


def build_step(batch: ScheduledBatch) -> StepInput:
    """All shares of a step side by side, flat, in the plan's order.

    Example: a prefill chunk of 4 tokens that ends its prompt and a decode with 2 guesses give T = 7 tokens,
    logits rows [3, 4, 5, 6].
    """
    logits_rows: list[int] = []
    rows: list[RowsOf] = []
    first = 0
    for item in batch.items:
        scored = item.prompt_rows
        prompt = slice(len(logits_rows), len(logits_rows) + len(scored))
        logits_rows += [first + row for row in scored]
        num_sampled = item.num_draft + 1 if item.needs_token else 0
        sample = slice(len(logits_rows), len(logits_rows) + num_sampled)
        logits_rows += range(first + item.num_tokens - num_sampled, first + item.num_tokens)
        if scored or num_sampled:
            rows.append(RowsOf(item, prompt, sample))
        first += item.num_tokens
    forward = ForwardBatch.build(
        [item.token_ids for item in batch.items],
        [item.start for item in batch.items],
        [item.block_table for item in batch.items],
        logits_rows,
    )
    return StepInput(forward, tuple(rows))
