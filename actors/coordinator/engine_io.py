"""What is asked of the engine and what a step answers, as plain values; and how the wire says the answer.

Token ids only: text is the ingress's business. Checking what came over the wire is `actors.coordinator.submit_check`'s.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.ids import SequenceId
from cluster.prefix_hash import COMMON_ROOT, BlockKey
from cluster.sequence import FinishReason
from model.sampling.params import SamplingParams
from model.sampling.reported import PositionLogprobs, TokenLogprob
from protos import coordinator_pb2 as pb
from protos.expert_pb2 import (
    STATUS_CANCELLED,
    STATUS_DEADLINE_EXCEEDED,
    STATUS_INTERNAL,
    STATUS_OK,
    STATUS_OVERLOADED,
    Status,
)

if TYPE_CHECKING:  # what computes needs torch; a front that only checks what it sends does not
    from actors.coordinator.grammar_mask import Followed
    from model.sampling.masks import TokenMask

_FINISH: Mapping[FinishReason | None, pb.FinishReason] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: pb.FINISH_REASON_CANCELLED,
    FinishReason.EXPIRED: pb.FINISH_REASON_ERROR,
    FinishReason.ERROR: pb.FINISH_REASON_ERROR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One checked request. `deadline_s` is on the engine's clock; `num_*logprobs` None is off, 0 the chosen alone.

    `max_tokens` 0 scores the prompt and generates nothing; it needs `num_prompt_logprobs`. `generated_ids` were
    put out before, elsewhere: they count as output, and only what follows them is told. `prefix_root` names those with
    whom it may share KV blocks. `masks` are this request's own; `grammar` has followed `generated_ids`.
    `traceparent` is W3C's header, empty where the request is not traced.
    """

    prompt_ids: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    generated_ids: tuple[int, ...] = ()
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    deadline_s: float | None = None
    return_routed_experts: bool = False
    prefix_root: BlockKey = COMMON_ROOT
    masks: "tuple[TokenMask, ...]" = ()
    tenant: str = ""
    priority: int = 0
    grammar: "Followed | None" = None
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence cannot go on: the wire's status and one line of text."""

    status: Status
    text: str


EXPIRED = Failure(STATUS_DEADLINE_EXCEEDED, "the request's deadline passed before it was done")
STOPPED = Failure(STATUS_CANCELLED, "the coordinator was stopped")
DISPLACED = Failure(STATUS_OVERLOADED, "the waiting queue is full, and others have fewer requests in it")
UNEXPLAINED = Failure(STATUS_INTERNAL, "internal error; the coordinator's log says more")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOutput:
    """What one step gave one sequence. `logprobs` is parallel to `token_ids`, or empty.

    `num_cached_tokens` are those of the prompt that were in the KV cache when the sequence began to run.
    `prompt_logprobs` are the next positions of the prompt, in order, from position 1; they precede all
    tokens. `routed_experts` are those of the next positions, as the wire has them. `failure` is set exactly with the
    finish reasons ERROR and EXPIRED.
    """

    seq_id: SequenceId
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[PositionLogprobs, ...] = ()
    prompt_logprobs: tuple[PositionLogprobs, ...] = ()
    routed_experts: tuple[bytes, ...] = ()
    finish_reason: FinishReason | None = None
    failure: Failure | None = None


def to_wire(output: GenerationOutput, request_id: int) -> pb.SequenceOutput:
    """The message for `output`, under the name that its stream gave the request."""
    failure = output.failure
    return pb.SequenceOutput(
        request_id=request_id,
        token_ids=output.token_ids,
        logprobs=_positions(output.logprobs),
        prompt_logprobs=_positions(output.prompt_logprobs),
        finish_reason=_FINISH[output.finish_reason],
        status=STATUS_OK if failure is None else failure.status,
        error="" if failure is None else failure.text,
        num_prompt_tokens=output.num_prompt_tokens,
        num_cached_tokens=output.num_cached_tokens,
        routed_experts=output.routed_experts,
    )


def refusal(
    request_id: int, status: Status, text: str, retry_after_s: float = 0.0, field: str = ""
) -> pb.SequenceOutput:
    """The answer to a request that never became a sequence; `field` of its Submit is wrong."""
    return pb.SequenceOutput(
        request_id=request_id,
        finish_reason=pb.FINISH_REASON_ERROR,
        status=status,
        error=text,
        retry_after_ms=round(retry_after_s * 1000),
        error_field=field,
    )


def cancelled(request_id: int) -> pb.SequenceOutput:
    """The end of a request that was cancelled before it became a sequence."""
    return pb.SequenceOutput(request_id=request_id, finish_reason=pb.FINISH_REASON_CANCELLED, status=STATUS_OK)


def _positions(positions: Iterable[PositionLogprobs]) -> list[pb.PositionLogprobs]:
    return [
        pb.PositionLogprobs(chosen=_token(place.chosen), top=[_token(one) for one in place.top]) for place in positions
    ]


def _token(one: TokenLogprob) -> pb.TokenLogprob:
    return pb.TokenLogprob(token_id=one.token, logprob=one.logprob, rank=one.rank)
