"""Compiles the `.proto` files into the committed stubs: `python -m protos.generate [--out DIR]`.

Stubs are committed because Ray's upload of a working directory obeys `.gitignore`, so ignored files would be
missing on the workers. A test compiles them again and compares.
"""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("protos/expert.proto", "protos/coordinator.proto")


def generate(out: Path) -> None:
    """Writes `*_pb2.py`, `*_pb2.pyi` and `*_pb2_grpc.py` below `out`/protos. Raises RuntimeError if protoc fails."""
    from grpc_tools import protoc

    flags = [f"-I{ROOT}", f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}"]
    code = protoc.main(["protoc", *flags, *(str(ROOT / source) for source in SOURCES)])
    if code != 0:
        raise RuntimeError(f"protoc exited with {code}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="root of the tree to write to")
    generate(parser.parse_args().out)
