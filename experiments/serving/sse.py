"""Server-sent events out of bytes that come in any pieces. What an event means is for others."""

from experiments.serving.results import RequestFailed

MAX_EVENT_BYTES = 2**20


class EventReader:
    """Feeds on pieces of a response body, gives the data of each complete event."""

    def __init__(self) -> None:
        self._line = b""
        self._data: list[bytes] = []
        self._size = 0

    def push(self, piece: bytes) -> list[bytes]:
        """Data of the events that `piece` completes. Comments and other fields are skipped, as the standard says.

        Raises RequestFailed when an event grows beyond MAX_EVENT_BYTES.
        """
        *lines, self._line = (self._line + piece).split(b"\n")
        events: list[bytes] = []
        for line in lines:
            self._take(line.removesuffix(b"\r"), events)
        if self._size + len(self._line) > MAX_EVENT_BYTES:
            raise RequestFailed("bad_stream", f"an event has more than {MAX_EVENT_BYTES} bytes")
        return events

    def _take(self, line: bytes, events: list[bytes]) -> None:
        if line.startswith(b"data:"):
            self._data.append(line[5:].removeprefix(b" "))
            self._size += len(line)
        elif not line and self._data:
            events.append(b"\n".join(self._data))
            self._data, self._size = [], 0
