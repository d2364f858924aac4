"""What a Ray that `octavo serve` starts on one machine is told by its environment; what is set already stays.

Starting it is `actors.ray_runtime`'s. A Ray that somebody else started was told what it was told.
"""

from collections.abc import MutableMapping

HTTP_PROXY_CALLBACK = "actors.front.proxy_guard:middlewares"
"""Serve's proxy calls it when it starts, and gets bounds that it lacks."""

ONE_LOOP = ("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP")
"""With 0 an ingress and the proxy's router run on their process's own event loop: each message of a request and of its
answer would change threads twice otherwise, and pieces that are there together would be sent one by one."""


def tell(environ: MutableMapping[str, str]) -> None:
    """Sets what is not set yet; before Ray is started, whose processes inherit it."""
    environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray's workers are nice to everybody else by default; here they are what the machine is for.
    environ.setdefault("RAY_worker_niceness", "0")
    # Serve replaces an HTTP proxy after three checks have failed: of a killed one they fail at once.
    environ.setdefault("RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "1")
    environ.setdefault("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", HTTP_PROXY_CALLBACK)
    for variable in ONE_LOOP:
        environ.setdefault(variable, "0")
    # An ingress listens for it anyway, behind Ray's token. Only here, on one machine: of a machine that is gone without
    # a word Serve's channel would learn after minutes.
    environ.setdefault("RAY_SERVE_PROXY_USE_GRPC", "1")
