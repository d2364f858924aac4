"""How much a port may hold for peers who send and never read, or send what nobody wants: numbers, and their sum.

gRPC takes bytes of a call before anybody asks for them, and before the call's token was looked at, up to the window of
its stream. Left to itself it widens that window to 32 MiB where bytes come fast, for each of 1024 streams. Here both
are fixed, so that their product is a bound for each connection. How many connections there are is left to the limit of
open files: a limit of gRPC's would let strangers lock out those who belong here. `actors.channels` sets them.
"""

from dataclasses import dataclass

CONNECTION_BYTES = 256 * 1024
"""What one connection costs beside its streams: TLS, headers, what was just read from its socket."""

STREAM_BYTES = 32 * 1024
"""What one call costs beside its messages: gRPC's own state, headers, and Python's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PortLimits:
    """`streams` are a connection's, `window_bytes` a stream's: what it may send that nobody has asked for yet.

    A message that is asked for may go on beyond the window up to its end, so that the window has to cover only the
    time until the first of its bytes are read. `calls` are the whole port's; one more is refused. With a stream more
    than its connection may have, a gRPC client waits by itself.
    """

    streams: int = 16
    window_bytes: int = 256 * 1024
    calls: int = 1024

    @property
    def unread_bytes(self) -> int:
        """Most that a connection can make the port hold of messages that nobody reads, token or not."""
        return self.streams * (self.window_bytes + STREAM_BYTES) + CONNECTION_BYTES


EXPERT_PORT = PortLimits()
"""Rows: up to 32 MiB in a message, which goes on as soon as its first bytes are read."""

COORDINATOR_PORT = PortLimits(streams=32, window_bytes=64 * 1024)
"""Token ids. A client of ours may have 16 streams, and asks other things beside them."""
