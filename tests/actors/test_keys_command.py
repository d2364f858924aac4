"""`octavo keys`, and what `octavo serve` refuses before anything starts: a key is shown once, strangers refused."""

import json
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.cli import app
from actors.command.serve import check_access
from actors.front.api_keys import KeysError, digest
from actors.front.key_file import load_keys, read_keys
from cluster.config import ClusterConfig, ConfigError, from_environment


def octavo(*arguments: str) -> tuple[int, list[str], str]:
    """Exit status, lines of stdout, stderr and what was raised."""
    result = CliRunner().invoke(app, arguments)
    return result.exit_code, result.stdout.splitlines(), f"{result.stderr}{result.exception or ''}"


def test_a_fresh_key_and_its_entry() -> None:
    status, (key, entry), notes = octavo(
        "keys", "new", "alice", "--requests-per-minute", "60", "--expires", "2030-01-01"
    )
    assert status == 0
    assert json.loads(entry) == {
        "name": "alice",
        "sha256": digest(key),
        "requests_per_minute": 60,
        "expires": "2030-01-01",
    }
    assert "shown this once" in notes
    assert key not in notes


def test_entries_are_added_to_a_file_that_nobody_else_may_read(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    keys = [octavo("keys", "new", name, "--add-to", str(file))[1][0] for name in ("alice", "bob")]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["keys.json"], "nothing else is left"
    assert not any(key in file.read_text() for key in keys)
    loaded = load_keys(str(file), None)
    assert loaded is not None
    assert [getattr(loaded.ring.find(key), "name", None) for key in keys] == ["alice", "bob"]
    assert octavo("keys", "list", str(file))[1] == ["alice: no limits", "bob: no limits"]


def test_what_cannot_be_added_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    octavo("keys", "new", "alice", "--add-to", str(file))
    before = file.read_bytes()
    for arguments, complaint in (
        (("alice",), "keys[1].name is that of another entry"),
        (("a b",), "keys[0].name: String should match"),
        (("bob", "--expires", "soon"), "keys[0].expires: must be a time such as"),
    ):
        status, said, error = octavo("keys", "new", *arguments, "--add-to", str(file))
        assert (status, said) == (1, []), "no key is shown whose entry is nowhere"
        assert complaint in error
    file.chmod(0o644)
    status, said, error = octavo("keys", "new", "bob", "--add-to", str(file))
    assert (status, said) == (1, [])
    assert "everybody may read or write it" in error
    assert file.read_bytes() == before


def test_a_list_shows_limits_and_no_hash(tmp_path: Path) -> None:
    file = tmp_path / "keys.json"
    octavo("keys", "new", "alice", "--add-to", str(file), "--tenant", "team", "--tokens-per-minute", "1000")
    _, lines, _ = octavo("keys", "list", str(file))
    assert lines == ["alice: tenant team, tokens_per_minute 1000"]
    assert read_keys(file)[0].sha256 not in "".join(lines)


def config(**changes: str) -> ClusterConfig:
    return ClusterConfig(model="/models/mixtral", **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "octavo.example"])
def test_strangers_are_served_only_with_keys_or_on_request(host: str) -> None:
    with pytest.raises(ConfigError, match="give --api-keys FILE or OCTAVO_API_KEY, or say --no-auth"):
        check_access(config(), host, no_auth=False)
    check_access(config(), host, no_auth=True)
    check_access(config(api_key="0123456789abcdef"), host, no_auth=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.8.8.8"])
def test_this_machine_is_served_without(host: str) -> None:
    check_access(config(), host, no_auth=False)


def test_contradictions_and_wrong_files_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--no-auth contradicts"):
        check_access(config(api_key="0123456789abcdef"), "127.0.0.1", no_auth=True)
    with pytest.raises(KeysError, match="No such file"):
        check_access(config(api_keys_file=str(tmp_path / "none")), "127.0.0.1", no_auth=False)


def test_the_one_key_comes_from_the_environment_and_is_shown_nowhere() -> None:
    made = from_environment(config(), {"OCTAVO_API_KEY": "secret-0123456789", "OCTAVO_API_KEYS_FILE": "/etc/keys"})
    assert made.needs_key
    assert made.api_keys_file == "/etc/keys"
    assert "secret" not in repr(made)
    for wrong in ("short", "with a space in it", "x" * 513):
        with pytest.raises(ConfigError) as refused:
            from_environment(config(), {"OCTAVO_API_KEY": wrong})
        assert wrong not in str(refused.value)
    assert "--api-key " not in octavo("serve", "--help")[1]


@pytest.mark.parametrize("origins", ["page.example", "https://a/path", "https://a, ftp://b", "https://", "null"])
def test_origins_must_be_origins(origins: str) -> None:
    with pytest.raises(ConfigError, match="cors_origins has"):
        config(cors_origins=origins)
    assert config(cors_origins="https://a.example:8443, http://[::1]:3000").origins == (
        "https://a.example:8443",
        "http://[::1]:3000",
    )
