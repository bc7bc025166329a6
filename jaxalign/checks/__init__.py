"""Checks that turn a user's mistake into a message before anything expensive starts."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jaxalign.checks import kinds
from jaxalign.checks.own_code import find_function, load_function
from jaxalign.checks.text import brief, closest, cut, first, first_line, in_one_line, shown

MOST = 2**24  # of what a config counts; more is a slip of the finger

__all__ = [
  "MOST",
  "brief",
  "call_section",
  "check_call",
  "check_choice",
  "check_finite",
  "check_range",
  "check_section",
  "check_seed",
  "closest",
  "cut",
  "find_function",
  "first",
  "first_line",
  "in_one_line",
  "load_function",
  "shown",
]


def check_call(what: str, function: Callable, /, *args: Any, **kwargs: Any) -> None:
  """Raises ValueError unless `function(*args, **kwargs)` fits its signature; does not call it.

  A misspelt key, or text where a number belongs, is found here, at the start, and not after the
  first rollout.
  """
  _check(what, function, args, {}, kwargs)


def call_section(config: Mapping[str, Any], name: str, function: Callable, /, **given: Any) -> Any:
  """`function(**given, **config[name])`: the section of a config goes to the one that owns it.

  Raises ValueError naming the section, the key and its near miss if the two do not fit.
  """
  if name not in config:
    raise ValueError(f"config.{name} is missing; see configs/ for a config that has it")
  section = check_section(f"config.{name}", config[name], function, **given)
  return function(**given, **section)


def check_section(
  what: str, section: Any, function: Callable, /, *args: Any, **given: Any
) -> dict[str, Any]:
  """The section as a dictionary; ValueError unless `function(*args, **given, **section)` fits."""
  if not isinstance(section, Mapping) or not all(isinstance(key, str) for key in section):
    raise ValueError(f"{what}: expected a section, {{'key': value, ...}}, got {shown(section)}")
  _check(what, function, args, given, section)
  return dict(section)


def _check(
  what: str,
  function: Callable,
  args: tuple,
  given: Mapping[str, Any],
  section: Mapping[str, Any],
) -> None:
  """As `check_call`, of arguments that the caller gives and a section that a user wrote."""
  signature = kinds.signature(function)
  parameters = signature.parameters
  keys = [key for key in list(parameters)[len(args) :] if key not in given]
  rest = [p for p in parameters.values() if p.kind is p.VAR_KEYWORD]
  unknown = [key for key in section if key not in keys and not (rest and key not in given)]
  try:
    if given.keys() & section.keys():
      raise TypeError(f"got an unexpected keyword argument {unknown[0]!r}")
    signature.bind(*args, **given, **section)
  except TypeError as error:
    hint = "".join(closest(key, keys) for key in unknown[:1])
    accepted = f"; valid keys: {', '.join(keys) or 'none'}"
    said = str(error).replace("keyword-only argument", "argument")  # as Python says from 3.12 on
    raise ValueError(f"{what}: {said}{hint}{accepted}") from error
  for key, value in section.items():
    annotation = parameters[key].annotation if key in parameters else rest[0].annotation
    if not kinds.fits(value, annotation):
      where = f"{what}, {key}" if " " in what else f"{what}.{key}"
      raise ValueError(f"{where}: expected {kinds.in_words(annotation)}, got {shown(value)}")


def check_choice(what: str, value: Any, options: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of the options."""
  options = list(options)
  if value not in options:
    near = closest(str(value), options)
    raise ValueError(f"{what}: expected one of {', '.join(options)}, got {shown(value)}{near}")


def check_range(what: str, value: float, low: float, high: float = math.inf) -> None:
  """Raises ValueError unless `low <= value < high`; nothing is as high as an inf."""
  if not low <= value < high:
    below = "" if high == math.inf else f" and below {high}"
    raise ValueError(f"{what}: expected at least {low}{below}, got {shown(value)}")


def check_seed(what: str, seed: int) -> None:
  """Raises ValueError unless `seed` fits in the 31 bits that numpy and JAX both take."""
  if not 0 <= seed < 2**31:
    raise ValueError(f"{what}: expected a seed from 0 to {2**31 - 1}, got {seed}")


def check_finite(what: str, array: np.ndarray, remedy: str) -> None:
  """Raises ValueError, which starts with `what` and ends with `remedy`, for a NaN or an inf.

  `array` is contiguous and of floating point. One pass over it, and no copy.
  """
  flat = array.reshape(-1)
  with np.errstate(all="ignore"):
    squares = np.dot(flat, flat)  # not finite if an element is not, or if large ones overflow
  if np.isfinite(squares):
    return
  bad = array.size - int(np.isfinite(array).sum())
  if bad:
    raise ValueError(
      f"{what}: expected finite numbers, found {bad} of {array.size} that are NaN or inf\n{remedy}"
    )
