"""Copies that stop loading until a test lets them go on: what is to be seen meanwhile is seen on any machine."""

import threading
from collections.abc import Callable

import pytest

from actors.expert.loading import LayerLoader
from model.experts import ExpertColumn


class HeldCopies:
    """Holds what is loaded at a pace (copies, not replicas of the start) where `held(expert, layer)` is true."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: Callable[[int, int], bool]) -> None:
        self._gone = threading.Event()
        load = LayerLoader.load

        def hold(loader: LayerLoader, expert: int, layer: int) -> ExpertColumn:
            while loader._pace._throttle is not None and held(expert, layer) and not self._gone.wait(0.01):
                loader._pace.wait(0)  # raises once the copy is told to stop
            return load(loader, expert, layer)

        monkeypatch.setattr(LayerLoader, "load", hold)

    def go(self) -> None:
        """Copies load on, these and later ones."""
        self._gone.set()
