"""Whether this process makes spans, and where they go: the configuration first, then OpenTelemetry's own variables.

OpenTelemetry is imported only where it does. What is made of it is `actors.tracing.tracer`'s work.
"""

import importlib.util
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING

from actors import __version__
from cluster.config import ClusterConfig, ConfigError

if TYPE_CHECKING:
    from actors.tracing.tracer import Tracer

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOL_VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def is_traced(config: ClusterConfig, environ: Mapping[str, str] = os.environ) -> bool:
    """True where spans are made. Raises ConfigError where they are wanted in a way that cannot be."""
    wanted = config.otlp_endpoint is not None or any(environ.get(name) for name in ENDPOINT_VARIABLES)
    if not wanted or environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    for name in PROTOCOL_VARIABLES:
        if environ.get(name, PROTOCOL) != PROTOCOL:
            raise ConfigError(f"{name} is {environ[name]!r}, but spans are sent only by {PROTOCOL}")
    if not _is_installed():
        raise ConfigError(
            "otlp_endpoint or an OTEL_EXPORTER_OTLP variable is set, but OpenTelemetry's exporter is not installed: "
            "pip install 'octavo[otel]'"
        )
    return True


def open_tracer(
    config: ClusterConfig, role: str, instance: str, environ: Mapping[str, str] = os.environ
) -> "Tracer | None":
    """The tracer of a process that is an ingress or a coordinator; None where spans are off. Raises ConfigError."""
    if not is_traced(config, environ):
        return None
    from actors.tracing.tracer import Tracer

    resource = {
        "service.name": environ.get("OTEL_SERVICE_NAME") or f"octavo-{role}",
        "service.namespace": config.namespace,
        "service.instance.id": instance,
        "service.version": __version__,
    }
    return Tracer.to(config.otlp_endpoint, resource)


def process_name() -> str:
    """A name for this process among all of a cluster."""
    return f"{socket.gethostname()}-{os.getpid()}"


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec(EXPORTER) is not None
    except ModuleNotFoundError:
        return False
