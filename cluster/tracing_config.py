"""Where a cluster's spans are sent: a part of `cluster.config`."""

import re
from dataclasses import dataclass

from cluster.config_error import ConfigError
from cluster.scaling_config import ScalingConfig

_URL = re.compile(r"https?://[A-Za-z0-9._%:\[\]-]+(/[A-Za-z0-9._~%/-]*)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class TracingConfig(ScalingConfig):
    """`otlp_endpoint` is the base URL of an OpenTelemetry collector (OTLP over HTTP), to which spans of requests go.

    Without it OpenTelemetry's own variables decide.
    """

    otlp_endpoint: str | None = None

    def check_tracing(self) -> None:
        """Raises ConfigError, without the URL: a password put into it by mistake shall not stand in a log."""
        url = self.otlp_endpoint
        if url is not None and (not isinstance(url, str) or not _URL.fullmatch(url)):
            raise ConfigError("otlp_endpoint must be an http or https URL without user, password and query")
