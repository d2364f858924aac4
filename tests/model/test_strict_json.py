"""JSON that could be read in two ways is refused."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.storage.strict_json import JSONError, parse_object, read_object


def test_an_object_is_returned_as_it_is() -> None:
    assert parse_object(b'{"a": 1, "b": [true, null, 2.5], "\xc3\xa9": {}}') == {
        "a": 1,
        "b": [True, None, 2.5],
        "é": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        (b'{"outer": {"a": 1, "a": 1}}', "'a' appears twice"),
        (b"[1]", "expected a JSON object, got list"),
        (b"", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not a JSON number"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"\\ud800": 1}', "not valid Unicode"),
        (b'{"a": ' + b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not valid JSON"),
    ],
)
def test_doubtful_text_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(JSONError, match=message):
        parse_object(text)


@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_else(data: bytes) -> None:
    with suppress(JSONError):
        assert isinstance(parse_object(data), dict)


def test_a_file_comes_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a":  1}')
    assert read_object(path, 9) == ({"a": 1}, b'{"a":  1}')


def test_a_file_over_the_limit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a":  1}')
    with pytest.raises(JSONError, match="larger than the limit of 8 bytes"):
        read_object(path, 8)
