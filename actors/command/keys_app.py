"""`octavo keys`: makes API keys and their entries in the keys' file. A key is shown once and stored nowhere."""

import contextlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from actors.command.experts_app import terminal

app = typer.Typer(help="Make API keys, and list the entries of a keys file.")

Limit = Annotated[int | None, typer.Option(min=1)]


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Whose key it is; unique in the file.")],
    add_to: Annotated[Path | None, typer.Option(help="Keys file to put the entry into; made if there is none.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Shares turns with all keys of that tenant.")] = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrency: Limit = None,
    expires: Annotated[str | None, typer.Option(help="A time, as 2030-12-31 or 2030-12-31T12:00:00Z.")] = None,
) -> None:
    """Print a fresh key, once, and its entry for the keys file."""
    from actors.front.api_keys import new_key

    limits = {
        "tenant": tenant,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
        "concurrency": concurrency,
        "expires": expires,
    }
    given = {field: value for field, value in limits.items() if value is not None}
    key, made = new_key(name, **given)
    entry = {"name": made.name, "sha256": made.sha256, **given}
    if add_to is not None:
        add_entry(add_to, entry)
    print(key)
    notes = terminal()
    if add_to is None:
        print(json.dumps(entry))
        notes.print("The first line is the key, shown this once; the second goes into the keys file, under 'keys'.")
    else:
        notes.print(f"This is the key, shown this once. Its entry is in {add_to}.", markup=False, soft_wrap=True)


@app.command("list")
def list_keys(file: Annotated[Path, typer.Argument(help="Keys file.")]) -> None:
    """Check a keys file, and show whose keys it has and what they may use."""
    from actors.front.key_file import read_keys

    for entry in read_keys(file):
        limits = entry.model_dump(exclude={"name", "sha256"}, exclude_none=True, mode="json")
        said = ", ".join(f"{field} {value}" for field, value in limits.items())
        print(f"{entry.name}: {said or 'no limits'}")


def add_entry(file: Path, entry: dict[str, Any]) -> None:
    """Writes the file anew with one more entry, all at once. Raises KeysError, or OSError.

    A file that others may read is refused: hashes tell nobody a key, but whose they are is nobody's business.
    """
    from actors.front.api_keys import KeysError, parse_keys
    from actors.front.key_file import read_keys

    entries: list[dict[str, Any]] = []
    if file.exists():
        if stat.S_IMODE(file.stat().st_mode) & 0o007:
            raise KeysError(f"{file}: everybody may read or write it; make it yours first (chmod o-rwx)")
        read_keys(file)
        entries = json.loads(file.read_text())["keys"]
    text = json.dumps({"keys": [*entries, entry]}, indent=2) + "\n"
    parse_keys(text)
    _write_whole(file, text)


def _write_whole(file: Path, text: str) -> None:
    """Readers see the old file or the new one, never half of it."""
    mode = stat.S_IMODE(file.stat().st_mode) if file.exists() else 0o600
    handle, written = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
    try:
        with os.fdopen(handle, "w") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(written, mode)
        os.replace(written, file)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(written)
        raise
