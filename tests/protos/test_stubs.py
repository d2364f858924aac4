"""The committed stubs are what protoc makes of the .proto files today."""

from pathlib import Path

import pytest

from protos.generate import ROOT, SOURCES, generate

STEMS = [Path(source).stem for source in SOURCES]


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stubs")
    generate(out)
    return out


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("suffix", ["_pb2.py", "_pb2.pyi", "_pb2_grpc.py"])
def test_committed_stub_is_current(fresh: Path, stem: str, suffix: str) -> None:
    name = f"protos/{stem}{suffix}"
    assert (ROOT / name).read_text() == (fresh / name).read_text(), "run `python -m protos.generate`"


def test_every_proto_file_is_compiled() -> None:
    assert {path.name for path in (ROOT / "protos").glob("*.proto")} == {Path(name).name for name in SOURCES}


def test_generate_says_that_protoc_failed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="protoc exited with 1"):
        generate(tmp_path / "missing")
