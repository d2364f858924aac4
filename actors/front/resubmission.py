"""One request's way over the coordinators: what it has got so far, and whether and when it goes to the next one.

Pure decisions, and bounded ones: a request is resubmitted when its coordinator is gone, a few times when a
coordinator failed at it, and not again when nothing comes of it. Who is asked, and waiting, is
`actors.front.coordinator_pool`'s work.
"""

from array import array
from collections import Counter
from enum import Enum

from protos.coordinator_pb2 import FINISH_REASON_ERROR, FINISH_REASON_LENGTH, SequenceOutput, Submit
from protos.expert_pb2 import STATUS_CANCELLED, STATUS_DRAINING, STATUS_INTERNAL, STATUS_OVERLOADED
from protos.outputs import is_last

# Times that a coordinator may be lost under a request before a next token comes: a request that kills them all is
# given up. And in all: a request that lives through more than this many losses is not what is wrong here.
MAX_LOSSES_IN_PLACE = 4
MAX_LOSSES = 32
# Times that a request is tried again after a coordinator said that it failed at it.
MAX_INTERNAL_RETRIES = 2
MIN_PAUSE_S = 0.1
MAX_PAUSE_S = 1.0
# After every coordinator has refused a request that was promised an answer.
MIN_REFUSED_PAUSE_S = 0.25
MAX_REFUSED_PAUSE_S = 2.0

_REFUSALS = (STATUS_DRAINING, STATUS_OVERLOADED)


class Verdict(Enum):
    """What an output means."""

    TELL = "tell"
    """It is the caller's."""
    REFUSED = "refused"
    """This coordinator does not take the request now; nothing is lost."""
    LOST = "lost"
    """The coordinator gives up the sequence: it goes on elsewhere."""
    FAILED = "failed"
    """The coordinator failed at the sequence: it is tried again, elsewhere if possible."""


class Resubmission:
    """What one request has got, and what may still be done for it. `submit` may itself go on from elsewhere.

    `promised` is True once a coordinator may have begun with it: from then on a refusal is waited out, because a
    client that has seen tokens must not be told to come back later. `ended` is True once the last output was told, or
    nothing is left to ask for. `avoid` is whoever was last lost to it: others are asked first. `sent_away` is True once
    a coordinator that drains has ended it unfinished: then its time is up, and refusals are the answer.
    """

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._tokens = array("I", submit.generated_token_ids)
        self._scored = not submit.HasField("prompt_logprobs")
        self._losses_here = 0
        self._losses: Counter[Verdict] = Counter()
        self._rounds_refused = 0
        self._told_end = False
        self.promised = bool(self._tokens)
        self.ended = self._is_full
        self.sent_away = False
        self.avoid: object = None

    @property
    def submit(self) -> Submit:
        """The request as the next coordinator is asked: prompt and tokens so far, no score that was told already."""
        told_score = self._scored and self._submit.HasField("prompt_logprobs")
        if len(self._tokens) == len(self._submit.generated_token_ids) and not told_score:
            return self._submit
        again = Submit()
        again.CopyFrom(self._submit)
        del again.generated_token_ids[:]
        again.generated_token_ids.extend(self._tokens)
        if self._scored:
            again.ClearField("prompt_logprobs")
        return again

    @property
    def end(self) -> SequenceOutput | None:
        """The end, where the tokens so far are all that may come: then there is nothing to ask anybody."""
        if self._told_end or not self._is_full:
            return None
        return SequenceOutput(request_id=self._submit.request_id, finish_reason=FINISH_REASON_LENGTH)

    def judge(self, output: SequenceOutput) -> Verdict:
        """What to do with an output; what is told counts as told."""
        if output.finish_reason == FINISH_REASON_ERROR:
            if output.status in _REFUSALS:
                # Only a request that had been taken in knows the length of its prompt.
                self.sent_away |= output.status == STATUS_DRAINING and output.num_prompt_tokens > 0
                return Verdict.REFUSED
            if output.status == STATUS_CANCELLED and self._may_lose():
                return Verdict.LOST
            if output.status == STATUS_INTERNAL and self._losses[Verdict.FAILED] < MAX_INTERNAL_RETRIES:
                return Verdict.FAILED
        if output.token_ids:
            self._tokens.extend(output.token_ids)
            self._losses_here = self._rounds_refused = 0
        self._told_end = is_last(output)
        self.ended = self._told_end or self._is_full
        self._scored = self._scored or bool(output.prompt_logprobs)
        self.promised = True
        return Verdict.TELL

    def lose(self, verdict: Verdict, coordinator: object) -> bool:
        """Notes that `coordinator` is lost to it; False where it must not go on."""
        self.avoid = coordinator
        if verdict is Verdict.LOST and not self._may_lose():
            return False
        self._losses[verdict] += 1
        self._losses_here += 1
        self.promised = True
        return True

    @property
    def pause_s(self) -> float:
        """How long to wait before the next try: not at all after a first loss, doubling while nothing comes."""
        if self._losses_here < 2:
            return 0.0
        return float(min(MAX_PAUSE_S, MIN_PAUSE_S * 2 ** (self._losses_here - 2)))

    def refuse(self) -> float:
        """Notes that all coordinators have refused it; returns for how many seconds to leave them alone."""
        pause_s = min(MAX_REFUSED_PAUSE_S, MIN_REFUSED_PAUSE_S * 2 ** min(8, self._rounds_refused))
        self._rounds_refused += 1
        return float(pause_s)

    @property
    def _is_full(self) -> bool:
        """The tokens so far are all that may come."""
        return 0 < self._submit.max_tokens <= len(self._tokens)

    def _may_lose(self) -> bool:
        return self._losses_here < MAX_LOSSES_IN_PLACE and self._losses[Verdict.LOST] < MAX_LOSSES
