"""When a request goes on at another coordinator, what that one is asked, and when it is given up."""

import pytest

from actors.front.resubmission import (
    MAX_INTERNAL_RETRIES,
    MAX_LOSSES,
    MAX_LOSSES_IN_PLACE,
    MAX_PAUSE_S,
    MAX_REFUSED_PAUSE_S,
    Resubmission,
    Verdict,
)
from protos.coordinator_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    PositionLogprobs,
    SequenceOutput,
    Submit,
)
from protos.expert_pb2 import (
    STATUS_CANCELLED,
    STATUS_DEADLINE_EXCEEDED,
    STATUS_DRAINING,
    STATUS_INTERNAL,
    STATUS_INVALID,
    STATUS_OVERLOADED,
    Status,
)


def way(**fields: object) -> Resubmission:
    return Resubmission(Submit(request_id=3, prompt_token_ids=[5, 6], max_tokens=9, **fields))  # type: ignore[arg-type]


def said(*tokens: int, **fields: object) -> SequenceOutput:
    return SequenceOutput(token_ids=tokens, **fields)  # type: ignore[arg-type]


def error(status: Status, *tokens: int) -> SequenceOutput:
    return SequenceOutput(token_ids=tokens, finish_reason=FINISH_REASON_ERROR, status=status)


def test_the_first_is_asked_for_just_what_was_asked() -> None:
    submit = Submit(prompt_token_ids=[5], max_tokens=3, prompt_logprobs=2)
    fresh = Resubmission(submit)
    assert fresh.submit is submit
    assert (fresh.promised, fresh.ended, fresh.pause_s) == (False, False, 0.0)


def test_the_next_is_told_what_was_said_and_scores_nothing_twice() -> None:
    going = way(prompt_logprobs=1, generated_token_ids=[7])
    assert going.promised, "somebody has seen tokens of it"
    assert going.lose(Verdict.LOST, "a")
    assert list(going.submit.generated_token_ids) == [7]
    assert going.submit.HasField("prompt_logprobs"), "nobody has told the scores yet"
    assert going.judge(said(8, 9, prompt_logprobs=[PositionLogprobs()])) is Verdict.TELL
    assert going.lose(Verdict.LOST, "b")
    again = going.submit
    assert (list(again.generated_token_ids), again.HasField("prompt_logprobs")) == ([7, 8, 9], False)
    assert (again.request_id, list(again.prompt_token_ids), again.max_tokens) == (3, [5, 6], 9)
    assert going.avoid == "b"


@pytest.mark.parametrize(
    ("status", "verdict"),
    [
        (STATUS_DRAINING, Verdict.REFUSED),
        (STATUS_OVERLOADED, Verdict.REFUSED),
        (STATUS_CANCELLED, Verdict.LOST),
        (STATUS_INTERNAL, Verdict.FAILED),
        (STATUS_INVALID, Verdict.TELL),
        (STATUS_DEADLINE_EXCEEDED, Verdict.TELL),
    ],
)
def test_what_an_end_without_an_answer_means(status: Status, verdict: Verdict) -> None:
    going = way()
    going.judge(said(7))
    assert going.judge(error(status, 8)) is verdict
    assert going.ended is (verdict is Verdict.TELL)
    going.lose(Verdict.LOST, "a")
    if verdict is not Verdict.TELL:
        assert list(going.submit.generated_token_ids) == [7], "what came with a failure was not told, and comes again"


def test_an_end_is_an_end() -> None:
    for finish in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
        going = way()
        assert going.judge(said(7, finish_reason=finish)) is Verdict.TELL
        assert going.ended
        assert going.end is None, "it was told"


def test_nobody_is_asked_for_what_is_complete() -> None:
    full = way(generated_token_ids=[7] * 9)
    assert full.ended
    assert full.end is not None
    assert (full.end.finish_reason, full.end.request_id) == (FINISH_REASON_LENGTH, 3)


def test_a_request_that_kills_every_coordinator_is_given_up() -> None:
    going = way()
    tries = [going.lose(Verdict.LOST, "a") for _ in range(MAX_LOSSES_IN_PLACE + 1)]
    assert tries == [True] * MAX_LOSSES_IN_PLACE + [False]
    assert going.judge(error(STATUS_CANCELLED)) is Verdict.TELL


def test_progress_gives_it_more_tries_and_not_for_ever() -> None:
    going = Resubmission(Submit(prompt_token_ids=[5], max_tokens=1000))
    losses = 0
    while going.lose(Verdict.LOST, "a"):
        losses += 1
        going.judge(said(7))
    assert losses == MAX_LOSSES


def test_a_request_at_which_coordinators_fail_is_tried_a_few_times_whatever_came_between() -> None:
    going = way()
    for _ in range(MAX_INTERNAL_RETRIES):
        assert going.judge(error(STATUS_INTERNAL)) is Verdict.FAILED
        assert going.lose(Verdict.FAILED, "a")
        going.judge(said(7))
    assert going.judge(error(STATUS_INTERNAL)) is Verdict.TELL


def test_pauses_grow_and_end_with_progress() -> None:
    going = way()
    pauses = []
    for _ in range(MAX_LOSSES_IN_PLACE):
        going.lose(Verdict.LOST, "a")
        pauses.append(going.pause_s)
    assert pauses == [0.0, 0.1, 0.2, 0.4]
    assert max(pauses) <= MAX_PAUSE_S
    refused = [going.refuse() for _ in range(6)]
    assert refused == [0.25, 0.5, 1.0, MAX_REFUSED_PAUSE_S, MAX_REFUSED_PAUSE_S, MAX_REFUSED_PAUSE_S]
    going.judge(said(7))
    assert (going.refuse(), going.pause_s) == (0.25, 0.0)
