"""Fields of a component's config: null where a number belongs, and fields that nobody knows."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from jaxalign import checks
from jaxalign.checks import kinds
from jaxalign.diffusion import schedulers
from jaxalign.models.networks import clip, unet, vae


class Fields(NamedTuple):
  """What is known of the fields of a component's config.

  known: every field, with the value that a file without it means.
  kinds: of those that a network reads, what kind of value they have.
  fixed: of those that it does not have, the values that change nothing.
  complete: whether all fields are known; others have fields that play no part here.
  filled: fields that are written down where a file leaves them out: once the same for all.
  """

  known: Mapping[str, Any]
  kinds: Mapping[str, Any]
  fixed: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
  complete: bool = True
  filled: tuple[str, ...] = ()


def of(
  config_class: Any,
  fixed: Mapping[str, tuple[Any, ...]] = MappingProxyType({}),
  *,
  complete: bool = True,
  filled: tuple[str, ...] = (),
) -> Fields:
  """The fields of a network's config, a dataclass, with its defaults.

  `fixed` are those that it has no field for, each with the values that are as if it were not there,
  the first of them for a file without it.
  """
  own = dataclasses.fields(config_class)
  defaults = {f.name: f.default for f in own if f.default is not dataclasses.MISSING}
  known = {**defaults, **{name: values[0] for name, values in fixed.items()}}
  return Fields(known, typing.get_type_hints(config_class), fixed, complete, filled)


VAE = of(
  vae.VAEConfig, {"latents_mean": (None,), "latents_std": (None,)}, filled=("scaling_factor",)
)
CLIP = of(clip.CLIPTextConfig, complete=False)
SCHEDULER = Fields(
  schedulers.DEFAULTS,
  schedulers.KINDS,
  complete=False,
)
# Of the components of a Stable Diffusion, by name.
COMPONENTS = {
  "unet": of(unet.UNetConfig, unet.FIXED),
  "vae": VAE,
  "text_encoder": CLIP,
  "text_encoder_2": CLIP,
  "scheduler": SCHEDULER,
}
# How like a known name another is that must be a slip, of 1.
_MISSPELLED = 0.85
# Null is a word of its own here, for a network without the part.
_NULL_IS_MEANT = ("norm_num_groups",)
# Fields that change nothing: how an average of the weights was kept (the state of diffusers'
# EMAModel). Those that change numbers are known: read, or refused unless they are as here.
_AVERAGE = frozenset(
  {
    *("decay", "min_decay", "inv_gamma", "power"),
    *("optimization_step", "update_after_step", "use_ema_warmup"),
  }
)


def clean(fields: Fields, config: Mapping[str, Any], file: str | os.PathLike) -> dict[str, Any]:
  """The config with defaults for nulls, and with no field that is unknown or changes nothing.

  Raises ValueError, naming the file and the field, for one that is misspelled or another kind of
  value, and for weights that are quantised.
  """
  if config.get("quantization_config"):
    raise ValueError(
      f"{file}: expected weights as they are computed with, found quantization_config\n"
      "take the model in float32, half precision or float8"
    )
  found = {name: value for name, value in config.items() if _is_known(fields, name)}
  for name in unknown(fields, config):
    _check_spelling(fields, name, config[name], file)
  for name, value in found.items():
    _check_kind(fields, name, value, file)
  filled = {name: fields.known[name] for name in fields.filled if name not in found}
  return {**{name: _value(fields, name, found[name]) for name in found}, **filled}


def unknown(fields: Fields, config: Mapping[str, Any]) -> list[str]:
  """The fields of which nobody here knows what they change; not those that are not set."""
  return [
    name
    for name, value in config.items()
    if not (_is_known(fields, name) or name in _AVERAGE or value is None or value is False)
  ]


def _is_known(fields: Fields, name: str) -> bool:
  known = not fields.complete or name in fields.known
  return known or name.startswith("_") or name == "quantization_config"


def _check_spelling(fields: Fields, name: str, value: Any, file: str | os.PathLike) -> None:
  """Raises ValueError for a field that is all but one that is known: that one would be missed."""
  near = difflib.get_close_matches(name, fields.known, n=1, cutoff=_MISSPELLED)
  if near:
    raise ValueError(
      f"{file}: unknown field {checks.cut(name, 60)}={checks.shown(value)}; "
      f'did you mean "{near[0]}"?\nmend it in the file, or take it out if it changes nothing'
    )


def _check_kind(fields: Fields, name: str, value: Any, file: str | os.PathLike) -> None:
  """Raises ValueError for another kind of value than a field has; null is its default."""
  read = name in fields.kinds
  is_list = isinstance(fields.known.get(name), tuple)
  if not read or (value is None and not is_list) or kinds.fits(value, fields.kinds[name]):
    return
  expected = kinds.in_words(fields.kinds[name])
  as_json = {"a tuple": "a list", "True or False": "true or false", "None": "null"}
  for ours, theirs in as_json.items():
    expected = expected.replace(ours, theirs)
  raise ValueError(
    f"{file}: expected {name} to be {expected}, found {checks.shown(value)}\nmend it in the file"
  )


def _value(fields: Fields, name: str, value: Any) -> Any:
  default = fields.known.get(name)
  if isinstance(value, int) and fields.kinds.get(name) in (float, float | None):
    return float(value)  # JAX takes a Python int for one of 32 bits
  if value is not None or name in _NULL_IS_MEANT or None in fields.fixed.get(name, ()):
    return value
  if isinstance(default, bool):
    return False  # diffusers asks whether it is true
  return default if isinstance(default, int | float | str) else None
