"""Volumes and a network for pods that run in containers here, and a pod by itself; see `tests.support.pods`."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import write_mixtral
from tests.support.manifests import cluster_args, groups, of_kind, overlay, ray_container
from tests.support.network_hosts import Host, NetworkHosts, NoNamespaces
from tests.support.pki import make_pki
from tests.support.pods import Pod
from tests.support.tokenizers import write_byte_tokenizer

Image = tuple[Path, dict[str, Any]]
USER = 10001


def make_volumes(directory: Path, name: str) -> dict[str, Path]:
    """What claims, Secrets and ConfigMaps of the overlay would be, as a kubelet lays them out."""
    claim, tls, config = (directory / kind for kind in ("claim", "tls", "config"))
    at = claim / Path(cluster_args(name)["model"]).relative_to("/models")
    at.mkdir(parents=True)
    write_mixtral(at, layers=2, experts=4, dtype=torch.float16)
    write_byte_tokenizer(at)
    for path in (claim, *claim.rglob("*")):
        path.chmod(0o775 if path.is_dir() else 0o664)
        _give(path)
    pki = make_pki(directory / "pki", names=(cluster_args(name)["tls_server_name"],))
    tls.mkdir()
    for file, source in {"tls.crt": "node.crt", "tls.key": "node.key", "ca.crt": "ca.crt"}.items():
        (tls / file).write_bytes((pki / source).read_bytes())
        (tls / file).chmod(0o440)
        _give(tls / file)
    config.mkdir()
    (held,) = [one for one in of_kind(overlay(name), "ConfigMap") if "serve-config" in one["metadata"]["name"]]
    for file, text in held["data"].items():
        (config / file).write_text(text)
    return {"models": claim, "tls": tls, "config": config}


def _give(path: Path) -> None:
    os.chown(path, 0, USER)  # as fsGroup does


@contextmanager
def network(count: int, directory: Path) -> Iterator[list[Host]]:
    """So many machines in a network; skips the test where there can be none."""
    try:
        made = NetworkHosts(count, directory)
    except NoNamespaces as error:
        pytest.skip(str(error))
    try:
        yield made.hosts
    finally:
        made.close()


@contextmanager
def one_pod(group: str, image: Image, directory: Path) -> Iterator[Pod]:
    """A pod of that group by itself, not started."""
    volumes = make_volumes(directory, "cpu-demo")
    with network(1, directory) as (host,):
        pod = Pod(f"{group}-alone", host, groups("cpu-demo")[group], image, volumes, directory / "pods")
        try:
            yield pod
        finally:
            pod.kill()


def say(pod: Pod, script: str) -> "subprocess.CompletedProcess[str]":
    """What a script says in a container like the pod's own."""
    return pod.run_once({**ray_container(pod.group), "name": "say", "command": ["bash", "-c", script]})


def make_manifest(pod: Pod) -> None:
    """`octavo verify --make`, once, in a pod that may write there: the README's third step."""
    (verify,) = pod.spec["initContainers"]
    without = pod.run_once({**verify, "name": "too-early"})
    assert (without.returncode, "has no manifest" in without.stderr) == (1, True), without
    command = ["octavo", "verify", "--make", verify["command"][-1]]
    made = pod.run_once({**verify, "name": "make", "command": command}, writable=("models",))
    assert made.returncode == 0, made.stderr
