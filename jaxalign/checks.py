"""Checks that turn a user's mistake into a message before anything expensive starts."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


def check_call(what: str, function: Callable, /, *args: Any, **kwargs: Any) -> None:
  """Raises ValueError unless `function(*args, **kwargs)` fits its signature; does not call it.

  A misspelt key is found here, at the start, and not after the first rollout.
  """
  signature = inspect.signature(function)
  try:
    signature.bind(*args, **kwargs)
  except TypeError as error:
    keys = list(signature.parameters)[len(args) :]
    hint = "".join(closest(key, keys) for key in kwargs if key not in keys)
    accepted = f"; valid keys: {', '.join(keys) or 'none'}"
    said = str(error).replace("keyword-only argument", "argument")  # as Python says from 3.12 on
    raise ValueError(f"{what}: {said}{hint}{accepted}") from error


def call_section(config: Mapping[str, Any], name: str, function: Callable, /, **given: Any) -> Any:
  """`function(**given, **config[name])`: the section of a config goes to the one that owns it.

  Raises ValueError naming the section, the key and its near miss if the two do not fit.
  """
  if name not in config:
    raise ValueError(f"config.{name} is missing; see configs/ for a config that has it")
  section = dict(config[name])
  check_call(f"config.{name}", function, **given, **section)
  return function(**given, **section)


def closest(word: str, options: Iterable[str]) -> str:
  """`; did you mean "..."?` for the nearest of the options, or nothing if none is near."""
  matches = difflib.get_close_matches(word, list(options), n=1)
  return f'; did you mean "{matches[0]}"?' if matches else ""


def check_choice(what: str, value: Any, options: Iterable[str]) -> None:
  """Raises ValueError unless `value` is one of the options."""
  options = list(options)
  if value not in options:
    raise ValueError(
      f"{what}: expected one of {', '.join(options)}, got {value!r}{closest(str(value), options)}"
    )


def shown(value: Any, limit: int = 80) -> str:
  """`repr(value)`, cut: a message stays readable whatever a file holds."""
  return cut(repr(value), limit)


def cut(text: str, limit: int) -> str:
  """The text, its end replaced by dots if it has more than `limit` characters."""
  return text if len(text) <= limit else f"{text[: limit - 3]}..."


def first_line(error: Exception) -> str:
  """What an error says first, or its kind if it says nothing: libraries go on for pages."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def in_one_line(error: Exception) -> str:
  """The kind of an error and all that it says."""
  return " ".join(f"{type(error).__name__}: {error}".split())


def first(entries: Iterable[str], *, count: int = 5, limit: int = 140) -> str:
  """The first few entries, and how many more there are, as one line of about `limit` characters."""
  entries = [cut(entry, limit) for entry in entries]
  listed = entries[:1]
  for entry in entries[1:count]:
    if len(", ".join([*listed, entry])) > limit:
      break
    listed.append(entry)
  more = len(entries) - len(listed)
  return ", ".join(listed) + (f", and {more} more" if more > 0 else "")


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


def find_function(
  what: str, name: str, table: Mapping[str, Callable[..., Any]], *, unknown: str
) -> Callable[..., Any]:
  """`table[name]`, or the user's own function that "package.module:function" stands for.

  Raises ValueError, which starts with `unknown`, and lists the names of the table, if there is no
  such name; or as `load_function(what, name)` does.
  """
  if ":" in name:
    return load_function(what, name)
  if name in table:
    return table[name]
  raise ValueError(
    f"{unknown}{closest(name, table)}\n"
    f'Valid names: {", ".join(table)}, or your own function as "package.module:function".'
  )


def load_function(what: str, name: str) -> Callable:
  """Imports the user's own function that `name`, "package.module:function", stands for.

  Raises ValueError, which starts with `what` and the name, if there is no such function.
  """
  module_name, _, function_name = name.partition(":")
  if not (module_name and function_name.isidentifier()):
    raise ValueError(f'{what} "{name}": expected "package.module:function"')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # importing runs the user's code, which may raise anything
    reason = in_one_line(error)
    raise ValueError(
      f'{what} "{name}": could not import module "{module_name}": {reason}\n'
      "Run from the folder that holds it, or put that folder on PYTHONPATH."
    ) from error
  if not hasattr(module, function_name):
    raise ValueError(
      f'{what} "{name}": module "{module_name}" has no "{function_name}"'
      f"{closest(function_name, vars(module))}"
    )
  function = getattr(module, function_name)
  if not callable(function):
    raise ValueError(f'{what} "{name}": expected a function, got {type(function).__name__}')
  return function
