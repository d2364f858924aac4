"""API keys: only hashes in the file, every mistake in it named, found among many, read anew when it changes."""

import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from actors.front.api_keys import PREFIX, KeyRing, KeysError, digest, new_key, one_key, parse_keys
from actors.front.key_file import LOOK_EVERY_S, MAX_FILE_BYTES, Keys, load_keys, read_keys

GOOD = {"name": "a", "sha256": digest("k" * 20)}


def text_of(*entries: dict[str, Any]) -> str:
    return json.dumps({"keys": entries})


def test_a_fresh_key_is_long_and_its_entry_tells_nothing_of_it() -> None:
    key, entry = new_key("alice", tenant="team", requests_per_minute=60, expires="2030-01-02T03:04:05Z")
    other, _ = new_key("alice")
    assert key.startswith(PREFIX)
    assert len(key) >= len(PREFIX) + 43, "256 bits"
    assert key != other
    assert (entry.name, entry.whose, entry.requests_per_minute, entry.tokens_per_minute) == ("alice", "team", 60, None)
    assert entry.sha256 == digest(key)
    assert key not in repr(entry)
    assert entry.sha256 not in repr(entry)
    until = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()
    assert (entry.is_expired(until - 1), entry.is_expired(until)) == (False, True)


def test_a_ring_finds_each_of_many_and_nothing_else() -> None:
    made = [new_key(f"n{number}") for number in range(500)]
    ring = KeyRing(entry for _, entry in made)
    assert all(ring.find(key) is entry for key, entry in made)
    for wrong in ("", "x", made[0][0][:-1], made[0][0] + "x", made[0][0].upper(), made[0][1].sha256, "k" * 10_000):
        assert ring.find(wrong) is None


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "it is no JSON at line 1"),
        ("[" * 100_000, "it is no JSON"),
        (b"\xff\xfe\x00", "it is no JSON"),
        ("[]", "the file: "),
        ('{"kes": []}', "keys: Field required"),
        (text_of({"name": "a"}), "keys[0].sha256: Field required"),
        (text_of(GOOD, {**GOOD, "name": "b", "sha256": "SECRET"}), "keys[1].sha256: String should match"),
        (text_of({**GOOD, "key": "SECRET"}), "keys[0].key: Extra inputs are not permitted"),
        (text_of({**GOOD, "name": "a b"}), "keys[0].name: String should match"),
        (text_of({**GOOD, "name": "a\n"}), "keys[0].name: String should match"),
        (text_of({**GOOD, "tenant": ""}), "keys[0].tenant: String should match"),
        (text_of({**GOOD, "tokens_per_minute": 0}), "keys[0].tokens_per_minute: Input should be greater than"),
        (text_of({**GOOD, "concurrency": "5"}), "keys[0].concurrency: Input should be a valid integer"),
        (text_of({**GOOD, "expires": "tomorrow"}), "keys[0].expires: must be a time such as"),
        (text_of({**GOOD, "expires": 1}), "keys[0].expires: must be a time such as"),
        (text_of(GOOD, {**GOOD, "name": "b"}), "keys[1].sha256 is that of another entry"),
        (text_of(GOOD, {**GOOD, "sha256": "0" * 64}), "keys[1].name is that of another entry"),
    ],
)
def test_what_is_wrong_with_a_file_is_named_and_not_repeated(text: str | bytes, complaint: str) -> None:
    with pytest.raises(KeysError) as wrong:
        parse_keys(text)
    assert complaint in str(wrong.value)
    assert "SECRET" not in str(wrong.value)
    assert GOOD["sha256"] not in str(wrong.value)


def test_a_time_without_a_zone_is_at_utc() -> None:
    (entry,) = parse_keys(text_of({**GOOD, "expires": "2030-01-01"}))
    assert entry.expires == datetime(2030, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize(
    "key", ["short", "x" * 513, "with a space in it!", "schlüssel-schlüssel", "tab\ttab\ttab\ttabs"]
)
def test_a_given_key_must_be_long_and_plain(key: str) -> None:
    with pytest.raises(KeysError) as wrong:
        one_key("default", key)
    assert key not in str(wrong.value)


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_changed_file_counts_a_second_later_and_a_wrong_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    clock, file = Clock(), tmp_path / "keys.json"
    (first, one), (second, two) = new_key("one"), new_key("two")
    only = one_key("default", "the-only-key-there-is")

    def write(text: str) -> None:
        fresh = tmp_path / "fresh"
        fresh.write_text(text)
        os.replace(fresh, file)

    def found() -> list[bool]:
        return [keys.ring.find(key) is not None for key in (first, second, "the-only-key-there-is")]

    write(text_of(one.model_dump(exclude_none=True)))
    keys = Keys(file, (only,), clock)
    assert found() == [True, False, True]
    write(text_of(two.model_dump(exclude_none=True)))
    assert found() == [True, False, True], "it is looked at once a second"
    clock.now_s += LOOK_EVERY_S
    assert found() == [False, True, True]
    assert f"2 API keys are in force, read anew from {file}" in caplog.text
    for wrong, complaint in (
        ("{", "it is no JSON at line 1"),
        (text_of({**GOOD, "name": "default"}), "the name 'default' is taken"),
        (None, "No such file"),
    ):
        caplog.clear()
        file.unlink() if wrong is None else write(wrong)
        for _ in range(5):
            clock.now_s += LOOK_EVERY_S
            assert found() == [False, True, True]
        (said,) = caplog.messages
        assert said.startswith(f"the API keys stay as they were: {file}: ")
        assert complaint in said
    write(text_of())
    clock.now_s += LOOK_EVERY_S
    assert found() == [False, False, True]


def test_a_file_exchanged_as_kubernetes_does_it_is_noticed(tmp_path: Path) -> None:
    """A directory behind a symbolic link; the new file may be as long and as old as the former."""
    clock = Clock()
    (first, one), (second, two) = new_key("one"), new_key("two")
    for number, entry in enumerate((one, two)):
        (tmp_path / f"v{number}").mkdir()
        (tmp_path / f"v{number}/keys.json").write_text(text_of(entry.model_dump(exclude_none=True)))
        os.utime(tmp_path / f"v{number}/keys.json", (1, 1))
    (tmp_path / "data").symlink_to("v0")
    keys = Keys(tmp_path / "data/keys.json", clock=clock)
    (tmp_path / "new").symlink_to("v1")
    os.replace(tmp_path / "new", tmp_path / "data")
    clock.now_s += LOOK_EVERY_S
    assert keys.ring.find(first) is None
    assert keys.ring.find(second) is not None


def test_a_server_starts_with_good_keys_or_not_at_all(tmp_path: Path) -> None:
    assert load_keys(None, None) is None
    only = load_keys(None, "0123456789abcdef")
    assert only is not None
    found = only.ring.find("0123456789abcdef")
    assert found is not None
    assert found.name == "default"
    with pytest.raises(KeysError, match="No such file"):
        load_keys(str(tmp_path / "none.json"), None)
    large = tmp_path / "large"
    large.write_bytes(b" " * (MAX_FILE_BYTES + 1))
    with pytest.raises(KeysError, match=f"larger than {MAX_FILE_BYTES} bytes"):
        read_keys(large)
