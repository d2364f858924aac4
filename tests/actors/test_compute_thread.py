"""One thread, most urgent first, and a bad job ends nothing but itself."""

import asyncio
import os
import threading
import weakref
from contextlib import ExitStack

import pytest
import torch

from actors.expert.compute_thread import ComputeThread
from tests.support.experts import run


def test_call_returns_and_raises_what_the_function_does() -> None:
    async def work() -> None:
        compute = ComputeThread("compute", 1)
        compute.start()
        assert await compute.call(lambda: 6 * 7) == 42
        assert await compute.call(lambda: threading.current_thread().name) == "compute"

        def fails() -> None:
            raise KeyError("x")

        with pytest.raises(KeyError):
            await compute.call(fails)
        assert compute.failures == 0
        await compute.stop()

    run(work())


def test_torch_gets_its_threads_inside() -> None:
    async def work() -> None:
        compute = ComputeThread("compute", 2)
        compute.start()
        assert await compute.call(torch.get_num_threads) == 2
        await compute.stop()

    run(work())


def test_the_most_urgent_job_runs_first_and_equals_in_order_of_arrival() -> None:
    async def work() -> None:
        compute, order, gate = ComputeThread("compute", 1), list[str](), threading.Event()
        compute.submit(lambda: order.append("later"), 20)
        compute.submit(lambda: order.append("urgent 1"), 10)
        compute.submit(lambda: order.append("urgent 2"), 10)
        compute.submit(gate.set, 30)
        compute.start()
        await asyncio.to_thread(gate.wait, 100)
        assert order == ["urgent 1", "urgent 2", "later"]
        await compute.stop()

    run(work())


def test_a_job_that_raises_is_counted_and_the_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        compute = ComputeThread("compute", 1)
        compute.start()
        compute.submit(lambda: [][0])
        compute.submit(lambda: None)
        done = threading.Event()
        compute.submit(done.set, 1)
        assert await asyncio.to_thread(done.wait, 100)
        assert compute.failures == 1
        await compute.stop()

    run(work())
    assert "a compute job failed" in caplog.text


def test_stop_drops_what_is_queued_and_may_come_before_start() -> None:
    async def work() -> None:
        compute, ran, gate, entered = ComputeThread("compute", 1), list[int](), threading.Event(), threading.Event()

        def block() -> None:
            entered.set()
            assert gate.wait(100)

        compute.start()
        compute.submit(block)
        assert await asyncio.to_thread(entered.wait, 100)
        compute.submit(lambda: ran.append(1))
        stopping = asyncio.create_task(compute.stop())
        await asyncio.sleep(0)  # the stop is queued before the gate opens
        gate.set()
        await stopping
        assert ran == []
        await ComputeThread("never started", 1).stop()

    run(work())


def test_after_the_end_nothing_runs_and_no_descriptor_is_touched() -> None:
    async def work() -> None:
        compute, ran = ComputeThread("compute", 1), list[int]()
        compute.start()
        await compute.stop()
        readers = [os.pipe2(os.O_NONBLOCK) for _ in range(8)]  # they get the numbers that the thread had
        try:
            compute.submit(lambda: ran.append(1))
            with pytest.raises(RuntimeError, match="has ended"):
                await compute.call(lambda: ran.append(2))
            for reader, _ in readers:
                with pytest.raises(BlockingIOError):
                    os.read(reader, 8)
        finally:
            for pair in readers:
                os.close(pair[0])
                os.close(pair[1])
        assert ran == []

    run(work())


class _Watcher:
    """Reads its pipe once, and wants no more."""

    def __init__(self, compute: ComputeThread, fd: int) -> None:
        self._compute = compute
        self._fd = fd
        self.seen = threading.Event()

    def look(self) -> None:
        assert threading.current_thread().name == "compute"
        os.read(self._fd, 1)
        self._compute.unwatch(self._fd)
        self.seen.set()


def test_a_watcher_is_called_between_two_jobs_and_forgotten_when_it_is_done() -> None:
    async def work() -> None:
        compute = ComputeThread("compute", 1)
        compute.start()
        with ExitStack() as stack:
            reader, writer = os.pipe()
            stack.callback(os.close, reader)
            stack.callback(os.close, writer)
            watcher = _Watcher(compute, reader)
            gone, seen = threading.Event(), watcher.seen
            weakref.finalize(watcher, gone.set)
            compute.watch(reader, watcher.look)
            del watcher
            os.write(writer, b"x")
            assert await asyncio.to_thread(seen.wait, 100)
            assert await asyncio.to_thread(gone.wait, 100)  # while the thread waits for whatever comes next
            assert await compute.call(lambda: 1) == 1
        assert compute.failures == 0
        await compute.stop()

    run(work())


def test_no_threads_is_an_error() -> None:
    with pytest.raises(ValueError, match="threads is 0"):
        ComputeThread("compute", 0)
