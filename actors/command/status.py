"""Finds the running cluster and asks its supervisor: `octavo status`, and all commands that need one."""

from collections.abc import Callable
from typing import TypeVar

from actors import ray_runtime
from actors.command.cache_dir import user_cache_dir
from actors.command.local_record import LocalRecord
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import SupervisorClient, find_supervisor
from actors.supervision.status import ClusterStatus

Answer = TypeVar("Answer")


def current_status(address: str | None, namespace: str) -> ClusterStatus:
    """The status of the cluster at `address`, or of the one that this user runs on this machine."""
    return with_supervisor(address, namespace, lambda supervisor: supervisor.status())


def with_supervisor(address: str | None, namespace: str, ask: Callable[[SupervisorClient], Answer]) -> Answer:
    """What `ask` returns of the supervisor of that cluster. Raises RuntimeFailure when there is none."""
    where = where_is(address)
    try:
        ray_runtime.connect(where, namespace)
    except RuntimeFailure:
        if where != "auto":
            raise
        raise RuntimeFailure("no octavo cluster runs here: start one with `octavo serve`, or give --address") from None
    try:
        supervisor = find_supervisor(namespace)
        if supervisor is None:
            raise RuntimeFailure(f"no octavo cluster named {namespace!r} runs at {where}")
        return ask(supervisor)
    finally:
        ray_runtime.disconnect()


def where_is(address: str | None) -> str:
    """Where Ray is: at `address`, where this user's cluster on this machine is, or wherever Ray finds one."""
    return address or LocalRecord(user_cache_dir()).read().get("ray_address") or "auto"
