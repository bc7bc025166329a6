"""What flags change in a config: KEY=VALUE, of the kind that the field has.

A value is written as Python writes it. Text needs no quotes, and of the same key the last one
counts. A key that the config lacks may be one that its section's owner takes (`sections`).
"""

import ast
from collections.abc import Collection, Sequence
from typing import Any

from ml_collections import config_dict

from jaxalign import checks

_BOOLS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}


def apply(
  config: config_dict.ConfigDict, changes: Sequence[str], *, optional: Collection[str] = ()
) -> None:
  """Sets what `changes` say, in order; a key that is not there is added to its section.

  Raises ValueError for a section that is neither there nor `optional`, a value of another kind than
  the field's, a key without a value, and a section that is set after one of its fields.
  """
  done: list[str] = []
  for change in changes:
    key, equals, text = change.partition("=")
    for before in done:
      if before.startswith(f"{key}."):
        raise ValueError(
          f"config.{key} would undo config.{before}, which stands before it\ngive the section first"
        )
    _set(config, key, text if equals else None, optional)
    done.append(key)


def _set(
  config: config_dict.ConfigDict, key: str, text: str | None, optional: Collection[str]
) -> None:
  *parents, field = key.split(".")
  if not all((*parents, field)):
    raise ValueError(f"--config.{checks.cut(key, 80)}: expected --config.SECTION.KEY=VALUE")
  if (parents or [field])[0] not in (*config, *(optional if parents else ())):
    raise ValueError(f"config.{checks.cut(key, 80)}: there is no such field{_near(config, key)}")
  section = config
  for depth, name in enumerate(parents):
    if name not in section:
      with section.unlocked():
        section[name] = config_dict.ConfigDict()
    section = section[name]
    if not isinstance(section, config_dict.ConfigDict):
      there = ".".join(parents[: depth + 1])
      raise ValueError(
        f"config.{key}: expected config.{there} to be a section, found {checks.shown(section)}\n"
        f"set it as a whole, --config.{there}=VALUE"
      )
  what = f"config.{checks.cut(key, 120)}"
  if field in section and section.get_type(field) is not object:
    value = _of_kind(what, text, section.get(field))
  else:
    value = _of_any_kind(what, text, section.get(field))
  with section.unlocked(), section.ignore_type():
    section[field] = value


def _near(config: config_dict.ConfigDict, key: str) -> str:
  """The near miss among the fields, at whatever depth; or the sections that there are."""
  wanted = key.split(".")[-1]
  near = checks.closest(key, flat(config)) or checks.closest(key.split(".")[0], config)
  same = [field for field in flat(config) if field.split(".")[-1] == wanted]
  if not near and same:
    near = f'; did you mean "{same[0]}"?'
  return near or f"; there are {checks.first(config, count=30, limit=400)}"


def flat(config: config_dict.ConfigDict, prefix: str = "") -> list[str]:
  """Every field by its dotted key."""
  found = []
  for name, value in config.items():
    found.append(f"{prefix}{name}")
    if isinstance(value, config_dict.ConfigDict):
      found += flat(value, f"{prefix}{name}.")
  return found


def literal(what: str, text: str | None) -> Any:
  """A value as Python writes it, true and false too, or else the text itself."""
  if text is None:
    raise ValueError(f"{what}: expected a value, --{what}=VALUE")
  try:
    return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
  except (SyntaxError, ValueError, MemoryError, RecursionError, TypeError):
    return text


def _of_any_kind(what: str, text: str | None, now: Any) -> Any:
  """A value as it is written; what stands in the place of a text is none of 2024 but "2024"."""
  value = literal(what, text)
  return text if isinstance(now, str) and type(value) in (int, float) else value


def _of_kind(what: str, text: str | None, now: Any) -> Any:
  """The value of the kind that a field has now."""
  if isinstance(now, bool):
    if text is None:  # a bare --config.KEY
      return True
    if text.lower() not in _BOOLS:
      raise _unfit(what, "True or False", text)
    return _BOOLS[text.lower()]
  value = literal(what, text)
  assert text is not None
  if isinstance(now, str):
    return text
  if isinstance(now, int | float):
    kind, words = (int, "a whole number") if isinstance(now, int) else (float, "a number")
    try:
      return kind(text, 0) if kind is int else kind(text)
    except ValueError:
      raise _unfit(what, words, text) from None
  if isinstance(now, config_dict.ConfigDict):
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
      raise _unfit(what, "a section, \"{'name': VALUE, ...}\"", text)
    return config_dict.ConfigDict(value)
  if isinstance(now, tuple | list):
    return type(now)(_elements(what, text, value))
  return value


def _elements(what: str, text: str, value: Any) -> Sequence[Any]:
  """Those of a tuple; one by itself needs no parentheses."""
  if isinstance(value, tuple | list):
    return value
  if isinstance(value, str) and value == text and any(c in text for c in ",()[]{}'\""):
    raise _unfit(what, "a tuple as Python writes it, \"('a', 'b')\"", text)
  return (value,)


def _unfit(what: str, expected: str, text: str) -> ValueError:
  return ValueError(f"{what}: expected {expected}, got {checks.shown(text)}")
