"""The simulator: a trace's requests and routing through the live system's own decisions, on a virtual clock.

A step costs the coordinator's overhead and, layer after layer, its slowest host (`ServiceTime` by calls and tokens).
Hosts of a batch are chosen by `assignment`, layouts and host counts by the policy. What it leaves out: coordinators
step as one (their batches are one batch), microbatches do not overlap, loads slow all hosts alike or none, and there is
no KV memory. Deterministic; reads no clock.
"""

from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from cluster.ids import NodeId
from cluster.layout import FloatArray, Grain, Host, IntArray, Layout
from cluster.load import balancedness
from cluster.policy import Observation, Policy
from cluster.routing_trace import RoutingTrace
from cluster.selector import SelectorPolicy
from cluster.service_time import ServiceTime, busy_seconds
from cluster.simulated_cluster import Logged, SimulatedCluster, SimulatedFault
from cluster.simulated_engine import ClosedLoop, SimulatedEngine
from cluster.simulated_servers import Servers


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """The machines and the rules. Times in seconds.

    `cost` is of one call on a host of speed 1, `step_cost` of the coordinator (a for a step, b for each of its tokens),
    which also takes `message_s` to send a host its rows and `answer_s` to take an answer in, one after another.
    `split`: batches past the ridge are split among copies. `apart`: experts on a host are processes of their own
    (`simulated_servers`). `window_s`: how often the policy is asked, on the work of up to `num_windows`. `locality_s`:
    a step's routing is the trace's from at most so much later. After `max_steps` the simulation stops, whatever is left
    undone. Requests of `closed` loops come when they are sent, not when the trace says. Of `faults` a policy learns
    what it sees: slow hosts by their work, lost ones by the layout. While a unit is nobody's, nothing is served. Loads
    take in turn `load_factors` times as long as `load_bytes_per_s` says. Where hosts share a machine, as few loads are
    under way at a time as `max_loading` says, and meanwhile steps take `loading_slows` times as long.
    """

    cost: ServiceTime
    step_cost: ServiceTime
    message_s: float = 0.0
    answer_s: float = 0.0
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 1024
    window_s: float = 10.0
    num_windows: int = 1
    load_bytes_per_s: float = 1e9
    load_factors: tuple[float, ...] = (1.0,)
    host_start_s: float = 30.0
    max_loading: int | None = None
    loading_slows: float = 1.0
    split: bool = True
    apart: bool = False
    locality_s: float = 10.0
    max_steps: int = 5_000_000
    closed: tuple[ClosedLoop, ...] = ()
    faults: tuple[SimulatedFault, ...] = ()

    def __post_init__(self) -> None:
        if not (self.window_s > 0 and self.locality_s > 0 and self.max_steps > 0 and self.num_windows > 0):
            raise ValueError(
                f"window_s is {self.window_s}, num_windows {self.num_windows}, locality_s {self.locality_s}, "
                f"max_steps {self.max_steps}: all above 0"
            )
        if not (0 <= self.message_s < np.inf and 0 <= self.answer_s < np.inf):
            raise ValueError(
                f"message_s is {self.message_s}, answer_s {self.answer_s}, but both must be at least 0 and finite"
            )
        if not self.loading_slows >= 1:
            raise ValueError(f"loading_slows is {self.loading_slows}, but it must be at least 1")


@dataclass(slots=True)
class Timeline:
    """One row for each time that the policy was asked; `balancedness` is of hosts, mean and worst over layers.

    `tokens` went through the model in that window: prompts, and of an answer all but its last one.
    """

    at_s: list[float] = field(default_factory=list)
    hosts: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)
    balancedness: list[float] = field(default_factory=list)
    worst_balancedness: list[float] = field(default_factory=list)
    critical_share: list[float] = field(default_factory=list)
    queue_s: list[float] = field(default_factory=list)
    moved_bytes: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Window:
    """What was done between two questions to the policy."""

    tokens_LE: IntArray
    calls_LE: IntArray
    divisible_LE: IntArray
    seconds: float = 0.0
    tokens: int = 0
    steps: int = 0
    step_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationResult:
    """What came of it. Times of each finished request in seconds; `tpot_s` only of answers of two tokens or more.

    `waited_rows` are those of the hosts that steps waited for, summed over layers and steps; `answers_s` passed from
    when the last host was done until its answer was taken in. `num_messages` were sent to hosts, or to processes.
    """

    duration_s: float
    num_steps: int
    num_tokens: int
    num_unfinished: int
    ttft_s: FloatArray
    tpot_s: FloatArray
    e2el_s: FloatArray
    host_seconds: float
    moved_bytes: int
    num_copies: int
    timeline: Timeline
    log: tuple[Logged, ...]
    waited_rows: float = 0.0
    answers_s: float = 0.0
    num_messages: int = 0


def simulate(
    trace: RoutingTrace,
    policy: Policy,
    *,
    grain: Grain,
    hosts: tuple[Host, ...],
    template: Host,
    config: SimulationConfig,
) -> SimulationResult:
    """Runs the trace's requests to the end. `template` is what an added host is like.

    The policy places the model before the first request, on the routing of the trace's first tokens. Raises ValueError
    when the grain is not of the trace's model, or when the policy does not place every unit.
    """
    run = _Run(trace, policy, grain, hosts, template, config)
    while not run.engine.is_done and run.num_steps < config.max_steps:
        run.step()
    return run.result()


class _Run:
    """The state of one simulation between two steps."""

    def __init__(
        self,
        trace: RoutingTrace,
        policy: Policy,
        grain: Grain,
        hosts: tuple[Host, ...],
        template: Host,
        config: SimulationConfig,
    ) -> None:
        if (grain.num_layers, grain.num_experts) != (trace.num_layers, trace.num_experts):
            raise ValueError(
                f"the grain has {grain.num_layers} layers of {grain.num_experts} experts, "
                f"the trace {trace.num_layers} of {trace.num_experts}"
            )
        self.config, self.policy = config, policy
        self._selector = SelectorPolicy(split=config.split)
        self._divisible_rows = self._selector.divisible_rows(config.cost)
        self._layers_L = np.arange(grain.num_layers)
        self.tokens = _TokenSource(trace, config.locality_s)
        self.engine = SimulatedEngine(
            trace.arrival_s,
            trace.prompt_tokens.astype(np.int64),
            trace.output_tokens.astype(np.int64),
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            closed=config.closed,
        )
        self._faults = sorted(config.faults, key=lambda fault: fault.at_s)
        self._slowed: list[tuple[float, NodeId, float]] = []
        self._asked_about: Layout | None = None
        self.now_s = 0.0
        self.num_steps = self.num_tokens = self.num_messages = 0
        self.waited_rows = self.answers_s = 0.0
        self.timeline = Timeline()
        self.cluster = SimulatedCluster(
            Layout.empty(grain, hosts),
            template,
            load_bytes_per_s=config.load_bytes_per_s,
            load_factors=config.load_factors,
            host_start_s=config.host_start_s,
            max_loading=config.max_loading,
        )
        expected = self.tokens.counts(0.0, 0, 512).astype(np.float64)
        # A nominal load, a tenth of one host's time: only its proportions matter, since nothing is placed yet.
        seen = Observation(now_s=0.0, layout=self.cluster.layout, work_LE=0.1 * expected / expected.sum())
        actions, self.state = policy(seen, None)
        self.cluster.do(actions, 0.0, at_once=True)
        self._use_layout()
        self._windows: deque[_Window] = deque(maxlen=config.num_windows)
        self._begin_window()

    def step(self) -> None:
        """One step of the engine, or the wait for something to do."""
        window_end_s = self.window_began_s + self.config.window_s
        self._strike()
        unserved = bool((self.cluster.layout.copies_U == 0).any())
        if self.now_s >= window_end_s or (unserved and not self.cluster.is_moving and self._may_mend()):
            self._ask()
            return
        if self.cluster.next_due_s <= self.now_s and self.cluster.advance(self.now_s):
            self._use_layout()
        if (self.cluster.layout.copies_U == 0).any():
            self.now_s = max(min(self.cluster.next_due_s, window_end_s), self.now_s)
            return
        num = self.engine.begin_step(self.now_s)
        if num == 0:
            self.now_s = min(max(self.engine.next_arrival_s, self.now_s), window_end_s)
            return
        tokens_LE = self.tokens.counts(self.now_s, self.num_tokens, num)
        worked = self.servers.work(tokens_LE)
        slowest_L = worked.seconds_LN.argmax(axis=1)
        waited_s = float(worked.ended_L.sum())
        self.waited_rows += float(worked.rows_LN[self._layers_L, slowest_L].sum())
        self.answers_s += waited_s - float(worked.seconds_LN[self._layers_L, slowest_L].sum())
        slows = self.config.loading_slows if self.cluster.is_loading(self.now_s) else 1.0
        waited_s *= slows
        own_s = self.config.step_cost.seconds(num) + self.config.message_s * worked.num_messages
        step_s = own_s * slows + waited_s
        self.now_s += step_s
        self.engine.end_step(self.now_s)
        self.num_steps += 1
        self.num_tokens += num
        self.num_messages += worked.num_messages
        self.window.tokens += num
        self.window.steps += 1
        self.window.step_s += step_s
        self.window.tokens_LE += tokens_LE
        self.window.calls_LE += tokens_LE > 0
        self.window.divisible_LE += np.where(tokens_LE >= self._divisible_rows, tokens_LE, 0)
        self.window_seconds_LN += worked.seconds_LN
        self.window_critical_s += waited_s

    def _may_mend(self) -> bool:
        """True when the layout is not the one that the policy was asked about last: it may know what to do now."""
        return self.cluster.layout is not self._asked_about

    def _strike(self) -> None:
        """Faults that are due, and the end of those that end."""
        layout = self.cluster.layout
        while self._slowed and self._slowed[0][0] <= self.now_s:
            _, node_id, factor = self._slowed.pop(0)
            self.cluster.slow(node_id, 1 / factor)
        while self._faults and self._faults[0].at_s <= self.now_s:
            fault = self._faults.pop(0)
            struck = self.cluster.strike(fault, self.now_s)
            if struck is not None and np.isfinite(fault.factor):
                self._slowed = sorted([*self._slowed, (self.now_s + fault.for_s, struck, fault.factor)])
        if self.cluster.layout is not layout:
            self._use_layout()

    def result(self) -> SimulationResult:
        """As of now."""
        self.cluster.advance(self.now_s)
        engine = self.engine
        ended = np.isfinite(engine.finished_s)
        arrival_s, first_s, finished_s = (a[ended] for a in (engine.arrival_s, engine.first_token_s, engine.finished_s))
        num_output = self.tokens.trace.output_tokens[ended]
        several = num_output > 1
        return SimulationResult(
            duration_s=self.now_s,
            num_steps=self.num_steps,
            num_tokens=self.num_tokens,
            num_unfinished=int((~ended & ~engine.unsent).sum()),
            ttft_s=first_s - arrival_s,
            tpot_s=(finished_s - first_s)[several] / (num_output[several] - 1),
            e2el_s=finished_s - arrival_s,
            host_seconds=self.cluster.host_seconds,
            moved_bytes=self.cluster.moved_bytes,
            num_copies=self.cluster.num_copies,
            timeline=self.timeline,
            log=tuple(self.cluster.log),
            waited_rows=self.waited_rows,
            answers_s=self.answers_s,
            num_messages=self.num_messages,
        )

    def _ask(self) -> None:
        """The end of a window: writes it down, and asks the policy unless its last moves are still under way."""
        if self.cluster.advance(self.now_s):
            self._use_layout()
        elapsed_s = max(self.now_s - self.window_began_s, 1e-9)
        self._write_down(elapsed_s)
        self.window.seconds = elapsed_s
        self._windows.append(self.window)
        if not self.cluster.is_moving:
            self._asked_about = self.cluster.layout
            actions, self.state = self.policy(self._seen(), self.state)
            self.cluster.do(actions, self.now_s)
            if self.cluster.advance(self.now_s) or actions:
                self._use_layout()
        self._begin_window()

    def _seen(self) -> Observation:
        """What a live cluster could know of the windows that end now."""
        cost, windows = self.config.cost, self._windows
        elapsed_s, steps = sum(one.seconds for one in windows), sum(one.steps for one in windows)
        tokens_LE: IntArray = np.sum([one.tokens_LE for one in windows], axis=0)
        calls_LE: IntArray = np.sum([one.calls_LE for one in windows], axis=0)
        divisible_LE: IntArray = np.sum([one.divisible_LE for one in windows], axis=0)
        return Observation(
            now_s=self.now_s,
            layout=self.cluster.layout,
            work_LE=busy_seconds(calls_LE, tokens_LE, cost) / elapsed_s,
            growing_LE=tokens_LE.astype(np.float64) * (cost.b_s / elapsed_s),
            divisible_LE=divisible_LE.astype(np.float64) * (cost.b_s / elapsed_s),
            steps_per_s=steps / elapsed_s,
            step_s=sum(one.step_s for one in windows) / steps if steps else 0.0,
            queue_s=self.engine.queue_s(self.now_s),
        )

    def _write_down(self, elapsed_s: float) -> None:
        line = self.timeline
        balanced_L = balancedness(self.window_seconds_LN)
        mean, worst = float(balanced_L.mean()), float(balanced_L.min())
        if line.at_s and not self.window_seconds_LN.any():
            # Nothing was served since the layout changed: nothing new is known.
            mean, worst = line.balancedness[-1], line.worst_balancedness[-1]
        line.at_s.append(self.now_s)
        line.hosts.append(self.cluster.num_paid)
        line.copies.append(int(self.cluster.layout.copies_U.sum()))
        line.balancedness.append(mean)
        line.worst_balancedness.append(worst)
        line.critical_share.append(self.window_critical_s / elapsed_s)
        line.queue_s.append(self.engine.queue_s(self.now_s))
        line.moved_bytes.append(self.cluster.moved_bytes)
        line.tokens.append(self.window.tokens)

    def _begin_window(self) -> None:
        shape = self.cluster.layout.grain.num_layers, self.cluster.layout.grain.num_experts
        self.window = _Window(np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        self.window_began_s = self.now_s
        self.window_critical_s = 0.0
        self._clear_seconds()

    def _clear_seconds(self) -> None:
        layout = self.cluster.layout
        self.window_seconds_LN: FloatArray = np.zeros((layout.grain.num_layers, len(layout.hosts)))

    def _use_layout(self) -> None:
        layout = self.cluster.layout
        if (layout.copies_U == 0).any():
            self._clear_seconds()
            return
        self.servers = Servers(
            layout, self.config.cost, self._selector, apart=self.config.apart, answer_s=self.config.answer_s
        )
        self._clear_seconds()


class _TokenSource:
    """Routing for the tokens of any step: those that the trace has from about that time; it begins again at its end."""

    def __init__(self, trace: RoutingTrace, locality_s: float) -> None:
        if not len(trace.experts):
            raise ValueError("experts is empty: the trace has no routing to simulate")
        self.trace = trace
        self._locality_s = locality_s
        self._size = trace.num_layers * trace.num_experts
        offsets = trace.num_experts * np.arange(trace.num_layers, dtype=np.int32)[:, None]
        flat: npt.NDArray[np.int32] = trace.experts.astype(np.int32) + offsets
        self._flat_TX = flat.reshape(len(flat), -1)
        self._span_s = max(float(trace.token_time_s[-1]), 1e-9)

    def counts(self, now_s: float, num_before: int, num: int) -> IntArray:
        """Tokens by layer and expert of a step of `num` tokens, after `num_before`, shape (L, E)."""
        times = self.trace.token_time_s
        at_s = now_s % self._span_s
        first = int(np.searchsorted(times, at_s))
        near = max(int(np.searchsorted(times, at_s + self._locality_s)) - first, 1)
        start = (first + num_before % near) % len(times)
        whole, rest = divmod(num, len(times))
        counts = np.bincount(self._flat_TX[start : start + rest].ravel(), minlength=self._size)
        over = start + rest - len(times)
        if over > 0:
            counts += np.bincount(self._flat_TX[:over].ravel(), minlength=self._size)
        if whole:
            counts += whole * np.bincount(self._flat_TX.ravel(), minlength=self._size)
        return counts.reshape(self.trace.num_layers, self.trace.num_experts)
