"""A coordinator without a model: it says what a test tells it to, and remembers what it was asked.

It implements `actors.front.coordinator_pool.Coordinator`; nothing in it knows HTTP.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from itertools import islice

from actors.front.coordinator_client import CoordinatorLost
from protos.coordinator_pb2 import (
    FINISH_REASON_ERROR,
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    FinishReason,
    LayerLoad,
    PositionLogprobs,
    Room,
    RoomReply,
    RoomRequest,
    SequenceOutput,
    SnapshotReply,
    Submit,
    TokenLogprob,
)
from protos.expert_pb2 import Status

Event = SequenceOutput | Exception
Script = Callable[[Submit], Iterable[Event]]


class ScriptedCoordinator:
    """Plays `script` for every request. After `hold_after` outputs a request waits until it is cancelled.

    It tells nothing of its room, as an older version does not, until it has a `rooms` to tell.
    """

    def __init__(self, script: Script, *, address: str = "one:1", hold_after: int | None = None) -> None:
        self.address = address
        self.connected = True
        self.inflight_tokens = 0
        self.reply = SnapshotReply(coordinator_id=address, state="ready", max_model_len=512)
        self.submits: list[Submit] = []
        self.cancelled: list[int] = []
        self.rooms: Room | None = None
        self.questions: list[RoomRequest] = []
        self.held = asyncio.Event()
        self.idle = asyncio.Event()
        self._script = script
        self._on_change: Callable[[], None] = lambda: None
        self._hold_after = hold_after

    def watch(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change

    def open(self) -> None:
        pass

    def turn(self, *, connected: bool) -> None:
        """The stream comes up or is lost."""
        self.connected = connected
        self._on_change()

    async def connect(self) -> None:
        if not self.connected:
            raise CoordinatorLost(f"{self.address}: nobody there")

    async def generate(self, submit: Submit) -> AsyncGenerator[SequenceOutput, None]:
        await self.connect()
        self.submits.append(submit)
        finished = False
        self.idle.clear()
        try:
            for count, event in enumerate(self._script(submit)):
                if count == self._hold_after:
                    self.held.set()
                    await asyncio.Event().wait()
                await asyncio.sleep(0)
                if isinstance(event, Exception):
                    raise event
                finished = event.finish_reason != FINISH_REASON_UNSPECIFIED
                yield event
        finally:
            if not finished:
                self.cancelled.append(submit.request_id)
            self.idle.set()

    async def snapshot(self) -> SnapshotReply:
        await self.connect()
        return self.reply

    async def room(self, questions: RoomRequest) -> RoomReply:
        self.questions.append(questions)
        if self.rooms is None:
            raise CoordinatorLost(f"{self.address}: an older version, which does not tell")
        return RoomReply(rooms=[self.rooms] * len(questions.questions))

    async def close(self) -> None:
        self.connected = False


def saying(ids: Sequence[int], eos: int | None = None) -> Script:
    """One token per output, as many as asked for; ends with `eos` when there are fewer. Goes on after what was said."""

    def script(submit: Submit) -> Iterable[Event]:
        if submit.max_tokens == 0:
            yield _output(submit, [], FINISH_REASON_LENGTH, first=True)
        given = [*ids, *([] if eos is None else [eos])][: submit.max_tokens]
        for place, token in _rest(submit, given):
            last = place == len(given) - 1
            ended = FINISH_REASON_STOP if token == eos else FINISH_REASON_LENGTH
            yield _output(submit, [token], ended if last else FINISH_REASON_UNSPECIFIED, first=place == 0)

    return script


def failing(status: Status, error: str, after: Sequence[int] = (), retry_after_ms: int = 0) -> Script:
    """Some tokens, then a failure."""

    def script(submit: Submit) -> Iterable[Event]:
        for _, token in _rest(submit, after):
            yield SequenceOutput(token_ids=[token])
        yield SequenceOutput(
            finish_reason=FINISH_REASON_ERROR, status=status, error=error, retry_after_ms=retry_after_ms
        )

    return script


def raising(error: Exception, after: Sequence[int] = ()) -> Script:
    """Some tokens, then an exception out of the client."""

    def script(submit: Submit) -> Iterable[Event]:
        for _, token in _rest(submit, after):
            yield SequenceOutput(token_ids=[token])
        yield error

    return script


def _rest(submit: Submit, ids: Sequence[int]) -> list[tuple[int, int]]:
    """Places and tokens after those that were said before, which must be the same."""
    said = list(submit.generated_token_ids)
    assert said == list(ids[: len(said)]), f"asked to go on from {said}, but these are {ids}"
    return list(enumerate(ids))[len(said) :]


def losing(script: Script, after: int) -> Script:
    """Plays `after` outputs, then the coordinator is lost."""

    def cut(submit: Submit) -> Iterable[Event]:
        yield from islice(script(submit), after)
        yield CoordinatorLost("lost on purpose")

    return cut


def with_load(reply: SnapshotReply, load: Sequence[Sequence[int]]) -> SnapshotReply:
    """The snapshot with tokens per (layer, expert), in the window too."""
    loads = [LayerLoad(tokens=row) for row in load]
    return SnapshotReply(
        **{name: getattr(reply, name) for name in ("coordinator_id", "state")}, load=loads, window_load=loads
    )


def logprobs_of(token: int, alternatives: int) -> PositionLogprobs:
    """`token` with log-probability -0.5, and alternatives: itself, then the ids after it, -1, -2, ..."""
    top = [
        TokenLogprob(token_id=token + n, logprob=-0.5 if n == 0 else -float(n), rank=n + 1) for n in range(alternatives)
    ]
    return PositionLogprobs(chosen=TokenLogprob(token_id=token, logprob=-0.5, rank=1), top=top)


def _output(submit: Submit, ids: list[int], finish: FinishReason, *, first: bool) -> SequenceOutput:
    output = SequenceOutput(token_ids=ids, finish_reason=finish, num_prompt_tokens=len(submit.prompt_token_ids))
    if submit.HasField("logprobs"):
        output.logprobs.extend(logprobs_of(token, submit.logprobs) for token in ids)
    if first and submit.HasField("prompt_logprobs"):
        scored = submit.prompt_token_ids[1:]
        output.prompt_logprobs.extend(logprobs_of(token, submit.prompt_logprobs) for token in scored)
    return output
