"""All that this house sets on gRPC: options, message limits, credentials, the bearer token, health, reflection.

Servers and clients are made here and nowhere else, so that one side never allows what the other refuses. What
is said over a channel is the business of the services and of `actors.dispatch.transport`.

Every call needs the token: health and reflection too, because even their small messages are parsed, and
nothing of a stranger's is parsed here. A probe that cannot send a header must therefore go through the
command line or Ray.
"""

import hmac
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from actors.client_tokens import TOKEN_KEY, ClientTokens
from actors.port_limits import EXPERT_PORT, PortLimits
from protos.limits import MAX_MESSAGE_BYTES

HANDSHAKE_S = 10
"""Who has connected and not said so far what HTTP/2 begins with is turned away."""

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

# Bit set of compression algorithms: a compressed message could grow past its limit while it is read.
_ONLY_IDENTITY = 1

_SHARED_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", _ONLY_IDENTITY),
    # A peer that is frozen, or behind a dead network, is noticed after at most ten seconds.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)
_SERVER_OPTIONS = (
    *_SHARED_OPTIONS,
    ("grpc.so_reuseport", 0),  # a second server on the same port must fail, not share it
    ("grpc.http2.min_ping_interval_without_data_ms", 1_000),
    ("grpc.http2.bdp_probe", 0),  # it would widen every stream's window as far as the network goes
    ("grpc.http2.max_frame_size", 1 << 20),  # the probe widened frames too
)
_CLIENT_OPTIONS = (
    *_SHARED_OPTIONS,
    ("grpc.enable_http_proxy", 0),  # peers are never behind the environment's web proxy
    ("grpc.use_local_subchannel_pool", 1),  # a new channel starts without an old one's back-off
    ("grpc.enable_retries", 0),  # retries are counted where the rows are: actors.dispatch.remote_experts
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)


class ChannelError(Exception):
    """A server that could not listen, or credentials that cannot be used; the message names what and why."""


@dataclass(frozen=True, slots=True)
class WireCredentials:
    """The bearer token of a cluster and, for TLS, paths of PEM files; the repr shows no token.

    Certificate and key switch TLS on. With `tls_ca` both sides present a certificate signed by it (mutual
    TLS); without, clients check the server against the system's authorities. `tls_server_name` is the name that a
    server's certificate must have, instead of the address that was called; it needs `tls_ca`.
    """

    token: str = field(repr=False)
    tls_cert: str | None = None
    tls_key: str | None = None
    tls_ca: str | None = None
    tls_server_name: str | None = None

    def __post_init__(self) -> None:
        if not self.token or not self.token.isascii() or not self.token.isprintable():
            raise ChannelError("auth_token must be printable ASCII and not empty")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ChannelError("tls_cert and tls_key must be given together")
        if self.tls_ca is not None and self.tls_cert is None:
            raise ChannelError("tls_ca needs tls_cert and tls_key")
        if self.tls_server_name is not None and self.tls_ca is None:
            raise ChannelError("tls_server_name needs tls_ca")

    def for_server(self) -> grpc.ServerCredentials | None:
        """TLS for a listening port, None when TLS is off. Raises ChannelError for an unreadable file."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        pair = (_read("tls_key", self.tls_key), _read("tls_cert", self.tls_cert))
        ca = None if self.tls_ca is None else _read("tls_ca", self.tls_ca)
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)

    def for_client(self) -> grpc.ChannelCredentials | None:
        """TLS for an outgoing channel, None when TLS is off. Raises ChannelError for an unreadable file."""
        if self.tls_cert is None or self.tls_key is None:
            return None
        if self.tls_ca is None:
            return grpc.ssl_channel_credentials()
        key, certificate = _read("tls_key", self.tls_key), _read("tls_cert", self.tls_cert)
        return grpc.ssl_channel_credentials(_read("tls_ca", self.tls_ca), key, certificate)


@dataclass(frozen=True, slots=True)
class ClientAccess:
    """Clients beside the cluster's own, and the methods ("/octavo.CoordinatorService/Generate") that they may call."""

    tokens: ClientTokens
    methods: frozenset[str]


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Ends a call without the right token before a byte of its messages is read.

    `rejected` counts them, and those of clients who called what is not theirs.
    """

    def __init__(self, token: str, clients: ClientAccess | None = None) -> None:
        self._expected = f"Bearer {token}".encode()
        self._clients = clients
        self._rejecter: Handler = grpc.stream_stream_rpc_method_handler(_reject)
        self._denier: Handler = grpc.stream_stream_rpc_method_handler(_deny)
        self.rejected = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler:
        """Looks at the header only; the comparison takes the same time for every wrong token."""
        for key, value in handler_call_details.invocation_metadata:
            if key == TOKEN_KEY:
                given = value if isinstance(value, bytes) else value.encode(errors="replace")
                if hmac.compare_digest(given, self._expected):
                    return await continuation(handler_call_details)
        known = self._clients is not None and self._clients.tokens.who(handler_call_details.invocation_metadata)
        if known and self._clients is not None and handler_call_details.method in self._clients.methods:
            return await continuation(handler_call_details)
        self.rejected += 1
        return self._denier if known else self._rejecter


class GrpcServer:
    """A listening server and its health. `address` is `host:port` with the port it really got."""

    def __init__(
        self,
        server: grpc.aio.Server,
        service: str,
        host: str,
        port: int,
        health_servicer: Any,
        gate: TokenInterceptor,
    ) -> None:
        self._server = server
        self._gate = gate
        self._service = service
        self._health = health_servicer
        self.port = port
        self.address = join_address(host, port)

    @property
    def rejected(self) -> int:
        """Calls that were ended for their token, unread."""
        return self._gate.rejected

    async def set_serving(self, serving: bool) -> None:
        """Answers health checks, of the service and of the whole server, with SERVING or NOT_SERVING."""
        kinds = health_pb2.HealthCheckResponse
        status = kinds.SERVING if serving else kinds.NOT_SERVING
        await self._health.set(self._service, status)
        await self._health.set("", status)

    async def stop(self, grace_s: float) -> None:
        """Accepts nothing new, lets running calls end for `grace_s` seconds, then cuts them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def serve_grpc(
    register: Callable[[grpc.aio.Server], None],
    *,
    service: str,
    host: str,
    port: int,
    credentials: WireCredentials,
    serving: bool = True,
    clients: ClientAccess | None = None,
    limits: PortLimits = EXPERT_PORT,
) -> GrpcServer:
    """Starts a server with what `register` adds, plus health and reflection, all behind the token.

    `clients` may call what is named there with tokens of their own. `limits` bound what peers make it hold.
    `service` is the full name, e.g. `octavo.ExpertService`. Port 0 takes a free one. Raises ChannelError when
    the address cannot be bound or a TLS file cannot be read.
    """
    gate = TokenInterceptor(credentials.token, clients)
    server = grpc.aio.server(
        interceptors=[gate],
        options=(*_SERVER_OPTIONS, *_limiting(limits)),
        maximum_concurrent_rpcs=limits.calls,
        compression=grpc.Compression.NoCompression,
    )
    register(server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    reflection.enable_server_reflection((service, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    bound = _bind(server, join_address(host, port), credentials.for_server())
    running = GrpcServer(server, service, host, bound, health_servicer, gate)
    await running.set_serving(serving)
    await server.start()
    return running


def _limiting(limits: PortLimits) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_S * 1000),
        ("grpc.max_concurrent_streams", limits.streams),
        ("grpc.http2.lookahead_bytes", limits.window_bytes),
    )


def open_channel(address: str, credentials: WireCredentials) -> grpc.aio.Channel:
    """A channel to `host:port` whose every call carries the token. It connects by itself, with capped back-off.

    Make it inside a running event loop. A call that passes its own `metadata` replaces the token. Raises
    ChannelError for an unreadable TLS file.
    """
    secret = credentials.for_client()
    if secret is None:
        inner = grpc.aio.insecure_channel(address, _CLIENT_OPTIONS, grpc.Compression.NoCompression)
    else:
        name = credentials.tls_server_name
        options = _CLIENT_OPTIONS if name is None else (*_CLIENT_OPTIONS, ("grpc.ssl_target_name_override", name))
        inner = grpc.aio.secure_channel(address, secret, options, grpc.Compression.NoCompression)
    return _TokenChannel(inner, credentials.token)


def join_address(host: str, port: int) -> str:
    """`host:port`, with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class _TokenChannel(grpc.aio.Channel):
    """Adds the token to every call. Not an interceptor: those put a queue into every stream."""

    def __init__(self, inner: grpc.aio.Channel, token: str) -> None:
        self._inner = inner
        self._metadata = ((TOKEN_KEY, f"Bearer {token}"),)

    async def close(self, grace: float | None = None) -> None:
        await self._inner.close(grace)

    def get_state(self, try_to_connect: bool = False) -> grpc.ChannelConnectivity:
        return self._inner.get_state(try_to_connect)

    async def wait_for_state_change(self, last_observed_state: grpc.ChannelConnectivity) -> None:
        await self._inner.wait_for_state_change(last_observed_state)

    async def channel_ready(self) -> None:
        await self._inner.channel_ready()

    # Generated stubs pass `_registered_method`; it changes nothing that is said on the wire.
    def unary_unary(self, *args: Any, _registered_method: bool = False, **kwargs: Any) -> Any:
        return partial(self._inner.unary_unary(*args, **kwargs), metadata=self._metadata)

    def unary_stream(self, *args: Any, _registered_method: bool = False, **kwargs: Any) -> Any:
        return partial(self._inner.unary_stream(*args, **kwargs), metadata=self._metadata)

    def stream_unary(self, *args: Any, _registered_method: bool = False, **kwargs: Any) -> Any:
        return partial(self._inner.stream_unary(*args, **kwargs), metadata=self._metadata)

    def stream_stream(self, *args: Any, _registered_method: bool = False, **kwargs: Any) -> Any:
        return partial(self._inner.stream_stream(*args, **kwargs), metadata=self._metadata)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        await self.close()


async def _reject(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "missing or wrong bearer token")


async def _deny(_requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
    await context.abort(grpc.StatusCode.PERMISSION_DENIED, "this token opens Generate and nothing else")


def _bind(server: grpc.aio.Server, address: str, secret: grpc.ServerCredentials | None) -> int:
    try:
        if secret is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, secret)
    except RuntimeError:
        why = "the port is taken, the address is not this machine's, or a TLS file is no good"
        raise ChannelError(f"cannot listen on {address}: {why}") from None


def _read(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ChannelError(f"{name}: cannot read {path}: {error.strerror}") from None
