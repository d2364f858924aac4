"""Asks a balancing policy, which may be anybody's function: aside, with a time limit, its answer checked.

What a policy is shown comes from the coordinators' own accounts. What is done about its answer is
`actors.supervision.balancing`'s.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np

from actors.supervision.member import View
from cluster.config import ClusterConfig, ConfigError
from cluster.ids import ReplicaId
from cluster.layout import Grain, IntArray
from cluster.observing import Counted, Look, ReplicaTimes
from cluster.policies import NAMES
from cluster.policy import Observation, Policy
from cluster.retries import WithPauses

POLICY_TIMEOUT_S = 10.0
WINDOW_INTERVALS = 3
"""A window is so many intervals long, or as many as there were."""
UNITS_PER_ROUND = 4
"""Without a limit on bytes a second, a round may load so many of the largest units."""


class PolicyFailed(Exception):
    """A policy raised, did not answer, or answered nonsense. One line."""


def budget_bytes(config: ClusterConfig, grain: Grain) -> int:
    """What one round of balancing may load; at least one unit, or nothing could ever be moved."""
    largest = int(grain.bytes_U.max())
    if config.balance_bytes_per_s is None:
        return UNITS_PER_ROUND * largest
    return max(largest, int(config.balance_bytes_per_s * config.balance_interval_s))


def load_policy(config: ClusterConfig, grain: Grain) -> Policy:
    """The configured policy, whose failed copies pause. Raises ConfigError naming what is wrong with it."""
    name = config.balance_policy
    if name in NAMES:
        at_least = replace(config, min_copies=max(config.min_copies, config.replicas))
        return at_least.policy(name, budget_bytes=budget_bytes(config, grain))
    if ":" not in name:
        raise ConfigError(f"balance_policy is {name!r}, but must be one of {', '.join(NAMES)}, or module:function")
    try:
        found = EntryPoint(name, name, "balance_policy").load()
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"balance_policy is {name!r}, which cannot be loaded: {error}") from None
    if not callable(found):
        raise ConfigError(f"balance_policy is {name!r}, which is {type(found).__name__}, not a function")
    return config.scaled(WithPauses(inner=found))


class Watch:
    """Looks at the coordinators' counters, one interval apart; `first` and `last` bound the window."""

    def __init__(self) -> None:
        self._looks: deque[Look] = deque(maxlen=WINDOW_INTERVALS + 1)

    def add(self, now_s: float, coordinators: Mapping[str, View], shape: tuple[int, int]) -> None:
        """Takes in what they said last. `shape` is layers by experts; who has not served yet has counted nothing."""
        infos = {name: view.info for name, view in coordinators.items() if view.dead is None and view.info is not None}
        loads = {name: np.asarray(info.get("load") or np.zeros(shape), np.int64) for name, info in infos.items()}
        counted = {name: _counted(infos[name], load) for name, load in loads.items() if load.shape == shape}
        self._looks.append(Look(now_s, counted))

    @property
    def window(self) -> tuple[Look, Look] | None:
        """The oldest and the newest look at somebody; None before there are two, and before anything was counted."""
        looks = [look for look in self._looks if look.coordinators]
        counted = looks and any(one.tokens_LE.any() for one in looks[-1].coordinators.values())
        return (looks[0], looks[-1]) if len(looks) > 1 and counted else None


def _counted(info: Mapping[str, Any], tokens_LE: IntArray) -> Counted:
    times = {
        ReplicaId(str(one["replica_id"])): ReplicaTimes(
            calls=int(one["calls_total"]),
            tokens=int(one["tokens_total"]),
            compute_s=float(one["compute_us_total"]) / 1e6,
            a_s=max(float(one["a_us"]), 0.0) / 1e6,
            b_s=max(float(one["b_us"]), 0.0) / 1e6,
        )
        for one in info.get("replica_times") or ()
    }
    return Counted(
        tokens_LE=tokens_LE,
        compute_s=float(info.get("expert_compute_us_total") or 0) / 1e6,
        queue_s=float(info.get("queue_s") or 0.0),
        replicas=times,
        steps=int(info.get("steps_total") or 0),
        step_s=float(info.get("step_s_total") or 0.0),
        divisible_LE=np.asarray(told, np.int64) if (told := info.get("divisible_load")) else None,
        batches=int(info.get("batches_total") or 0),
    )


class Asker:
    """Asks one policy, never twice at once: one that hangs keeps its thread, and is only told of."""

    def __init__(self, policy: Policy, *, timeout_s: float = POLICY_TIMEOUT_S) -> None:
        self._policy = policy
        self._timeout_s = timeout_s
        self._asking: asyncio.Future[Any] | None = None
        self._turn = asyncio.Lock()

    async def ask(self, seen: Observation, state: Any) -> Any:
        """What the policy returned, unchecked; who asks meanwhile gets the next turn. Raises PolicyFailed."""
        async with self._turn:
            if self._asking is not None and not self._asking.done():
                raise PolicyFailed("the policy is still busy with an earlier question")
            asking = self._asking = _in_thread(lambda: self._policy(seen, state))
            done, _ = await asyncio.wait({asking}, timeout=self._timeout_s)
            if not done:
                raise PolicyFailed(f"the policy did not answer within {self._timeout_s:g} s")
            error = asking.exception()
            if error is not None:
                raise PolicyFailed(f"the policy raised {type(error).__name__}: {error}") from error
            return asking.result()


def _in_thread(call: Callable[[], Any]) -> asyncio.Future[Any]:
    """A daemon thread of its own: a policy that never returns must not keep the process alive."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def tell(value: Any, error: Exception | None) -> None:
        if future.cancelled():
            return
        if error is None:
            future.set_result(value)
        else:
            future.set_exception(error)

    def work() -> None:
        value: Any = None
        failure: Exception | None = None
        try:
            value = call()
        except Exception as error:  # noqa: BLE001 - a policy may raise anything; it is told, whatever it is
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell, value, failure)

    threading.Thread(target=work, name="balancing policy", daemon=True).start()
    return future
