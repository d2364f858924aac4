"""A function that raises when a test says so: the fault injector of the exception sweeps."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest


class Fault:
    """Makes a function raise, before or after its work, when `when` says so of its arguments."""

    def __init__(
        self, where: Any, name: str, *, after: bool = False, when: Callable[..., bool] = lambda *_, **__: True
    ) -> None:
        self.where, self.name = where, name
        self.after, self.when = after, when
        self.left = 0
        self.calls = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = getattr(self.where, self.name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self._striking(*args, **kwargs):
                return real(*args, **kwargs)

        async def wrapped_coroutine(*args: Any, **kwargs: Any) -> Any:
            with self._striking(*args, **kwargs):
                return await real(*args, **kwargs)

        wrapper: Any = wrapped_coroutine if inspect.iscoroutinefunction(real) else wrapped
        bound = isinstance(inspect.getattr_static(self.where, self.name), classmethod)
        monkeypatch.setattr(self.where, self.name, staticmethod(wrapper) if bound else wrapper)

    @contextlib.contextmanager
    def _striking(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        strikes = self.left > 0 and self.when(*args, **kwargs)
        if strikes:
            self.left -= 1
            self.calls += 1
            if not self.after:
                raise RuntimeError(f"injected before {self.name}")
        yield
        if strikes:
            raise RuntimeError(f"injected after {self.name}")
