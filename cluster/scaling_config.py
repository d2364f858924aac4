"""What an operator may choose about growing and shrinking: a part of `ClusterConfig`, and what is made of it.

Hosts, coordinators and ingresses each have a least and a most; without them there are as many as the other fields say.
What follows load how is decided in `autoscale`, `coordinator_count` and, for ingresses, Ray Serve.
"""

import math
from dataclasses import dataclass, fields
from types import NoneType
from typing import Any, get_args, get_type_hints

from cluster.autoscale import Autoscaled
from cluster.config_error import ConfigError
from cluster.coordinator_count import CountPolicy
from cluster.hosts_wanted import HostLimits
from cluster.layout import FloatArray
from cluster.policies import policy_named
from cluster.policy import Policy

# Inclusive limits of every number.
_LIMITS: dict[str, tuple[float, float]] = {
    "min_expert_hosts": (1, 4096),
    "max_expert_hosts": (1, 4096),
    "host_timeout_s": (1, 86_400),
    "min_copies": (1, 64),
    "max_copies": (1, 4096),
    "target_busy_share": (0.05, 0.95),
    "target_tokens_per_s": (1e-3, 1e12),
    "min_coordinators": (1, 64),
    "max_coordinators": (1, 64),
    "target_coordinator_used": (0.05, 0.95),
    "min_ingresses": (1, 64),
    "max_ingresses": (1, 64),
    "target_ingress_requests": (1, 65_536),
    "scale_up_s": (0.1, 86_400),
    "scale_down_s": (0.1, 86_400),
}
_PAIRS = ("expert_hosts", "coordinators", "ingresses")


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressScaling:
    """How many ingresses Ray Serve keeps: about one for each `target_requests` that are under way."""

    min_ingresses: int
    max_ingresses: int
    first: int
    target_requests: int
    up_s: float
    down_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingConfig:
    """The fields. A least and a most are given together, or neither; then nothing of that kind is scaled.

    `min_expert_hosts` to `max_expert_hosts` are Ray nodes with the resource `octavo_expert_host`, asked of Ray's
    autoscaler; the most must not be above what that may start, for it does nothing at all where it cannot do all.
    One that has not come in `host_timeout_s` is not waited for. A policy keeps `min_copies` to `max_copies` of every
    expert (None: as many as help), at least two where there is room.

    Targets: steps wait for experts `target_busy_share` of the time. With `target_tokens_per_s` experts do not count
    by the time that they take but by their tokens: so many of them (each layer counts) in a second keep a replica as
    busy as that. Coordinators are `target_coordinator_used` full (of KV blocks or of sequences), ingresses have
    `target_ingress_requests` under way. More is asked for at once and then not again for `scale_up_s`; less only when
    that would have sufficed for `scale_down_s`.

    `policy_options` are parameters of the balancing policy, as `name=value, name=value`: fields of its dataclass.
    """

    min_expert_hosts: int | None = None
    max_expert_hosts: int | None = None
    host_timeout_s: float = 300.0
    min_copies: int = 1
    max_copies: int | None = None
    target_busy_share: float = 0.7
    target_tokens_per_s: float | None = None
    min_coordinators: int | None = None
    max_coordinators: int | None = None
    target_coordinator_used: float = 0.8
    min_ingresses: int | None = None
    max_ingresses: int | None = None
    target_ingress_requests: int = 64
    scale_up_s: float = 15.0
    scale_down_s: float = 300.0
    policy_options: str = ""

    def check_scaling(self, *, coordinators: int, ingresses: int) -> None:
        """Raises ConfigError. The arguments are how many there are at first."""
        hints = get_type_hints(ScalingConfig)
        for entry in fields(ScalingConfig):
            if entry.name in _LIMITS:
                _check_number(entry.name, getattr(self, entry.name), hints[entry.name])
        for pair in _PAIRS:
            first = {"coordinators": coordinators, "ingresses": ingresses}.get(pair)
            _check_pair(pair, getattr(self, f"min_{pair}"), getattr(self, f"max_{pair}"), first)
        if self.max_copies is not None and self.max_copies < self.min_copies:
            raise ConfigError(f"max_copies is {self.max_copies}, but must be at least min_copies ({self.min_copies})")
        parse_options(self.policy_options)

    @property
    def host_limits(self) -> HostLimits | None:
        """How many hosts may be asked for; None where none are."""
        if self.min_expert_hosts is None or self.max_expert_hosts is None:
            return None
        return HostLimits(
            min_hosts=self.min_expert_hosts, max_hosts=self.max_expert_hosts, timeout_s=self.host_timeout_s
        )

    @property
    def count_policy(self) -> CountPolicy | None:
        """How the number of coordinators follows load; None where it is fixed."""
        if self.min_coordinators is None or self.max_coordinators is None:
            return None
        return CountPolicy(
            min_coordinators=self.min_coordinators,
            max_coordinators=self.max_coordinators,
            target_used=self.target_coordinator_used,
            up_s=min(10.0, self.scale_up_s),
            cooldown_s=self.scale_up_s,
            down_s=self.scale_down_s,
        )

    def ingress_scaling(self, first: int) -> IngressScaling | None:
        """How Ray Serve scales the ingresses, `first` of them at first; None where their number is fixed."""
        if self.min_ingresses is None or self.max_ingresses is None:
            return None
        return IngressScaling(
            min_ingresses=self.min_ingresses,
            max_ingresses=self.max_ingresses,
            first=first,
            target_requests=self.target_ingress_requests,
            up_s=self.scale_up_s,
            down_s=self.scale_down_s,
        )

    def policy(self, name: str, *, budget_bytes: int) -> Policy:
        """The shipped policy with these options, between these copies; with hosts where they are scaled.

        Raises ConfigError.
        """
        try:
            policy = policy_named(
                name,
                budget_bytes=budget_bytes,
                options=parse_options(self.policy_options),
                min_copies=self.min_copies,
                max_copies=self.max_copies,
            )
        except ValueError as error:
            raise ConfigError(f"policy_options: {error}") from None
        return self.scaled(policy)

    def shown_work(self, work_LE: FloatArray, tokens_LE: FloatArray) -> FloatArray:
        """What policies are shown of experts that work `work_LE` of the time at `tokens_LE` tokens per second.

        Shape (L, E); that they work, or where a replica's target is in tokens, what that is at this target.
        """
        if self.target_tokens_per_s is None:
            return work_LE
        shown_LE: FloatArray = tokens_LE * (self.target_busy_share / self.target_tokens_per_s)
        return shown_LE

    def scaled(self, policy: Policy) -> Policy:
        """Any policy, with hosts where they are scaled."""
        limits = self.host_limits
        if limits is None:
            return policy
        return Autoscaled(
            inner=policy,
            min_hosts=limits.min_hosts,
            max_hosts=limits.max_hosts,
            target_share=self.target_busy_share,
            up_cooldown_s=self.scale_up_s,
            down_window_s=self.scale_down_s,
            host_timeout_s=self.host_timeout_s,
        )


def parse_options(text: str) -> dict[str, float]:
    """`name=value, name=value` as numbers by name. Raises ConfigError."""
    options: dict[str, float] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name.isidentifier() or not math.isfinite(number) or name in options:
            raise ConfigError(f"policy_options has {part!r}, but must be name=number, name=number, each name once")
        options[name] = number
    return options


def _check_number(name: str, value: object, hint: Any) -> None:
    kinds = get_args(hint) or (hint,)
    if value is None and NoneType in kinds:
        return
    low, high = _LIMITS[name]
    whole = int in kinds
    right = type(value) is int if whole else isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high:  # type: ignore[operator]
        kind = "a whole number" if whole else "a number"
        raise ConfigError(f"{name} is {value!r}, but must be {kind} from {low:g} to {high:g}")


def _check_pair(kind: str, least: int | None, most: int | None, first: int | None) -> None:
    if (least is None) != (most is None):
        given, missing = ("max", "min") if least is None else ("min", "max")
        raise ConfigError(f"{given}_{kind} is given without {missing}_{kind}; {kind} are scaled between two limits")
    if least is None or most is None:
        return
    if least > most:
        raise ConfigError(f"min_{kind} is {least}, but must be at most max_{kind} ({most})")
    if first is not None and not least <= first <= most:
        raise ConfigError(f"{kind} is {first}, but must be from min_{kind} ({least}) to max_{kind} ({most})")
