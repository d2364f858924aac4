"""`octavo status`: finds the running cluster and asks its supervisor."""

from actors import ray_runtime
from actors.command.cache_dir import user_cache_dir
from actors.command.local_record import LocalRecord
from actors.ray_runtime import RuntimeFailure
from actors.supervision.client import find_supervisor
from actors.supervision.status import ClusterStatus


def current_status(address: str | None, namespace: str) -> ClusterStatus:
    """The status of the cluster at `address`, or of the one that this user runs on this machine."""
    where = address or LocalRecord(user_cache_dir()).read().get("ray_address") or "auto"
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
        return supervisor.status()
    finally:
        ray_runtime.disconnect()
