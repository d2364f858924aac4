"""The balancing loop: looks at the load, asks the policy, does what it says in its order, and tells it all.

It decides nothing: that is the policy's (`cluster.policies`). Carrying out an action is `actors.supervision.mover`'s.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from actors.supervision.asking import Asker, PolicyFailed, Watch, budget_bytes, load_policy
from actors.supervision.keepers import Say
from actors.supervision.loading_places import LoadingPlaces
from actors.supervision.member import View
from actors.supervision.mover import MoveFailed, Mover
from actors.supervision.status import BalanceStatus
from cluster.config import BalanceMode, ClusterConfig
from cluster.layout import Layout, critical_share
from cluster.live_layout import units_of
from cluster.observing import Measured, measure
from cluster.policy import Action, AddHosts, Copy, Drop, Observation, apply, moved_bytes, waits_for
from cluster.policy_check import BadAnswer, checked, within_bounds

LOG = logging.getLogger(__name__)

MAX_TOLD = 32
MAX_SAID = 8
UNSETTLED_ROUNDS = 12
"""After so many intervals in which replicas still start, the policy is asked all the same."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a policy wants now, and what that is for. Shares are of the time that steps wait for the busiest hosts."""

    actions: tuple[Action, ...]
    state: Any
    layout: Layout
    measured: Measured

    @property
    def shares(self) -> tuple[float, float]:
        """Before and after."""
        after = apply(self.layout, self.actions)
        work_LE = self.measured.work_LE
        return critical_share(self.layout.busy_LN(work_LE)), critical_share(after.busy_LN(work_LE))

    @property
    def balancedness(self) -> tuple[float, float]:
        """Mean busy share of the hosts over the largest, weighted by layer, before and after; 1.0 is even."""
        return _evenness(self.layout, self.measured), _evenness(apply(self.layout, self.actions), self.measured)


class Balancing:
    """Runs from the moment that it is built, in the caller's event loop. `coordinators` gives their newest views."""

    def __init__(
        self, config: ClusterConfig, mover: Mover, coordinators: Callable[[], Mapping[str, View]], say: Say
    ) -> None:
        self.mode: BalanceMode = config.balance
        self._config = config
        self._mover = mover
        self._coordinators = coordinators
        self._say = say
        self._asker = Asker(load_policy(config, mover.grain))
        self._budget = budget_bytes(config, mover.grain)
        self._watch = Watch()
        self._state: Any = None
        self._proposed: tuple[dict[str, Any], ...] = ()
        self._done: deque[dict[str, Any]] = deque(maxlen=MAX_TOLD)
        self._failed: deque[dict[str, Any]] = deque(maxlen=MAX_TOLD)
        self._failures: list[Action] = []
        self._moves = self._moved_bytes = 0
        self._unsettled = 0
        self._abandoned = False
        self._turn = asyncio.Lock()
        self._working: asyncio.Task[None] | None = None
        self._told = ""
        self._loop = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Ends the loop; an action that is under way is left as it is."""
        tasks = [task for task in (self._loop, self._working) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def status(self) -> BalanceStatus:
        """What is wanted, done and failed."""
        return BalanceStatus(
            mode=self.mode,
            policy=self._config.balance_policy,
            proposed=list(self._proposed),
            done=list(self._done),
            failed=list(self._failed),
            moves_total=self._moves,
            moved_bytes_total=self._moved_bytes,
        )

    def switch(self, mode: BalanceMode) -> None:
        """Another mode, until it is switched again or the supervisor begins anew."""
        if mode != self.mode:
            self._say(f"balancing is {mode.replace('_', ' ')} now, it was {self.mode.replace('_', ' ')}")
        self.mode = mode
        self._abandoned = mode != "on"

    async def plan(self) -> Plan | None:
        """What the policy wants now; None before there is a load to go by. Raises PolicyFailed.

        Nothing changes by asking: the policy's new state is in the plan.
        """
        seen = self._observe()
        if seen is None:
            return None
        observation, measured = seen
        answer = await self._asker.ask(observation, self._state)
        try:
            actions, state = checked(answer, observation.layout)
        except BadAnswer as error:
            raise PolicyFailed(f"the policy's answer is refused: {error}") from None
        min_copies = self._mover.experts.desired.min_copies
        actions = within_bounds(actions, observation.layout, budget_bytes=self._budget, min_copies=min_copies)
        return Plan(actions, state, observation.layout, measured)

    async def once(self) -> tuple[Plan, tuple[dict[str, Any], ...]] | None:
        """One round, whatever the mode: asks and carries out; the moves that failed are in the answer, too.

        None before there is a load to go by. Raises PolicyFailed.
        """
        async with self._turn:
            self._abandoned = False
            self._mover.expect_no_change()
            plan = await self.plan()
            if plan is None:
                return None
            self._propose(plan)
            await self._carry_out(plan)
            return plan, tuple(self._failed)[-len(self._failures) :] if self._failures else ()

    async def _carry_out(self, plan: Plan) -> None:
        """The actions, each when those that it builds on are done, until one fails or the plan is for a past world.

        Machines load side by side; how many, is bounded, since their sources may be the same few.
        """
        self._state = plan.state
        self._failures.clear()
        places = LoadingPlaces()
        doing: list[asyncio.Task[None]] = []
        try:
            async with asyncio.TaskGroup() as group:
                for action, before in zip(plan.actions, waits_for(plan.actions), strict=True):
                    work = self._in_turn(action, [doing[place] for place in before], plan.layout, places)
                    doing.append(group.create_task(work))
        finally:
            self._proposed = ()

    async def _in_turn(
        self, action: Action, before: Sequence[asyncio.Task[None]], layout: Layout, places: LoadingPlaces
    ) -> None:
        if before:
            await asyncio.wait(before)
        place = places.one_on(self._mover.machine(action.node_id)) if isinstance(action, Copy) else nullcontext()
        async with place:
            if not (self._failures or self._abandoned or self._mover.others_changed):
                await self._do(action, layout)

    async def _run(self) -> None:
        """Looks every interval, whatever is going on; works when the last round is done."""
        while True:
            await asyncio.sleep(self._config.balance_interval_s)
            try:
                self._look()
            except Exception:
                LOG.exception("the coordinators' counters could not be read; the next look follows")
            if self._working is None or self._working.done():
                self._working = asyncio.create_task(self._work())

    async def _work(self) -> None:
        try:
            await self._round()
            self._told = ""
        except PolicyFailed as error:
            if str(error) != self._told:
                self._say(f"balancing skips a round: {error}")
            self._told = str(error)
        except Exception:
            LOG.exception("a round of balancing failed; the next one follows")

    def _look(self) -> None:
        desired = self._mover.experts.desired
        self._watch.add(time.monotonic(), self._coordinators(), (desired.num_layers, desired.num_experts))

    async def _round(self) -> None:
        if self.mode == "off" or self._turn.locked() or not self._is_settled():
            return
        if self.mode == "on":
            await self.once()
            return
        plan = await self.plan()
        if plan is not None:
            self._propose(plan)
            self._state = plan.state

    def _is_settled(self) -> bool:
        """False while replicas are on their way that somebody else asked for: their load is not known yet."""
        experts = self._mover.experts
        arriving = [one for one in experts.desired.ids if not experts.is_whole(one)]
        coming = [one for one in arriving if self._mover.trouble(one) is None]
        self._unsettled = self._unsettled + 1 if coming else 0
        return not 0 < self._unsettled < UNSETTLED_ROUNDS

    def _observe(self) -> tuple[Observation, Measured] | None:
        window = self._watch.window
        if window is None or not self._mover.experts.nodes:
            return None
        experts, grain = self._mover.experts, self._mover.grain
        replicas = (*experts.desired.replicas, *experts.former.values())
        shape = (grain.num_layers, grain.num_experts)
        measured = measure(*window, shape, replicas, experts.places)
        if measured is None:
            return None
        self._mover.speeds = dict(measured.speeds)
        leaving = {
            (unit, experts.places[one.replica_id])
            for one in experts.former.values()
            if one.replica_id in experts.places
            for unit in units_of(one, grain)
        }
        in_tokens = self._config.target_tokens_per_s is not None
        observation = Observation(
            now_s=time.monotonic(),
            layout=self._mover.layout,
            work_LE=self._config.shown_work(measured.work_LE, measured.tokens_LE),
            growing_LE=None if in_tokens else measured.growing_LE,
            divisible_LE=None if in_tokens else measured.divisible_LE,
            batches=measured.batches,
            steps_per_s=measured.steps_per_s,
            step_s=measured.step_s,
            queue_s=measured.queue_s,
            failed=tuple(self._failures),
            forbidden=frozenset(leaving),
        )
        return observation, measured

    def _propose(self, plan: Plan) -> None:
        before = [_core(one) for one in self._proposed]
        self._proposed = tuple(told(action, plan.layout) for action in plan.actions)
        if self.mode == "dry_run" and [_core(one) for one in self._proposed] != before:
            for one in self._proposed[:MAX_SAID]:
                self._say(f"balancing would {_say(one)}")
            if len(self._proposed) > MAX_SAID:
                self._say(f"balancing would make {len(self._proposed) - MAX_SAID} more moves: octavo balance --dry-run")

    async def _do(self, action: Action, layout: Layout) -> None:
        one = told(action, layout)
        self._say(f"balancing: {_say(one)}")
        try:
            await self._mover.do(action)
        except MoveFailed as error:
            self._say(f"balancing could not {_say(one, why=False)}: {error}")
            self._failures.append(action)
            self._failed.append({**one, "at": _now(), "error": str(error)})
            return
        self._moves += isinstance(action, Copy | Drop)
        self._moved_bytes += moved_bytes([action])
        self._done.append({**one, "at": _now()})


def told(action: Action, layout: Layout) -> dict[str, Any]:
    """An action as `actors.supervision.status.BalanceStatus` has it."""
    kind = "".join(f"_{c.lower()}" if c.isupper() else c for c in type(action).__name__).lstrip("_")
    what = layout.grain.say(action.unit) if isinstance(action, Copy | Drop) else "host"
    return {
        "kind": kind,
        "what": f"{action.num} hosts" if isinstance(action, AddHosts) else what,
        "node_id": "" if isinstance(action, AddHosts) else str(action.node_id),
        "source": str(action.source or "") if isinstance(action, Copy) else "",
        "num_bytes": action.num_bytes if isinstance(action, Copy) else 0,
        "reason": action.reason,
        "at": _now(),
    }


def _say(move: Mapping[str, Any], *, why: bool = True) -> str:
    where = {"copy": " to ", "drop": " on "}.get(str(move["kind"]), " ") + str(move["node_id"])[:8]
    text = f"{str(move['kind']).replace('_', ' ')} {move['what']}{where}".rstrip()
    return f"{text}: {move['reason']}" if why else text


def _core(move: Mapping[str, Any]) -> Sequence[str]:
    return [str(move[name]) for name in ("kind", "what", "node_id")]


def _now() -> float:
    return round(time.time(), 3)


def _evenness(layout: Layout, measured: Measured) -> float:
    busy_LN = layout.busy_LN(measured.work_LE)
    worst = float(busy_LN.max(axis=1, initial=0.0).sum())
    return float(busy_LN.mean(axis=1).sum()) / worst if worst > 0 else 1.0
