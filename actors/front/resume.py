"""Whether and where a cut stream goes on: a `Last-Event-ID` against the request that came with it.

The same body is sent again. What its client has is computed again or remembered, fed to the text and not told. The
form of an id is `actors.front.event_ids`' knowledge.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from actors.front.choice_text import ChoiceText, Delta
from actors.front.event_ids import EventId, EventIds, Position, Stage, StreamKey, digest
from actors.front.front_door import FrontDoor
from actors.front.openai_errors import ApiError, invalid
from actors.front.openai_schema import GenerationRequest
from actors.front.prompts import PromptTokens
from actors.front.request_ids import UNNAMED, RequestName
from protos.coordinator_pb2 import FINISH_REASON_UNSPECIFIED, SequenceOutput
from protos.outputs import is_last

HEADER = "Last-Event-ID"


@dataclass(frozen=True, slots=True)
class Beginning:
    """Where an answer begins: its key, and how far each choice was told before."""

    key: StreamKey
    told: tuple[Position, ...]
    usage_told: bool = False

    @property
    def is_resumed(self) -> bool:
        """True where something was told before."""
        return any(position.stage is not Stage.NOTHING for position in self.told)

    def event_ids(self, front: FrontDoor) -> EventIds:
        """The ids of the events from here on."""
        return EventIds(self.key, self.told, front.wall_clock)


def begin(
    front: FrontDoor,
    request: GenerationRequest,
    prompts: Sequence[PromptTokens],
    last_event_id: str | None,
    name: RequestName = UNNAMED,
) -> Beginning:
    """The beginning of a new answer, or where the one that `last_event_id` is of goes on.

    Raises ApiError 400 for an id that nobody wrote, 409 for one of another request or model, 410 for one that is too
    old.
    """
    num_choices = len(prompts) * request.num_choices
    asked = _hash(request, prompts) if request.stream else ""
    model = digest(front.system_fingerprint.encode(), size=4)
    if last_event_id is None:
        seed = front.draw_seed() if request.seed is None else request.seed % 2**64
        label = name.own or request.request_id or ""
        key = StreamKey.draw(
            request=asked,
            fingerprint=model,
            seed=seed,
            created=int(front.wall_clock()),
            name=name.drawn,
            label=label,
        )
        return Beginning(key, (Position(),) * num_choices)
    if not request.stream:
        raise invalid(HEADER, f"Invalid header '{HEADER}': it needs 'stream' to be true.")
    event = _parse(last_event_id)
    if front.wall_clock() - event.sent_at > front.limits.resume_s:
        raise ApiError(
            410,
            f"The event of '{HEADER}' is more than {front.limits.resume_s:g} s old: the stream cannot be resumed.",
            param=HEADER,
            code="event_id_expired",
        )
    if event.key.request != asked:
        raise _conflict("The request is not the one whose stream was cut: send the same body.", "event_id_mismatch")
    if event.key.fingerprint != model:
        raise _conflict("The model has changed since that event was sent.", "system_fingerprint_changed")
    if len(event.positions) != num_choices:
        raise invalid(HEADER, f"Invalid header '{HEADER}': the request has {num_choices} choices.")
    return Beginning(event.key, event.positions, event.usage_told)


def _parse(text: str) -> EventId:
    try:
        return EventId.parse(text)
    except ValueError as error:
        raise invalid(HEADER, f"Invalid header '{HEADER}': it is {error}.") from None


def _conflict(reason: str, code: str) -> ApiError:
    return ApiError(409, f"The stream cannot be resumed after '{HEADER}'. {reason}", param=HEADER, code=code)


def _hash(request: GenerationRequest, prompts: Sequence[PromptTokens]) -> str:
    """Of what was asked, as it was understood: a chat template may read the clock, so the prompts are in it."""
    kind = type(request).__name__.encode()
    tokens = (array("I", prompt.token_ids).tobytes() for prompt in prompts)
    return digest(kind, request.model_dump_json().encode(), *tokens, size=8)


class Untold:
    """A choice's text of which the client has the first part: feeds that silently, and tells the rest."""

    def __init__(self, text: ChoiceText, index: int, told: Position) -> None:
        self._text = text
        self._index = index
        self._left = told.num_tokens
        self._all_said = told.stage is Stage.SAID

    def feed(self, output: SequenceOutput) -> Delta | None:
        """As `ChoiceText.feed`; None where all of it was told."""
        if self._all_said:
            return self._only_end(self._text.feed(output))
        if self._left:
            told, output = _split(output, self._left)
            self._left -= len(told.token_ids)
            ended = self._only_end(self._text.feed(told))
            if ended is not None or not (output.token_ids or is_last(output)):
                return ended
        return self._text.feed(output)

    def _only_end(self, delta: Delta) -> Delta | None:
        if delta.finish_reason is None:
            return None
        return Delta(
            index=self._index,
            num_tokens=delta.num_tokens,
            num_cached_tokens=delta.num_cached_tokens,
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
        )


def _split(output: SequenceOutput, num_tokens: int) -> tuple[SequenceOutput, SequenceOutput]:
    """The first `num_tokens` tokens, and the rest with the end."""
    told, rest = SequenceOutput(), SequenceOutput()
    told.CopyFrom(output)
    rest.CopyFrom(output)
    told.finish_reason = FINISH_REASON_UNSPECIFIED
    for field in ("token_ids", "logprobs"):
        del getattr(told, field)[num_tokens:]
        del getattr(rest, field)[:num_tokens]
    return told, rest
