"""What an operator may choose about who may ask over HTTP: a part of `ClusterConfig`."""

import re
from dataclasses import dataclass, field

from cluster.config_error import ConfigError
from cluster.tracing_config import TracingConfig

_KEY = re.compile(r"[\x21-\x7e]{16,512}")
_ORIGIN = re.compile(r"\*|https?://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessConfig(TracingConfig):
    """The fields. None of the keys given: everybody who reaches the HTTP port is let in.

    `api_keys_file` has keys' hashes and limits (`octavo keys new` writes entries); it is read again when it changes,
    and must be at that path on every node with an ingress. `api_key` is one more key, without limits, under the name
    `default`; it never appears in the repr, and the command line takes it from the environment only. Limits are each
    ingress's own: with n ingresses a key may use up to n times as much.

    `cors_origins` are the origins, separated by commas, of the browser pages that may ask; "*" is all. Without it none
    may.
    """

    api_keys_file: str | None = None
    api_key: str | None = field(default=None, repr=False)
    cors_origins: str | None = None

    @property
    def needs_key(self) -> bool:
        """True where HTTP asks for a key."""
        return self.api_keys_file is not None or self.api_key is not None

    @property
    def origins(self) -> tuple[str, ...]:
        """`cors_origins` as a list."""
        return tuple(one.strip() for one in (self.cors_origins or "").split(",") if one.strip())

    def check_access(self) -> None:
        """Raises ConfigError."""
        self.check_tracing()
        for name in ("api_keys_file", "cors_origins"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value.strip()):
                raise ConfigError(f"{name} is {value!r}, but must be a text that is not empty")
        if self.api_key is not None and (not isinstance(self.api_key, str) or not _KEY.fullmatch(self.api_key)):
            raise ConfigError("api_key must have 16 to 512 characters, all of them printable ASCII without spaces")
        for one in self.origins:
            if not _ORIGIN.fullmatch(one):
                raise ConfigError(f"cors_origins has {one!r}, but each must be as https://example.com:8443, or *")
