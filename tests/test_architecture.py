"""The doors between the rooms, proved from the source: who may import what, and who owns which outside world."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("model", "protos", "cluster", "actors", "experiments")

MAY_IMPORT_ROOMS = {
    "model": set[str](),
    "protos": set[str](),
    "cluster": set[str](),
    "actors": {"model", "protos", "cluster"},
    "experiments": {"model", "protos", "cluster", "actors"},
}
# Third-party packages a leaf may use; None means any.
MAY_IMPORT_OTHERS: dict[str, set[str] | None] = {
    "model": {
        "torch",
        "safetensors",
        "sentencepiece",
        "tokenizers",
        "jinja2",
        "gguf",
        "google_crc32c",
        "numpy",
        "llguidance",
    },
    "protos": {"google", "google_crc32c", "grpc", "grpc_tools", "torch"},
    "cluster": {"numpy"},
    "actors": None,
    "experiments": None,
}
NEVER_STDLIB = {
    "model": {"asyncio", "socket", "multiprocessing"},
    "protos": {"asyncio", "socket"},
    "cluster": {"asyncio", "socket", "threading", "multiprocessing", "subprocess", "time", "random"},
}
OWNERS = {  # an outside world -> the only modules that may import it
    "ray": {"actors/ray_runtime.py"},
    "ray.serve": {"actors/ray_serve.py", "actors/ingress.py"},
}


def sources() -> list[Path]:
    return [
        path
        for room in ROOMS
        for path in sorted((ROOT / room).rglob("*.py"))
        if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))
    ]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path) -> Iterator[str]:
    """Every imported dotted name of a file: top-level, lazy, and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"__import__", "importlib.import_module"}, f"{relative(path)}: {called}"


def under(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_a_file_imports_only_what_its_room_may(path: Path) -> None:
    room = relative(path).split("/")[0]
    allowed_others = MAY_IMPORT_OTHERS[room]
    for name in imports(path):
        top = name.split(".")[0]
        if top in ROOMS:
            assert top == room or top in MAY_IMPORT_ROOMS[room], f"{relative(path)} must not import {name}"
        elif top in sys.stdlib_module_names:
            assert top not in NEVER_STDLIB.get(room, set()), f"{relative(path)} must not import {name}"
        else:
            assert allowed_others is None or top in allowed_others, f"{relative(path)} must not import {name}"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_one_module_owns_each_outside_world(path: Path) -> None:
    for name in imports(path):
        if under(name, "ray.serve"):
            assert relative(path) in OWNERS["ray.serve"], f"{relative(path)} must not import {name}"
        elif under(name, "ray"):
            assert relative(path) in OWNERS["ray"], f"{relative(path)} must not import {name}"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_only_the_channels_module_sets_grpc_options(path: Path) -> None:
    text = path.read_text()
    if relative(path) != "actors/channels.py":
        for option in ("insecure_channel", "secure_channel", "aio.server(", "grpc.max_", "grpc.keepalive"):
            assert option not in text, f"{relative(path)} uses {option}: that is actors/channels.py's"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_only_the_config_reads_the_environment_of_decisions(path: Path) -> None:
    if relative(path).startswith(("cluster/", "model/", "protos/")):
        text = path.read_text()
        assert "os.environ" not in text, f"{relative(path)} reads the environment"
        assert "os.getenv" not in text, f"{relative(path)} reads the environment"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_nobody_waits_in_a_way_that_may_lose_a_cancellation(path: Path) -> None:
    """`asyncio.wait_for` of Python 3.11 swallows one that comes as the awaited thing ends: loops then never end."""
    assert "asyncio.wait_for(" not in path.read_text(), f"{relative(path)}: use asyncio.timeout"


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_a_file_says_what_it_is_for_and_stays_small(path: Path) -> None:
    text = path.read_text()
    assert ast.get_docstring(ast.parse(text)), f"{relative(path)} has no module docstring"
    lines = text.count("\n")
    assert lines <= 400, f"{relative(path)} has {lines} lines: it asks for a door"


def test_no_circle_of_imports() -> None:
    names = {relative(path)[:-3].replace("/", ".").removesuffix(".__init__"): path for path in sources()}
    graph = {
        module: {target for name in imports(path) for target in names if under(name, target) and "." in target}
        - {module}
        for module, path in names.items()
    }
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, f"import circle: {' -> '.join((*trail, module))}"
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_room_or_module_shadows_another() -> None:
    for path in sources():
        assert path.stem not in sys.stdlib_module_names, f"{relative(path)} is named like a standard module"
        assert path.stem not in {"utils", "util", "helpers", "misc", "common"}, relative(path)
    assert not list((ROOT / "tests").rglob("__init__.py")), "packages under tests/ would shadow the rooms"
