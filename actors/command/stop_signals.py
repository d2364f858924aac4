"""SIGINT and SIGTERM, in order: the first asks to stop, the second not to wait for anybody, the third ends the process.

Nothing is raised in the middle of a call; whoever waits, waits here. A thread of its own hears the signals from the
interpreter's wake-up descriptor: a handler runs in the main thread only, between two of its steps, where setting an
event that this very thread waits for can deadlock, and not at all while a call outside Python goes on.
"""

import os
import signal
import threading
from collections.abc import Callable

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """`asked` is set by the first signal, `hurried` by the second."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.hurried = threading.Event()
        self._changed = threading.Event()

    def install(self) -> "StopSignals":
        """Takes the signals over, in the main thread. Ray installs a SIGTERM handler of its own: come after it."""
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _nothing)
        threading.Thread(target=self._listen, args=(heard,), name="signals", daemon=True).start()
        return self

    def unless_hurried(self, work: Callable[[], None]) -> bool:
        """Does `work` and returns True; False as soon as somebody is in a hurry, and `work` is left to itself.

        Raises what `work` raises.
        """
        if self.hurried.is_set():
            return False
        errors: list[BaseException] = []
        done = threading.Event()

        def do() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits, whatever it is
                errors.append(error)
            finally:
                done.set()
                self._changed.set()

        threading.Thread(target=do, name="stopping", daemon=True).start()
        while not done.is_set() and not self.hurried.is_set():
            self._changed.wait()
            self._changed.clear()
        if errors:
            raise errors[0]
        return done.is_set()

    def _listen(self, heard: int) -> None:
        while True:
            for number in os.read(heard, 64):
                if number in _SIGNALS:
                    self._receive(number)

    def _receive(self, number: int) -> None:
        if self.hurried.is_set():
            os._exit(128 + number)
        (self.hurried if self.asked.is_set() else self.asked).set()
        self._changed.set()


def _nothing(_number: int, _frame: object) -> None:
    """What counts is that the signal has a handler, and does not end the process."""
