"""The ids of events: what is written is read, and nothing else is."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.front.event_ids import MAX_CHARS, EventId, EventIds, Position, Stage, StreamKey, digest
from actors.front.openai_schema import MAX_N
from actors.front.request_fields import REQUEST_ID

keys = st.builds(
    lambda request, fingerprint, seed, created, label: StreamKey.draw(
        request=digest(request, size=8),
        fingerprint=digest(fingerprint, size=4),
        seed=seed,
        created=created,
        label=label,
    ),
    st.binary(max_size=8),
    st.binary(max_size=8),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**36),
    st.from_regex(REQUEST_ID, fullmatch=True) | st.sampled_from(["", "a-2-5o", "-2-5o.0n-u", "9" * 64]),
)
positions = st.lists(
    st.builds(Position, st.integers(0, 99_999_999), st.sampled_from(Stage)), min_size=1, max_size=MAX_N
)


@given(keys, positions, st.integers(0, 2**31), st.booleans())
def test_what_is_written_is_read(key: StreamKey, told: list[Position], age_s: int, usage: bool) -> None:
    ids = EventIds(key, told, lambda: key.created + age_s + 0.7)
    text = ids.with_usage() if usage else ids.at(0, *told[0])
    assert text.isascii()
    assert text.isprintable()
    assert len(text) <= MAX_CHARS
    read = EventId.parse(text)
    assert read == EventId(key, age_s, tuple(told), usage)
    assert read.sent_at == key.created + age_s


def test_each_event_takes_one_choice_on() -> None:
    key = StreamKey.draw(request="0" * 16, fingerprint="1" * 8, seed=7, created=100)
    ids = EventIds(key, [Position()] * 3, lambda: 102.0)
    assert ids.at(1, 5, Stage.OPEN).endswith("-2-0n.5o.0n")
    assert ids.at(0, 2, Stage.SAID).endswith("-2-2s.5o.0n")
    assert ids.at(1, 6, Stage.ENDED).endswith("-2-2s.6e.0n")
    assert ids.with_usage().endswith("-2-2s.6e.0n-u")


def test_a_clock_that_went_back_makes_no_bad_id() -> None:
    key = StreamKey.draw(request="0" * 16, fingerprint="1" * 8, seed=7, created=100)
    assert EventId.parse(EventIds(key, [Position()], lambda: 50.0).with_usage()).age_s == 0


GOOD = f"1-{'0' * 16}-{'1' * 8}-7-64-{'a' * 24}-2-5o.0n"


@pytest.mark.parametrize(
    "text",
    [
        "", "7", "x" * 10_000, GOOD + "\n", GOOD + "-u-u", GOOD + ".", GOOD[:-1], "2" + GOOD[1:], GOOD.upper(),
        GOOD.replace("5o", "5x"), GOOD.replace("5o", "-5o"), GOOD.replace("5o", "123456789o"), GOOD.replace("5o", "٥o"),
        GOOD.replace("-7-", "-11112222333344445-"), GOOD + ".0n" * 700,
        GOOD.replace("a-2", "a~-2"), GOOD.replace("a-2", f"a~{'l' * 65}-2"), GOOD.replace("a-2", "a~two words-2"),
        GOOD.replace("a-2", "a~l~m-2"),
    ],
)  # fmt: skip
def test_nothing_else_is_read(text: str) -> None:
    EventId.parse(GOOD)
    with pytest.raises(ValueError, match="not the id"):
        EventId.parse(text)


@given(st.text())
def test_no_text_raises_anything_else(text: str) -> None:
    with contextlib.suppress(ValueError):
        EventId.parse(text)


def test_a_digest_tells_where_its_parts_end() -> None:
    assert digest(b"ab", b"c", size=8) != digest(b"a", b"bc", size=8)
    assert len(digest(b"", size=4)) == 8
