"""Puts `actors.front.bounded_http` and `actors.front.proxy_hold` into Ray Serve's HTTP proxy, which is a process of its
own in front of the ingress.

Serve's proxy calls `middlewares` when it starts, where `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` says
"actors.front.proxy_guard:middlewares" in the environment that Ray was started with. Serve has no option for the
protocol; uvicorn takes the class that this module puts where it looks for the default one. The bounds in time may be
set there too, in seconds: `OCTAVO_HTTP_HEAD_S` and `OCTAVO_HTTP_WRITE_S`. With `OCTAVO_TELL_REFUSER=1` a refusal for
overload says who made it, for those who look for the slow ones.

The proxy obeys some headers of anybody's: one has it ignore that a client left, others change its time-outs and
routing, and text in them that is no UTF-8 is answered with 500. Those do not get that far.
"""

import os
import re
from collections.abc import Mapping

import uvicorn.protocols.http.auto
from starlette.middleware import Middleware

from actors.front.body_ahead import BodyAhead
from actors.front.bounded_http import HEAD_S, WRITE_S, BoundedHttp
from actors.front.proxy_hold import PRIVATE, HoldingProxy

HEAD_VARIABLE = "OCTAVO_HTTP_HEAD_S"
WRITE_VARIABLE = "OCTAVO_HTTP_WRITE_S"
TELL_VARIABLE = "OCTAVO_TELL_REFUSER"
CALLBACK_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
CALLBACK = "actors.front.proxy_guard:middlewares"

_SERVES = frozenset(
    {b"x-request-disconnect-disabled", b"x-request-timeout-seconds", b"serve-multiplexed-model-id", b"x-session-id"}
)
_REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,256}")


class ProxyHttp(BoundedHttp):
    """What Serve's proxy speaks."""

    def on_header(self, name: bytes, value: bytes) -> None:
        """Leaves out what only the proxy itself would obey or say, and request ids that it could not read."""
        known = name.lower().replace(b"_", b"-")
        if known in _SERVES or known in PRIVATE or (known == b"x-request-id" and not _REQUEST_ID.fullmatch(value)):
            return
        super().on_header(name, value)


def middlewares() -> list[Middleware]:
    """What refuses for the ingresses; the protocol is in force for servers that are made after this call.

    Raises ValueError.
    """
    uvicorn.protocols.http.auto.AutoHTTPProtocol = protocol(os.environ)
    tells_refuser = os.environ.get(TELL_VARIABLE) == "1"
    return [Middleware(BodyAhead), Middleware(HoldingProxy, tells_refuser=tells_refuser)]  # the last is the outermost


def is_guarded(environ: Mapping[str, str]) -> bool:
    """True where this Ray's proxies were told to call `middlewares`."""
    return environ.get(CALLBACK_VARIABLE) == CALLBACK


def protocol(environ: Mapping[str, str]) -> type[ProxyHttp]:
    """The protocol with the bounds that `environ` sets. Raises ValueError naming the variable."""
    bounds = {"head_s": _seconds(environ, HEAD_VARIABLE, HEAD_S), "write_s": _seconds(environ, WRITE_VARIABLE, WRITE_S)}
    return type("ProxyHttp", (ProxyHttp,), bounds)


def _seconds(environ: Mapping[str, str], variable: str, default: float) -> float:
    text = environ.get(variable, "")
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86_400:
        raise ValueError(f"{variable} is {text!r}, but must be more than 0 and at most 86400 seconds")
    return seconds
