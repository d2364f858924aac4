"""What a scenario file may say, as frozen dataclasses, and the strict reader that makes them from YAML.

Unknown keys are refused with the nearest known one, values outside their limits with the field and the limit; so are
keys that are given twice, aliases, and files of more than MAX_BYTES. Running a scenario is not done here.
"""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml

from cluster.policies import NAMES

MAX_BYTES = 1 << 20
MAX_ITEMS = 100
TEXTS = ("prose", "code")
FAULTS = ("kill", "slow")
T = TypeVar("T")


class ScenarioError(ValueError):
    """A scenario that cannot be: the file, the field, its problem and the limit."""


def limited(default: Any, low: float, high: float) -> Any:
    """A number from `low` to `high`, None where that is the default."""
    return field(default=default, metadata={"limits": (low, high)})


def chosen(default: Any, *choices: str) -> Any:
    """One of the choices."""
    return field(default=default, metadata={"choices": choices})


@dataclass(frozen=True, kw_only=True)
class Model:
    """The simulated model's shape and routing; `path` is the checkpoint of a live run, the demo model without it.

    `law`, `skew`, `stickiness` are `synthetic_routing.RoutingModel`'s: each kind of text has a popularity of its own.
    """

    path: str | None = None
    layers: int = limited(32, 1, 256)
    experts: int = limited(8, 2, 1024)
    top_k: int = limited(2, 1, 64)
    layer_mb: float = limited(352.0, 1e-3, 1e6)
    law: str = chosen("zipf", "zipf", "dirichlet")
    skew: float = limited(0.8, 0.0, 10.0)
    stickiness: float = limited(0.15, 0.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The affine model of the simulated machines: an expert's call and a coordinator's step, for tokens of either."""

    call_us: float = limited(500.0, 0.0, 1e7)
    token_us: float = limited(20.0, 0.0, 1e6)
    step_us: float = limited(2000.0, 0.0, 1e7)
    step_token_us: float = limited(50.0, 0.0, 1e6)


@dataclass(frozen=True, kw_only=True)
class Autoscale:
    """Hosts follow the load between `min` and `max`; simulated, with every policy but static."""

    min: int = limited(1, 1, 4096)
    max: int = limited(4096, 1, 4096)
    target_share: float = limited(0.7, 0.01, 0.99)
    target_step_ms: float | None = limited(None, 1e-3, 1e6)


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """Expert hosts, simulated; live, `live.config` says what there is, and only `window_s` counts.

    `columns` whole experts fit on a host, cut into `ranges` that move on their own.
    """

    count: int = limited(8, 1, 4096)
    columns: float = limited(2.0, 0.01, 1e4)
    ranges: int = limited(1, 1, 256)
    load_gb_s: float = limited(2.0, 1e-6, 1e4)
    budget_gb: float = limited(24.0, 1e-6, 1e6)
    start_s: float = limited(60.0, 0.0, 1e5)
    window_s: float = limited(10.0, 0.1, 1e4)
    autoscale: Autoscale | None = None


@dataclass(frozen=True, kw_only=True)
class Live:
    """What only a live run has: fields of ClusterConfig beside those that the scenario chooses itself.

    The first `calibrate` phases tell the simulator's constants, the others are predicted (`--fidelity`, `--ranking`).

    `nodes` Ray nodes are made of this machine: copies of an expert are on different ones. With `row_us` every row of an
    expert takes so much longer, asleep: so experts can be the bottleneck where there are few cores. The experts of a
    node wait for each other meanwhile, as on one device, unless each has one of its own (`own_devices`).
    """

    calibrate: int = limited(1, 1, MAX_ITEMS)
    nodes: int = limited(1, 1, 16)
    row_us: float = limited(0.0, 0.0, 1e6)
    own_devices: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Load for a while: `rate` requests a second (Poisson, from `rate` to `rate_to` in a straight line), or
    `concurrency` clients that each send the next request when the last is answered.

    Lengths are means, geometric around it where simulated or live. `text` weighs the kinds of text.
    """

    duration_s: float = limited(60.0, 0.1, 1e6)
    rate: float | None = limited(None, 1e-6, 1e5)
    rate_to: float | None = limited(None, 1e-6, 1e5)
    concurrency: int | None = limited(None, 1, 4096)
    prompt_tokens: int = limited(128, 1, 1 << 17)
    output_tokens: int = limited(64, 1, 1 << 17)
    text: Mapping[str, float] = field(default_factory=lambda: {"prose": 1.0})


@dataclass(frozen=True, kw_only=True)
class Fault:
    """At `at_s` the first replica of `expert` is killed, or runs `factor` times slower for `for_s` seconds.

    Simulated, it is the replica's whole host: a killed one is gone, and an empty one comes after `hosts.start_s`.
    """

    at_s: float = limited(0.0, 0.0, 1e7)
    kind: str = chosen("kill", *FAULTS)
    expert: int = limited(0, 0, 1023)
    for_s: float = limited(10.0, 0.1, 1e6)
    factor: float = limited(4.0, 1.1, 1000.0)


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """The whole file."""

    name: str = ""
    model: Model = field(default_factory=Model)
    cost: Cost = field(default_factory=Cost)
    hosts: Hosts = field(default_factory=Hosts)
    live: Live = field(default_factory=Live)
    max_num_seqs: int = limited(64, 1, 4096)
    max_num_batched_tokens: int = limited(512, 1, 1 << 16)
    phases: tuple[Phase, ...] = ()
    policies: tuple[str, ...] = ("static", "incremental")
    faults: tuple[Fault, ...] = ()
    seeds: tuple[int, ...] = (0,)

    @property
    def duration_s(self) -> float:
        """Of all phases."""
        return sum(phase.duration_s for phase in self.phases)


def read_scenario(path: Path) -> Scenario:
    """Reads and checks the file. Raises ScenarioError or OSError."""
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ScenarioError(f"{path.name} has more than {MAX_BYTES} bytes")
    try:
        value = yaml.load(data, _Strict)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ScenarioError(f"{path.name} is not sound YAML: {' '.join(str(error).split())[:300]}") from None
    scenario = build(Scenario, value, "")
    _check(scenario)
    return scenario


class _Strict(yaml.SafeLoader):  # type: ignore[misc]  # the library has no types
    """Without aliases, and without keys that are given twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.events.AliasEvent):
            raise yaml.YAMLError("an alias (*name) is not taken here")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def build(cls: type[T], value: Any, where: str) -> T:
    """An instance of the dataclass from plain values. Raises ScenarioError."""
    if not isinstance(value, Mapping):
        raise ScenarioError(f"{where or 'the scenario'} is {_shown(value)}, but it must be a mapping")
    known = {one.name: one for one in fields(cls)}  # type: ignore[arg-type]
    hints = get_type_hints(cls)
    for key in value:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ScenarioError(f"{_at(where, str(key)[:60])} is not known; the nearest known key is {near[0]}")
    made = {key: _made(hints[key], known[key].metadata, raw, _at(where, key)) for key, raw in value.items()}
    return cls(**made)


def _made(hint: Any, metadata: Mapping[str, Any], value: Any, where: str) -> Any:
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if NoneType in get_args(hint) else [hint]
    if value is None and NoneType in get_args(hint):
        return None
    kind = kinds[0]
    if is_dataclass(kind):
        return build(kind, value, where)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list) or not 1 <= len(value) <= MAX_ITEMS:
            raise ScenarioError(f"{where} must be a list of 1 to {MAX_ITEMS}")
        return tuple(_made(get_args(kind)[0], {}, item, f"{where}[{i}]") for i, item in enumerate(value))
    if get_origin(kind) is Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise ScenarioError(f"{where} is {_shown(value)}, but it must be a mapping of names")
        inner = get_args(kind)[1]
        return {
            k: v if inner is Any else _made(inner, {"limits": (0, 1e6)}, v, _at(where, k)) for k, v in value.items()
        }
    return _scalar(kind, metadata, value, where)


def _scalar(kind: type, metadata: Mapping[str, Any], value: Any, where: str) -> Any:
    if kind is str:
        if not isinstance(value, str):
            raise ScenarioError(f"{where} is {_shown(value)}, but it must be a text")
        if value not in metadata.get("choices", (value,)):
            raise ScenarioError(f"{where} is {value!r}, but it must be one of {', '.join(metadata['choices'])}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise ScenarioError(f"{where} is {_shown(value)}, but it must be true or false")
        return value
    low, high = metadata.get("limits", (0, 2**32 - 1))
    is_number = isinstance(value, int if kind is int else int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise ScenarioError(f"{where} is {_shown(value)}, but it must be {what} from {low:g} to {high:g}")
    return kind(value)


def _check(scenario: Scenario) -> None:
    """What only shows in several fields together."""
    if not scenario.phases:
        raise ScenarioError("phases is missing: a scenario has at least one")
    for index, phase in enumerate(scenario.phases):
        where = f"phases[{index}]"
        if (phase.rate is None) == (phase.concurrency is None):
            raise ScenarioError(f"{where} must have rate or concurrency, and not both")
        if phase.rate_to is not None and phase.rate is None:
            raise ScenarioError(f"{where}.rate_to is given without rate")
        for text in phase.text:
            if text not in TEXTS:
                raise ScenarioError(f"{where}.text has {text[:60]!r}, but it must be of {', '.join(TEXTS)}")
        if not sum(phase.text.values()) > 0:
            raise ScenarioError(f"{where}.text has no weight above 0")
    for name in scenario.policies:
        if name not in NAMES:
            raise ScenarioError(f"policies has {name[:60]!r}, but it must be of {', '.join(NAMES)}")
    for index, fault in enumerate(scenario.faults):
        if fault.expert >= scenario.model.experts:
            raise ScenarioError(f"faults[{index}].expert is {fault.expert}, but there are {scenario.model.experts}")
        if fault.at_s >= scenario.duration_s:
            raise ScenarioError(f"faults[{index}].at_s is {fault.at_s:g}, but it ends at {scenario.duration_s:g}")
    if scenario.max_num_seqs > scenario.max_num_batched_tokens:
        raise ScenarioError(
            f"max_num_seqs is {scenario.max_num_seqs}, but it must be at most max_num_batched_tokens "
            f"({scenario.max_num_batched_tokens})"
        )
    scale = scenario.hosts.autoscale
    if scale is not None and not scale.min <= scenario.hosts.count <= scale.max:
        raise ScenarioError(
            f"hosts.count is {scenario.hosts.count}, but hosts.autoscale goes from {scale.min} to {scale.max}"
        )


def _at(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _shown(value: Any) -> str:
    return repr(value)[:60]
