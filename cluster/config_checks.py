"""Checks of single configuration values; every one raises ConfigError naming field, value and limit.

What two fields have to do with each other is checked where the fields are.
"""

import math

from cluster.config_error import ConfigError


def check_int(name: str, value: object, limits: tuple[int, int], *, optional: bool) -> None:
    """A whole number from `limits[0]` to `limits[1]`, or None where the field is optional."""
    if value is None and optional:
        return
    low, high = limits
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}, but must be a whole number from {low} to {high}")


def check_seconds(name: str, value: object, bounds: tuple[float, float]) -> None:
    """A number of seconds above `bounds[0]`, at most `bounds[1]`."""
    low, high = bounds
    if isinstance(value, bool) or not isinstance(value, int | float) or not low < value <= high:
        raise ConfigError(f"{name} is {value!r}, but must be more than {low:g} and at most {high:g} seconds")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """One of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}, but must be one of {', '.join(choices)}")


def check_flag(name: str, value: object) -> None:
    """A bool, not what merely counts as one."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, but must be true or false")


def check_text(name: str, value: object, *, optional: bool) -> None:
    """A text that is not blank, or None where the field is optional; a secret is not repeated in the error."""
    if value is None and optional:
        return
    if not isinstance(value, str) or not value.strip():
        shown = "given" if name == "auth_token" else repr(value)
        raise ConfigError(f"{name} is {shown}, but must be a text that is not empty")


def check_gpus(value: object) -> None:
    """GPUs of one actor: a share of one, or a whole number; None leaves it to the device."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"expert_num_gpus is {value!r}, but must be a number or absent")
    if not 0 <= value <= 16 or (value > 1 and value != int(value)):
        raise ConfigError(f"expert_num_gpus is {value!r}, but must be from 0 to 16 and whole above 1")
