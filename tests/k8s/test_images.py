"""The Dockerfile, read as text, because nothing here can build it: pinned, not root, with sources that exist.

What it installs is held to the lock file and to what the packages themselves say they need.
"""

import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import actors
from tests.support.manifests import K8S, ROOT

NOT_SERVED = {"pytest"}
"""In the project's dependencies, but not needed to serve."""

PINNED = re.compile(r"python:3\.11\.\d+-slim-\w+|\S+@sha256:[0-9a-f]{64}")


def instructions() -> list[tuple[str, str]]:
    """(instruction, rest) with continuation lines joined, comments left out."""
    text = re.sub(r"\\\n", " ", (K8S / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines)]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = [(word, rest)]
        elif found:
            found[list(found)[-1]].append((word, rest))
    return found


def lock() -> dict[str, str]:
    return pins(ROOT / "requirements.lock")


def pins(path: Path) -> dict[str, str]:
    """Versions by canonical name; every line must be an exact pin."""
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    found = {}
    for line in lines:
        name, _, version = line.partition("==")
        assert version, f"{path.name}: {line} is no exact pin"
        assert canonicalize_name(name) not in found, f"{path.name}: {name} twice"
        found[canonicalize_name(name)] = version
    return found


def test_bases_are_pinned_and_stages_known() -> None:
    (default,) = [rest for word, rest in instructions() if word == "ARG" and rest.startswith("PYTHON=")]
    assert PINNED.fullmatch(default.removeprefix("PYTHON="))
    known = set(stages())
    for name, (first, *_) in stages().items():
        base = first[1].split()[0]
        assert base == "${PYTHON}" or base in known, f"{name}: {base}"
    assert {"cpu", "cuda"} <= known
    assert "latest" not in (K8S / "Dockerfile").read_text()


def test_what_runs_is_not_root_and_has_no_build_tools() -> None:
    runtime = stages()["runtime"]
    users = [rest for word, rest in runtime if word == "USER"]
    assert len(users) == 1
    assert re.fullmatch(r"[1-9]\d{3,}:[1-9]\d{3,}", users[0]), "numbers: Kubernetes cannot look up a name"
    assert f"--uid {users[0].split(':')[0]}" in " ".join(rest for word, rest in runtime if word == "RUN")
    for target in ("cpu", "cuda"):
        words = [word for word, _ in stages()[target]]
        assert "USER" not in words
        assert "RUN" not in words, "nothing is installed as another user"
        assert stages()[target][0][1].split()[0] == "runtime"


def test_sources_exist_and_are_let_into_the_context() -> None:
    ignored = (K8S / "Dockerfile.dockerignore").read_text().splitlines()
    let_in = {line[1:] for line in ignored if line.startswith("!")}
    assert "*" in ignored
    copied: set[str] = set()
    for word, rest in instructions():
        if word == "COPY" and not rest.startswith("--from="):
            copied |= set(rest.split()[:-1])
    assert copied == let_in
    for source in copied:
        assert (ROOT / source).exists(), source


def test_the_image_has_every_package_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    rooms = {name.split(".")[0] for name in project["tool"]["setuptools"]["packages"]}
    for stage in ("build-cpu", "build-cuda"):
        copied = {rest.split()[0] for word, rest in stages()[stage] if word == "COPY"}
        assert rooms <= copied


def test_both_targets_differ_in_torch_only() -> None:
    cpu, cuda = (stages()[stage][1:] for stage in ("build-cpu", "build-cuda"))
    assert cpu == cuda
    for stage in ("packages-cpu", "packages-cuda"):
        installs = [rest for word, rest in stages()[stage] if word == "RUN" and "pip install" in rest]
        assert len(installs) == 1
        assert "grep '^torch=='" in installs[0]


def test_tags_in_its_comments_are_the_version() -> None:
    tags = re.findall(r"-t octavo:(\S+)", (K8S / "Dockerfile").read_text())
    assert tags == [actors.__version__, f"{actors.__version__}-cuda"]


def test_nothing_names_a_package_index() -> None:
    assert "://" not in (K8S / "Dockerfile").read_text()


def test_the_image_installs_what_serving_needs_in_the_locked_versions() -> None:
    wanted = closure()
    found, locked = pins(K8S / "requirements.txt"), lock()
    assert {name: locked.get(name) for name in found} == found
    shown = "\n".join(sorted(f"{name}=={locked[name]}" for name in wanted))
    assert set(found) == wanted, f"k8s/requirements.txt should be:\n{shown}"


def closure() -> set[str]:
    """Names of all that serving needs: the project's dependencies, and theirs, as the installed packages say."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [Requirement(text) for text in project["dependencies"]]
    todo = [one for one in todo if one.name not in NOT_SERVED] + [Requirement("setuptools")]
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        one = todo.pop()
        key = (canonicalize_name(one.name), frozenset(one.extras))
        if key in seen:
            continue
        seen.add(key)
        for needed in map(Requirement, metadata.requires(one.name) or ()):
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in (*one.extras, "")):
                todo.append(needed)
    return {name for name, _ in seen}


@pytest.mark.timeout(1800)
def test_an_installed_copy_has_its_command_and_all_its_modules(tmp_path: Path) -> None:
    """As in the image: installed, not run from the checkout."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("actors", "cluster", "experiments", "model", "protos"):  # caches come and go: others import meanwhile
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(target), str(source)], check=True, capture_output=True, timeout=900)
    modules = [
        ".".join(path.relative_to(source).with_suffix("").parts)
        for path in source.rglob("*.py")
        if "build" not in path.relative_to(source).parts
    ]
    assert len(modules) > 100
    for module in modules:
        inside = target.joinpath(*module.removesuffix(".__init__").split("."))
        assert inside.with_suffix(".py").is_file() or (inside / "__init__.py").is_file(), module
    environment = {"PYTHONPATH": str(target), "PATH": "/usr/bin:/bin"}
    said = subprocess.run(
        [sys.executable, str(target / "bin" / "octavo"), "--help"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    assert "verify" in said.stdout


@pytest.mark.parametrize("name", ["actors", "cluster", "experiments", "model", "protos"])
def test_no_package_is_forgotten_in_pyproject(name: str) -> None:
    declared = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    for init in (ROOT / name).rglob("__init__.py"):
        assert ".".join(init.parent.relative_to(ROOT).parts) in declared
