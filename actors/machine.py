"""Which machine a process is on, as far as sharing memory goes. Both ends of a wire tell each other in `Attach`."""

import os
import socket
import struct
from pathlib import Path

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid


def machine_id() -> str:
    """Equal for two processes that may share memory and abstract sockets: one boot of a kernel, the same namespaces."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespaces = [Path(f"/proc/self/ns/{kind}") for kind in ("ipc", "net", "user")]
    if not boot.exists() or not all(namespace.exists() for namespace in namespaces):
        return ""
    return "/".join([boot.read_text().strip(), *(str(namespace.readlink()) for namespace in namespaces)])


def same_user(peer: socket.socket) -> bool:
    """Whether this user's process is at the other end of a connected Unix socket: abstract names have no owner."""
    data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(data)[1]
    return uid == os.geteuid()
