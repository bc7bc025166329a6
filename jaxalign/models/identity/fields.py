"""Fields of a component's config: null where a number belongs, and fields that nobody knows."""

import dataclasses
import difflib
import os
import typing
from collections.abc import Mapping
from typing import Any

from jaxalign import checks
from jaxalign.checks import kinds
from jaxalign.diffusion import schedulers
from jaxalign.models.networks import clip, sd3_transformer, t5, unet, vae


def _defaults(config_class: Any) -> dict[str, Any]:
  fields = dataclasses.fields(config_class)
  return {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}


# Every field that is known, with diffusers' default, by the kind of the config: a component's name,
# where only one network has it.
_KNOWN: dict[str, Mapping[str, Any]] = {
  "unet": {**_defaults(unet.UNetConfig), **{name: of[0] for name, of in unet.FIXED.items()}},
  "vae": {**_defaults(vae.VAEConfig), "latents_mean": None, "latents_std": None},
  "text_encoder": _defaults(clip.CLIPTextConfig),
  "text_encoder_2": _defaults(clip.CLIPTextConfig),
  "scheduler": schedulers.DEFAULTS,
  "sd3_transformer": _defaults(sd3_transformer.SD3Config),
  "t5": _defaults(t5.T5Config),
}
# Of those that a network reads, what kind of value they have.
_KINDS: dict[str, Mapping[str, Any]] = {
  "unet": typing.get_type_hints(unet.UNetConfig),
  "vae": typing.get_type_hints(vae.VAEConfig),
  "text_encoder": typing.get_type_hints(clip.CLIPTextConfig),
  "text_encoder_2": typing.get_type_hints(clip.CLIPTextConfig),
  "scheduler": {name: type(default) for name, default in schedulers.DEFAULTS.items()},
  "sd3_transformer": typing.get_type_hints(sd3_transformer.SD3Config),
  "t5": typing.get_type_hints(t5.T5Config),
}
# Components of which every field is known; others have fields that play no part here.
_COMPLETE = ("unet", "vae", "sd3_transformer")
# Fields that are written down where a file leaves them out: they used to be the same for all.
_FILLED = {"vae": ("scaling_factor",)}
# How like a known name another is that must be a slip, of 1.
_MISSPELLED = 0.85
# Null is a word of its own here, for a network without the part.
_NULL_IS_MEANT = ("norm_num_groups",)
# Fields that change nothing: how an average of the weights was kept (the state of diffusers'
# EMAModel). Those that change numbers are in _KNOWN: read, or refused unless they are as here.
_AVERAGE = frozenset(
  {
    *("decay", "min_decay", "inv_gamma", "power"),
    *("optimization_step", "update_after_step", "use_ema_warmup"),
  }
)


def clean(kind: str, config: Mapping[str, Any], file: str | os.PathLike) -> dict[str, Any]:
  """The config with defaults for nulls, and with no field that is unknown or changes nothing.

  Raises ValueError, naming the file and the field, for one that is misspelled or another kind of
  value, and for weights that are quantised.
  """
  if config.get("quantization_config"):
    raise ValueError(
      f"{file}: expected weights as they are computed with, found quantization_config\n"
      "take the model in float32, half precision or float8"
    )
  known = _KNOWN[kind]
  found = {name: value for name, value in config.items() if _is_known(kind, name)}
  for name in unknown(kind, config):
    _check_spelling(kind, name, config[name], file)
  for name, value in found.items():
    _check_kind(kind, name, value, file)
  filled = {name: known[name] for name in _FILLED.get(kind, ()) if name not in found}
  return {**{name: _value(kind, name, found[name]) for name in found}, **filled}


def unknown(kind: str, config: Mapping[str, Any]) -> list[str]:
  """The fields of which nobody here knows what they change; not those that are not set."""
  return [
    name
    for name, value in config.items()
    if not (_is_known(kind, name) or name in _AVERAGE or value is None or value is False)
  ]


def _is_known(kind: str, name: str) -> bool:
  known = kind not in _COMPLETE or name in _KNOWN[kind]
  return known or name.startswith("_") or name == "quantization_config"


def _check_spelling(kind: str, name: str, value: Any, file: str | os.PathLike) -> None:
  """Raises ValueError for a field that is all but one that is known: that one would be missed."""
  near = difflib.get_close_matches(name, _KNOWN[kind], n=1, cutoff=_MISSPELLED)
  if near:
    raise ValueError(
      f"{file}: unknown field {checks.cut(name, 60)}={checks.shown(value)}; "
      f'did you mean "{near[0]}"?\nmend it in the file, or take it out if it changes nothing'
    )


def _check_kind(kind: str, name: str, value: Any, file: str | os.PathLike) -> None:
  """Raises ValueError for another kind of value than a field has; null is its default."""
  known = name in _KINDS[kind]
  is_list = isinstance(_KNOWN[kind].get(name), tuple)
  if not known or (value is None and not is_list) or kinds.fits(value, _KINDS[kind][name]):
    return
  expected = kinds.in_words(_KINDS[kind][name])
  as_json = {"a tuple": "a list", "True or False": "true or false", "None": "null"}
  for ours, theirs in as_json.items():
    expected = expected.replace(ours, theirs)
  raise ValueError(
    f"{file}: expected {name} to be {expected}, found {checks.shown(value)}\nmend it in the file"
  )


def _value(kind: str, name: str, value: Any) -> Any:
  default = _KNOWN[kind].get(name)
  if value is not None or name in _NULL_IS_MEANT:
    return value
  if kind == "unet" and None in unet.FIXED.get(name, ()):
    return None
  if isinstance(default, bool):
    return False  # diffusers asks whether it is true
  return default if isinstance(default, int | float) else None
