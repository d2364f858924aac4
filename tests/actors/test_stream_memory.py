"""What an ingress remembers of its streams: bounded in number, in tokens and in time."""

from actors.front.stream_memory import Known, StreamMemory, StreamRecord
from protos.coordinator_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_UNSPECIFIED, SequenceOutput


def note(record: StreamRecord, index: int, *tokens: int, finish: int = FINISH_REASON_UNSPECIFIED) -> None:
    record.note(index, SequenceOutput(token_ids=tokens, finish_reason=finish))  # type: ignore[arg-type]


def tokens(record: StreamRecord) -> list[list[int]]:
    return [list(one.token_ids) for one in record.choices]


def test_a_stream_that_goes_on_knows_what_came_before() -> None:
    memory = StreamMemory(10.0)
    first = memory.begin("a", 2)
    note(first, 0, 7, 8)
    note(first, 1, 9, finish=FINISH_REASON_LENGTH)
    second = memory.begin("a", 2)
    assert tokens(second) == [[7, 8], [9]]
    assert [one.finish_reason for one in second.choices] == [FINISH_REASON_UNSPECIFIED, FINISH_REASON_LENGTH]
    note(second, 0, 5)
    note(first, 0, 99)
    assert tokens(memory.begin("a", 2)) == [[7, 8, 5], [9]], "the one that was cut adds nothing any more"
    assert (len(memory), memory.num_tokens) == (1, 4)


def test_others_know_nothing() -> None:
    memory = StreamMemory(10.0)
    note(memory.begin("a", 1), 0, 7)
    assert tokens(memory.begin("b", 1)) == [[]]
    assert tokens(memory.begin("a", 2)) == [[], []], "a key that lies about its choices"


def test_the_oldest_are_forgotten_when_there_are_too_many() -> None:
    memory = StreamMemory(10.0, max_streams=2, max_tokens=5)
    records = [memory.begin(name, 1) for name in "abc"]
    assert [record.kept for record in records] == [False, True, True]
    note(records[1], 0, 1, 2, 3)
    note(records[2], 0, 4, 5)
    assert [record.kept for record in records] == [False, True, True]
    note(records[2], 0, 6)
    assert [record.kept for record in records] == [False, False, True]
    note(records[1], 0, 7)
    assert (len(memory), memory.num_tokens) == (1, 3)
    note(records[2], 0, 1, 2, 3)
    assert (len(memory), memory.num_tokens) == (0, 0), "one that is too long by itself"


def test_silence_is_forgotten() -> None:
    now = [0.0]
    memory = StreamMemory(10.0, clock=lambda: now[0])
    record = memory.begin("a", 1)
    for _ in range(5):
        now[0] += 9.0
        note(record, 0, 7)
    assert tokens(memory.begin("a", 1)) == [[7] * 5]
    now[0] += 10.5
    assert tokens(memory.begin("a", 1)) == [[]]
    now[0] += 10.5
    memory.begin("b", 1)
    assert len(memory) == 1


def test_a_copy_does_not_grow() -> None:
    one = Known()
    one.token_ids.extend([1, 2])
    other = one.copy()
    one.token_ids.append(3)
    assert list(other.token_ids) == [1, 2]
