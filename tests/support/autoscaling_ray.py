"""A Ray whose own autoscaler makes nodes appear and go: on one machine, each node a raylet with its processes.

The provider is Ray's fake one, as in `ray.cluster_utils.AutoscalingCluster`; that one ends every Ray of the machine,
this one its own. Everything else is real: the head, autoscaler v2, its requests, its idle timeout.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
from ray._private.services import get_node_ip_address
from ray.autoscaler._private.fake_multi_node.node_provider import (
    FAKE_HEAD_NODE_ID,
    FAKE_HEAD_NODE_TYPE,
    FakeMultiNodeProvider,
)

from actors import ray_runtime
from tests.support.served_cluster import WITH_PARENT, free_port

OBJECT_STORE_BYTES = 128 * 1024 * 1024
START_TIMEOUT_S = 180.0
STARTS = 3
"""Ray gives its own processes 30 s, which a busy machine may need more than once."""


class AutoscalingRay:
    """A head without CPUs but with the resources of `head`, and up to `max_workers` nodes like `worker`.

    Each of these is gone when it was idle for `idle_timeout_s`.
    """

    def __init__(
        self, worker: Mapping[str, float], *, head: Mapping[str, float], max_workers: int, idle_timeout_s: float
    ) -> None:
        self._home = tempfile.TemporaryDirectory(prefix="octavo-ray-")
        ensure_token_if_auth_enabled(None, create_token_if_missing=True)
        self.address = f"{get_node_ip_address()}:{free_port()}"
        config = Path(self._home.name) / "autoscaler.json"
        config.write_text(json.dumps(_config(self.address, worker, max_workers, idle_timeout_s)))
        self.log = Path(self._home.name) / "ray.log"
        command = _command(self.address, config, head)
        for _ in range(STARTS):
            if self._starts(command):
                return
            self._end_processes()
        shown = self.log.read_text(errors="replace")
        self.close()
        raise AssertionError(f"Ray's head did not start:\n{shown}")

    def _starts(self, command: list[str]) -> bool:
        with self.log.open("wb") as log:
            self._head = subprocess.Popen(command, env=os.environ | _ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while "Ray runtime started" not in self.log.read_text(errors="replace"):
            if self._head.poll() is not None or time.monotonic() > deadline_s:
                return False
            time.sleep(0.1)
        return True

    def close(self) -> None:
        """Ends the head, the autoscaler and every node that it made."""
        self._end_processes()
        ray_runtime.forget(self.address)  # or whoever looks for a Ray on this machine waits for this one
        self._home.cleanup()

    def _end_processes(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            head = psutil.Process(self._head.pid)
            for monitor in (one for one in head.children() if _is_monitor(one)):
                monitor.suspend()  # so that it makes no node while the others are counted
            ours = head.children(recursive=True)
            for one in (*ours, head):
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(ours, timeout=60)
        self._head.wait(60)


# The head's id and its instance's are the same fixed one in Ray's fake provider.
_ENVIRONMENT = {
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


_NOTHING = (
    *("setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"),
    *("head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"),
)
"""What the autoscaler would do on a new machine; here there is none."""


def _is_monitor(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return any(part.endswith(("autoscaler/v2/monitor.py", "monitor.py")) for part in process.cmdline())
    return False


def _command(address: str, config: Path, resources: Mapping[str, float]) -> list[str]:
    return [
        *(sys.executable, str(WITH_PARENT)),
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={address.rpartition(':')[2]}", f"--autoscaling-config={config}"),
        *("--include-dashboard=false", f"--ray-client-server-port={free_port()}", "--num-cpus=0"),
        f"--resources={json.dumps(dict(resources))}",
        *("--min-worker-port=0", "--max-worker-port=0", f"--object-store-memory={OBJECT_STORE_BYTES}"),
    ]


def _config(address: str, worker: Mapping[str, float], max_workers: int, idle_timeout_s: float) -> dict[str, Any]:
    return {
        "cluster_name": "octavo-test",
        "max_workers": max_workers,
        "idle_timeout_minutes": idle_timeout_s / 60,
        "provider": {
            "type": "external",  # by its own name it wants a file that Ray's wheel does not have
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
        },
        "auth": {},
        "file_mounts": {},
        **{name: [] for name in _NOTHING},
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "expert": {
                "resources": {"object_store_memory": OBJECT_STORE_BYTES, **worker},
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_workers,
            },
        },
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "upscaling_speed": 1.0,
    }
