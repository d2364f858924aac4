"""One local cluster per user: the second is refused, a killed one is forgotten."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from actors.command.cache_dir import user_cache_dir
from actors.command.local_record import LocalRecord
from actors.ray_runtime import RuntimeFailure


def test_a_held_place_is_read_and_then_empty(tmp_path: Path) -> None:
    record = LocalRecord(tmp_path / "cache")
    assert record.read() == {}
    with record.hold("http://h:1") as held:
        assert record.read() == {"url": "http://h:1", "pid": str(os.getpid()), "ray_address": ""}
        held.write(ray_address="1.2.3.4:5")
        assert record.read()["ray_address"] == "1.2.3.4:5"
    assert record.read() == {}


def test_a_second_start_is_refused_with_the_first_one_named(tmp_path: Path) -> None:
    with LocalRecord(tmp_path).hold("http://h:1"):
        with pytest.raises(RuntimeFailure, match=rf"already serves at http://h:1 \(pid {os.getpid()}\)"):
            LocalRecord(tmp_path).hold("http://h:2").__enter__()
        assert LocalRecord(tmp_path).read()["url"] == "http://h:1"
    with LocalRecord(tmp_path).hold("http://h:2"):
        assert LocalRecord(tmp_path).read()["url"] == "http://h:2"


def test_a_killed_cluster_is_none(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / "running.json").write_text(json.dumps({"url": "u", "pid": str(ended.pid), "ray_address": "a"}))
    assert LocalRecord(tmp_path).read() == {}


@pytest.mark.parametrize("text", ["", "{", "[]", "[1]", "{}", '{"pid": null}', '{"pid": "x"}', "5"])
def test_a_broken_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "running.json").write_text(text)
    assert LocalRecord(tmp_path).read() == {}


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_dir() == tmp_path / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache_dir() == Path.home() / ".cache" / "octavo"
