"""The first signal asks, the second hurries, the third ends the process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from actors.command.stop_signals import StopSignals


@pytest.fixture
def signals() -> Iterator[StopSignals]:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield StopSignals().install()
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_the_first_asks_and_the_second_hurries(signals: StopSignals) -> None:
    assert not signals.asked.is_set()
    send(signal.SIGTERM)
    assert signals.asked.wait(100)
    assert not signals.hurried.is_set()
    send(signal.SIGINT)
    assert signals.hurried.wait(100)


def test_work_is_waited_for_and_its_error_is_the_callers(signals: StopSignals) -> None:
    done: list[int] = []
    assert signals.unless_hurried(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        signals.unless_hurried(lambda: 1 // 0)  # type: ignore[arg-type, return-value]


def test_a_hurry_ends_the_waiting_and_not_the_work(signals: StopSignals) -> None:
    gate, begun = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        gate.wait(100)

    def interrupt() -> None:
        begun.wait(100)
        send(signal.SIGTERM)
        signals.asked.wait(100)
        send(signal.SIGTERM)

    threading.Thread(target=interrupt).start()
    assert not signals.unless_hurried(work)
    gate.set()
    assert not signals.unless_hurried(lambda: pytest.fail("nothing is begun in a hurry"))


def test_the_third_ends_the_process_at_once() -> None:
    program = (
        "import time\nfrom actors.command.stop_signals import StopSignals\n"
        "stop = StopSignals().install()\nprint('ready', flush=True)\n"
        "while True:\n    time.sleep(0.01)\n    "
        "print(stop.asked.is_set() + stop.hurried.is_set(), flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for count in ("1\n", "2\n"):
            process.send_signal(signal.SIGTERM)
            deadline_s = time.monotonic() + 100
            while process.stdout.readline() != count:
                assert time.monotonic() < deadline_s
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait(100) == 128 + signal.SIGINT
