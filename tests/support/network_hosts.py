"""Machines that are network namespaces: each has an address, a cable that can be pulled, and a /tmp/ray of its own.

The switch is a bridge in a namespace of its own, so that nothing of the real machine's network is touched. `close`
ends everybody who is in one of the namespaces, and them. Needs root.
"""

import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

SUBNET = "10.231.7"
PATIENCE_S = 120.0
"""For what takes a moment on a machine that has one to spare."""
_CLONE_NEWNET = 0x40000000
_RAY_DIR = Path("/tmp/ray")


class NoNamespaces(Exception):
    """This machine lets nobody make network namespaces; says why."""


class Host:
    """One machine. Commands and calls run as if on it; its files are the real machine's, but for /tmp/ray."""

    def __init__(self, namespace: str, address: str, ray_dir: Path) -> None:
        self.namespace = namespace
        self.address = address
        self._ray_dir = ray_dir
        ray_dir.mkdir(parents=True)
        self._started: list[subprocess.Popen[bytes]] = []
        self._thread = ThreadPoolExecutor(1, initializer=_enter, initargs=(namespace,))

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path, cwd: Path) -> subprocess.Popen[bytes]:
        """Starts a command on this machine."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                self._inside(command), env=env, stdout=output, stderr=subprocess.STDOUT, cwd=cwd, start_new_session=True
            )
        self._started.append(process)
        return process

    def run(self, command: Sequence[str], env: Mapping[str, str], timeout_s: float) -> str:
        """What a command on this machine prints. Raises SubprocessError when its exit status is not 0."""
        done = subprocess.run(
            self._inside(command), env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if done.returncode != 0:
            raise subprocess.SubprocessError(f"{command} ended with {done.returncode}: {done.stderr}")
        return done.stdout

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Calls a function in a thread of this machine: sockets that it opens are this machine's."""
        return self._thread.submit(function)

    def close(self) -> None:
        """Ends the thread, and everybody else who is here."""
        deadline_s = time.monotonic() + PATIENCE_S
        while pids := self._pids():  # one that is killed may have had a child since they were listed
            assert time.monotonic() < deadline_s, f"{pids} do not end"
            for pid in pids:
                _kill(pid)
        for process in self._started:
            process.kill()
            process.wait(PATIENCE_S)
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _pids(self) -> list[int]:
        return [int(pid) for pid in _ip("netns", "pids", self.namespace).split() if int(pid) != os.getpid()]

    def _inside(self, command: Sequence[str]) -> list[str]:
        return ["ip", "netns", "exec", self.namespace, *_apart(self._ray_dir), *command]


class NetworkHosts:
    """`count` machines at one switch, at 10.231.7.1 and so on. Raises NoNamespaces."""

    def __init__(self, count: int, directory: Path) -> None:
        _can()
        tag = f"octavo-{secrets.token_hex(3)}"
        self._switch = f"{tag}-switch"
        self.hosts: list[Host] = []
        self._namespaces: list[str] = []
        try:
            self._add_namespace(self._switch)
            _in(self._switch, "link", "add", "switch", "type", "bridge")
            _in(self._switch, "link", "set", "switch", "up")
            for number in range(1, count + 1):
                self._add_host(f"{tag}-{number}", number, directory / f"host-{number}")
        except BaseException:
            self.close()
            raise

    def pull(self, host: Host) -> None:
        """Takes the cable of a machine out of the switch."""
        _in(self._switch, "link", "set", self._port(host), "down")

    def plug(self, host: Host) -> None:
        """Puts it in again."""
        _in(self._switch, "link", "set", self._port(host), "up")

    def close(self) -> None:
        """Nothing is left: no process, no namespace, no cable (it goes with either end)."""
        for host in self.hosts:
            host.close()
        for namespace in self._namespaces:
            _ip("netns", "del", namespace)
        self._namespaces.clear()

    def _port(self, host: Host) -> str:
        return f"port{self.hosts.index(host) + 1}"

    def _add_namespace(self, namespace: str) -> None:
        _ip("netns", "add", namespace)
        self._namespaces.append(namespace)
        _in(namespace, "link", "set", "lo", "up")

    def _add_host(self, namespace: str, number: int, ray_dir: Path) -> None:
        self._add_namespace(namespace)
        address, port = f"{SUBNET}.{number}", f"port{number}"
        _in(self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _in(self._switch, "link", "set", port, "master", "switch", "up")
        _in(namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _in(namespace, "link", "set", "eth0", "up")
        _in(namespace, "route", "add", "default", "dev", "eth0")  # how Ray finds out its own address
        self.hosts.append(Host(namespace, address, ray_dir))


def _can() -> None:
    if os.geteuid() != 0:
        raise NoNamespaces("network namespaces need root")
    for command in ("ip", "unshare", "mount"):
        if shutil.which(command) is None:
            raise NoNamespaces(f"there is no command {command!r}")
    _RAY_DIR.mkdir(exist_ok=True)
    probe = f"octavo-{secrets.token_hex(3)}-probe"
    try:
        _ip("netns", "add", probe)
        try:
            _in(probe, "link", "add", "one", "type", "veth", "peer", "name", "other")
            _in(probe, "link", "add", "switch", "type", "bridge")
            _ip("netns", "exec", probe, *_apart(_RAY_DIR), "true")
        finally:
            _ip("netns", "del", probe)
    except subprocess.CalledProcessError as error:
        raise NoNamespaces(f"{' '.join(error.cmd)}: {error.stderr.strip()}") from None


def _apart(ray_dir: Path) -> list[str]:
    """What a command is preceded by that has another directory for /tmp/ray."""
    own_tmp = f'mount --bind {ray_dir} {_RAY_DIR} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", own_tmp, "sh"]


def _ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=PATIENCE_S).stdout


def _in(namespace: str, *arguments: str) -> str:
    return _ip("-netns", namespace, *arguments)


def _enter(namespace: str) -> None:
    """Only the calling thread is elsewhere afterwards."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path(f"/run/netns/{namespace}").open("rb") as file:
        if libc.setns(file.fileno(), _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
