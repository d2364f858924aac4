"""Read the rotary embedding's base and scaling from a model configuration.

Three spellings are known: `rope_theta` with `rope_scaling` (transformers 4), `rope_parameters` (transformers
5) and Mistral's `rope_theta` with `yarn`. What the numbers do to the frequencies is `model.rope`'s work.
"""

import math
from typing import Literal

from model.config import RopeScaling
from model.storage.config_fields import Fields

_KINDS: dict[str, Literal["linear", "dynamic", "llama3", "yarn"]] = {
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
}
_IGNORED = frozenset({"finetuned"})  # a remark on how the weights were made


def rope_from_hugging_face(fields: Fields, max_context: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling from config.json. Both spellings may stand side by side where they agree."""
    names = [name for name in ("rope_scaling", "rope_parameters") if fields.states(name)]
    if len(names) == 2 and fields.value("rope_scaling") != fields.value("rope_parameters"):
        raise fields.problem("rope_scaling", "and field 'rope_parameters' disagree; keep one")
    parameters = fields.object(names[-1]) if names else None
    inner = None if parameters is None else parameters.optional_positive("rope_theta")
    if inner is not None and fields.states("rope_theta") and fields.positive("rope_theta") != inner:
        raise fields.problem("rope_theta", f"disagrees with '{names[-1]}.rope_theta' ({inner})")
    theta = _theta(fields, "Llama and Llama 2 were trained with 10000.0") if inner is None else inner
    if parameters is None:
        return theta, None
    refuse_partial_rotary(parameters)
    return theta, _scaling(fields, parameters, max_context)


def refuse_partial_rotary(fields: Fields) -> None:
    """Refuse heads of which only a part is rotated."""
    part = fields.optional_positive("partial_rotary_factor")
    if part not in (None, 1.0):
        raise fields.problem("partial_rotary_factor", f"is {part}; only whole heads are rotated here")


def mistral_rope(fields: Fields) -> tuple[float, RopeScaling | None]:
    """Base and scaling from params.json; `alpha` and `beta` are its names for YaRN's slow and fast bounds."""
    theta = _theta(fields, "Mixtral was trained with 1000000.0, Mistral 7B v0.1 with 10000.0")
    if not fields.states("yarn"):
        return theta, None
    yarn = fields.object("yarn")
    scaling = RopeScaling(
        kind="yarn",
        factor=yarn.positive("factor"),
        original_max_context=yarn.integer("original_max_position_embeddings"),
        beta_fast=yarn.positive("beta"),
        beta_slow=yarn.positive("alpha"),
        attention_factor=None if yarn.boolean("apply_scale", absent=True) else 1.0,
    )
    yarn.refuse_unread()
    return theta, scaling


def _theta(fields: Fields, known: str) -> float:
    """The base. Early files leave it out, and the programs that read them disagree on what that means."""
    if not fields.has("rope_theta"):
        raise fields.problem("rope_theta", f"is missing; state the base that the model was trained with ({known})")
    return fields.positive("rope_theta")


def _scaling(fields: Fields, parameters: Fields, max_context: int) -> RopeScaling | None:
    spelling = "rope_type" if parameters.states("rope_type") else "type"
    name = parameters.value(spelling) if parameters.states(spelling) else "default"
    if parameters.states("type") and parameters.value("type") != name:
        raise parameters.problem("type", f"disagrees with rope_type ({name!r})")
    if name == "default":
        parameters.refuse_unread(_IGNORED)
        return None
    if not isinstance(name, str) or name not in _KINDS:
        raise parameters.problem(spelling, f"{name!r} is unknown; known: default, {', '.join(_KINDS)}")
    factor = parameters.positive("factor")
    if name == "llama3":
        scaling = _llama3(fields, parameters, factor)
    elif name == "yarn":
        scaling = _yarn(fields, parameters, factor)
    else:
        scaling = RopeScaling(kind=_KINDS[name], factor=factor, original_max_context=max_context)
    parameters.refuse_unread(_IGNORED)
    return scaling


def _llama3(fields: Fields, parameters: Fields, factor: float) -> RopeScaling:
    return RopeScaling(
        kind="llama3",
        factor=factor,
        original_max_context=_original_context(fields, parameters),
        low_freq_factor=parameters.positive("low_freq_factor"),
        high_freq_factor=parameters.positive("high_freq_factor"),
    )


def _yarn(fields: Fields, parameters: Fields, factor: float) -> RopeScaling:
    """YaRN; the paper (arXiv 2309.00071, section 3.4) fixes the bounds and the factor that are not stated."""
    if not parameters.boolean("truncate", absent=True):
        raise parameters.problem("truncate", "is false; only whole correction bounds are supported")
    attention_factor = parameters.optional_positive("attention_factor")
    mscale, mscale_all = (
        parameters.optional_positive("mscale"),
        parameters.optional_positive("mscale_all_dim"),
    )
    if attention_factor is None and mscale is not None and mscale_all is not None:
        attention_factor = _magnitude(factor, mscale) / _magnitude(factor, mscale_all)
    return RopeScaling(
        kind="yarn",
        factor=factor,
        original_max_context=_original_context(fields, parameters),
        beta_fast=parameters.optional_positive("beta_fast") or 32.0,
        beta_slow=parameters.optional_positive("beta_slow") or 1.0,
        attention_factor=attention_factor,
    )


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _original_context(fields: Fields, parameters: Fields) -> int:
    """The context before scaling; written at the top level, it wins, as in transformers."""
    name = "original_max_position_embeddings"
    inner = parameters.optional_integer(name)
    if fields.states(name):
        return fields.integer(name)
    if inner is None:
        raise parameters.problem(name, "is missing")
    return inner
