"""Pods of a RayService as a kubelet would run them: real containers (runc) from the manifest's own pod template.

User, capabilities, seccomp, read-only root, volumes, memory limits, init containers, probes and preStop are the
manifest's; the command and the variables are what KubeRay adds. A pod's network is a namespace of `network_hosts`.
Not here: scheduling, the Service, and network policies.
"""

import json
import os
import platform
import resource
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx2 as httpx

from tests.support.manifests import Object, quantity, ray_container
from tests.support.network_hosts import Host

SECCOMP = Path("/usr/share/containers/seccomp.json")
"""The default profile of containers (Debian: golang-github-containers-common, which buildah brings)."""

_MASKED = ("/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/sys/firmware")
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")


class Pod:
    """One pod. `volumes` are the directories of its claims, Secrets and ConfigMaps, by the volume's name."""

    def __init__(
        self,
        name: str,
        host: Host,
        group: Object,
        image: tuple[Path, Mapping[str, Any]],
        volumes: Mapping[str, Path],
        directory: Path,
    ) -> None:
        self.name = name
        self.host = host
        self.group = group
        self.spec: Object = group["template"]["spec"]
        self._rootfs, self._image = image
        self._directory = directory / name
        self._volumes = dict(volumes) | self._empty_dirs()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """Output of the main container."""
        return self._directory / "log"

    def init(self) -> None:
        """Runs the init containers of the manifest, one after another; each must succeed."""
        for container in self.spec.get("initContainers", ()):
            done = self.run_once(container)
            assert done.returncode == 0, f"{self.name}: {container['name']}\n{done.stdout}\n{done.stderr}"

    def wait_for_head(self, head_address: str, env: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
        """What KubeRay puts before a worker: asks for Ray's head until it answers, in 256 MiB."""
        limits = {"memory": "256Mi"}
        ask = f"until ray health-check --address {head_address}:6379; do sleep 1; done"
        own = [*ray_container(self.group)["env"], *({"name": name, "value": value} for name, value in env.items())]
        return self.run_once(
            {
                **ray_container(self.group),
                "name": "wait-gcs-ready",
                "command": ["/bin/bash", "-c", "--", ask],
                "env": own,
                "resources": {"limits": limits, "requests": limits},
            }
        )

    def run_once(self, container: Object, writable: Sequence[str] = ()) -> "subprocess.CompletedProcess[str]":
        """Runs a container of this pod to its end. Volumes named in `writable` are, whatever the manifest says."""
        name = f"{self.name}-{container['name']}"
        bundle = self._bundle(container, container["command"], {}, writable)
        return subprocess.run(
            ["runc", "run", "--bundle", str(bundle), name], capture_output=True, text=True, timeout=300, check=False
        )

    def start(self, ray_start: str, env: Mapping[str, str]) -> None:
        """Starts the main container as KubeRay does: `ray start` in a shell, with more variables."""
        command = ["/bin/bash", "-c", "--", f"ulimit -n 65536; {ray_start}"]
        bundle = self._bundle(ray_container(self.group), command, env)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                ["runc", "run", "--bundle", str(bundle), self.name],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def exec(self, command: Sequence[str], timeout_s: float = 120) -> "subprocess.CompletedProcess[str]":
        """Runs a command in the main container, as `kubectl exec`."""
        return subprocess.run(
            ["runc", "exec", self.name, *command], capture_output=True, text=True, timeout=timeout_s, check=False
        )

    def passes(self, kind: str) -> bool:
        """Whether a probe of the main container succeeds now; `kind` is readinessProbe, …"""
        container = ray_container(self.group)
        probe = container[kind]
        if "exec" in probe:
            return self.exec(probe["exec"]["command"]).returncode == 0
        asked = probe["httpGet"]
        (port,) = [one["containerPort"] for one in container["ports"] if one["name"] == asked["port"]]
        url = f"http://{self.host.address}:{port}{asked['path']}"
        return self.host.call(lambda: _answers(url, probe["timeoutSeconds"])).result(60)

    def is_running(self) -> bool:
        """Whether the main container runs."""
        return self._process is not None and self._process.poll() is None

    def end(self) -> tuple[float, float, str]:
        """preStop, SIGTERM and, when its patience ends, SIGKILL; seconds that preStop and the rest took, and its words.

        As by a kubelet: all within terminationGracePeriodSeconds.
        """
        assert self._process is not None
        grace_s = float(self.spec["terminationGracePeriodSeconds"])
        began_s = time.monotonic()
        hook = self.exec(ray_container(self.group)["lifecycle"]["preStop"]["exec"]["command"], grace_s)
        hooked_s = time.monotonic()
        subprocess.run(["runc", "kill", self.name, "TERM"], check=False, capture_output=True)
        try:
            self._process.wait(max(1.0, began_s + grace_s - hooked_s))
        except subprocess.TimeoutExpired:
            self.kill()
        return hooked_s - began_s, time.monotonic() - hooked_s, hook.stdout + hook.stderr

    def kill(self) -> None:
        """SIGKILL to all of it."""
        subprocess.run(["runc", "delete", "--force", self.name], check=False, capture_output=True)
        if self._process is not None:
            self._process.wait(30)

    def memory_bytes(self) -> int:
        """The working set, as a kubelet counts it: all that is charged to the pod but files that nobody uses now."""
        said = subprocess.run(["runc", "events", "--stats", self.name], capture_output=True, text=True, check=True)
        memory = json.loads(said.stdout)["data"]["memory"]
        unused = memory["raw"].get("total_inactive_file", memory["raw"].get("inactive_file", 0))
        return int(memory["usage"]["usage"]) - int(unused)

    def used_bytes(self, volume: str) -> int:
        """Size of an emptyDir on disk."""
        said = subprocess.run(["du", "-sb", str(self._volumes[volume])], capture_output=True, text=True, check=False)
        return int(said.stdout.split()[0])

    def _empty_dirs(self) -> dict[str, Path]:
        made = {}
        for volume in self.spec["volumes"]:
            empty = volume.get("emptyDir")
            if empty is not None and empty.get("medium") != "Memory":
                made[volume["name"]] = path = self._directory / volume["name"]
                path.mkdir(parents=True)
                os.chown(path, 0, self.spec["securityContext"]["fsGroup"])
                path.chmod(0o2777)
        return made

    def _bundle(
        self, container: Object, command: Sequence[str], env: Mapping[str, str], writable: Sequence[str] = ()
    ) -> Path:
        bundle = self._directory / f"bundle-{container['name']}"
        shutil.rmtree(bundle, ignore_errors=True)
        bundle.mkdir(parents=True)
        config = {
            "ociVersion": "1.0.2",
            "hostname": self.name,
            "root": {"path": str(self._rootfs), "readonly": container["securityContext"]["readOnlyRootFilesystem"]},
            "process": self._process_config(container, command, env),
            "mounts": [*_SYSTEM_MOUNTS, *(self._mount(one, writable) for one in container["volumeMounts"])],
            "linux": self._linux(container),
        }
        (bundle / "config.json").write_text(json.dumps(config))
        return bundle

    def _process_config(self, container: Object, command: Sequence[str], env: Mapping[str, str]) -> Object:
        security, pod = container["securityContext"], self.spec["securityContext"]
        assert security["capabilities"] == {"drop": ["ALL"]}, "others are not rehearsed here"
        own = {one["name"]: one["value"] for one in container.get("env", ()) if "value" in one}
        image = dict(one.split("=", 1) for one in self._image["Env"])
        return {
            "user": {"uid": pod["runAsUser"], "gid": pod["runAsGroup"], "additionalGids": [pod["fsGroup"]]},
            "args": list(command),
            "env": [f"{name}={value}" for name, value in {**image, **own, **env}.items()],
            "cwd": self._image["WorkingDir"],
            "capabilities": {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")},
            "noNewPrivileges": not security["allowPrivilegeEscalation"],
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": min(1 << 20, _most_files()), "soft": 1024}],
        }

    def _mount(self, mount: Object, writable: Sequence[str]) -> Object:
        name = mount["name"]
        (volume,) = [one for one in self.spec["volumes"] if one["name"] == name]
        if volume.get("emptyDir", {}).get("medium") == "Memory":
            size = int(quantity(volume["emptyDir"]["sizeLimit"]))
            options = ["nosuid", "nodev", "mode=1777", f"size={size}"]
            return {"destination": mount["mountPath"], "type": "tmpfs", "source": name, "options": options}
        access = "ro" if mount.get("readOnly") and name not in writable else "rw"
        source = str(self._volumes[name])
        return {"destination": mount["mountPath"], "type": "bind", "source": source, "options": ["rbind", access]}

    def _linux(self, container: Object) -> Object:
        limit = int(quantity(container["resources"]["limits"]["memory"]))
        assert self.spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        return {
            "cgroupsPath": f"/octavo-check/{self.name}-{container['name']}",
            "namespaces": [
                *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                {"type": "network", "path": f"/run/netns/{self.host.namespace}"},
            ],
            "resources": {"memory": {"limit": limit, "swap": limit}},
            "seccomp": default_seccomp(),
            "maskedPaths": list(_MASKED),
            "readonlyPaths": list(_READ_ONLY),
        }


_SYSTEM_MOUNTS: tuple[Object, ...] = (
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=65536k"]},
    {
        "destination": "/dev/pts",
        "type": "devpts",
        "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
    },
    {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts", "options": ["rbind", "ro"]},
)


def _most_files() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def default_seccomp() -> Object:
    """The runtime's default profile, for a process without any capability, on this processor."""
    profile = json.loads(SECCOMP.read_text())
    machine = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]

    def applies(rule: Object) -> bool:
        includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
        return (
            not includes.get("caps")
            and machine in includes.get("arches", [machine])
            and machine not in excludes.get("arches", ())
        )

    rules = [
        {key: rule[key] for key in ("names", "action", "args", "errnoRet") if rule.get(key) is not None}
        for rule in profile["syscalls"]
        if applies(rule)
    ]
    (arch,) = [one for one in profile["archMap"] if one["architecture"] == f"SCMP_ARCH_{platform.machine().upper()}"]
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile["defaultErrnoRet"],
        "architectures": [arch["architecture"], *arch["subArchitectures"]],
        "syscalls": rules,
    }


def _answers(url: str, timeout_s: float) -> bool:
    try:
        return bool(200 <= httpx.get(url, timeout=timeout_s).status_code < 400)
    except httpx.HTTPError:
        return False
