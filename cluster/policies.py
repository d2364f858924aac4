"""The policies by name, for a configuration or a command line; a plug-in is any function of the same form."""

from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from types import MappingProxyType
from typing import Any, cast, get_type_hints

from cluster.eplb import Eplb
from cluster.incremental import Incremental
from cluster.layout_draft import MANY_COPIES
from cluster.policy import Policy
from cluster.predictive import Predictive
from cluster.reactive import Reactive, static
from cluster.retries import WithPauses

_MAKERS: Mapping[str, Callable[[int], Policy]] = MappingProxyType(
    {
        "static": lambda budget: static,
        "reactive": lambda budget: Reactive(budget_bytes=budget),
        "eplb": lambda budget: Eplb(),
        "incremental": lambda budget: Incremental(budget_bytes=budget),
        "predictive": lambda budget: Predictive(inner=Incremental(budget_bytes=budget)),
    }
)
NAMES = tuple(_MAKERS)


def policy_named(
    name: str,
    *,
    budget_bytes: int,
    options: Mapping[str, float] = MappingProxyType({}),
    min_copies: int = 1,
    max_copies: int | None = None,
) -> Policy:
    """A shipped policy; failed copies pause in each. `options` are its dataclass's fields, or those of a policy in it.

    `static`, which changes nothing, takes no notice of the limits of copies. Raises ValueError for another name, an
    option that it does not have, or a value that it refuses.
    """
    if name not in _MAKERS:
        raise ValueError(f"policy is {name!r}, but it must be one of {', '.join(NAMES)}")
    limits = {"min_copies": min_copies, "max_copies": MANY_COPIES if max_copies is None else max_copies}
    policy: Policy
    policy, unused = _with_options(WithPauses(inner=_MAKERS[name](budget_bytes)), {**limits, **options})
    unused -= limits.keys() - options.keys()
    if unused:
        known = ", ".join(sorted(_option_names(policy))) or "none"
        raise ValueError(f"policy {name} has no option {min(unused)!r}; it has {known}")
    return policy


def _with_options(policy: Any, options: Mapping[str, float]) -> tuple[Policy, set[str]]:
    """The policy with these options, down to the innermost one, and names that nobody has."""
    if not is_dataclass(policy):
        return policy, set(options)
    kinds = _numbers(policy)
    changes: dict[str, Any] = {key: _as(kinds[key], key, value) for key, value in options.items() if key in kinds}
    unused = options.keys() - changes.keys()
    inner = getattr(policy, "inner", None)
    if inner is not None:
        changes["inner"], unused = _with_options(inner, {key: options[key] for key in unused})
    return cast(Policy, replace(policy, **changes)), set(unused)  # type: ignore[type-var]


def _option_names(policy: Any) -> set[str]:
    if not is_dataclass(policy):
        return set()
    return {*_numbers(policy), *_option_names(getattr(policy, "inner", None))}


def _numbers(policy: object) -> dict[str, type]:
    """Options of one policy: its fields that are numbers. What a round may load is decided by who runs it."""
    hints = get_type_hints(type(policy))
    return {key: hint for key, hint in hints.items() if hint in (int, float) and key != "budget_bytes"}


def _as(kind: type, name: str, value: float) -> float:
    if kind is int and value != int(value):
        raise ValueError(f"{name} is {value:g}, but must be a whole number")
    return int(value) if kind is int else float(value)
