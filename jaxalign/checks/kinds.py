"""Values against annotations: whether what a config says is what a function asks for, in words."""

import inspect
import math
import numbers
import os
import pathlib
import types
import typing
from collections import abc
from collections.abc import Callable
from typing import Any

_SEQUENCES = (tuple, list, abc.Sequence, abc.Iterable, abc.Collection)
_MAPPINGS = (dict, abc.Mapping, abc.MutableMapping)
_PATHS = (os.PathLike, pathlib.Path)
_WORDS = {
  float: "a number",
  int: "a whole number",
  bool: "True or False",
  str: "text",
  type(None): "None",
  None: "None",
  os.PathLike: "a path",
  pathlib.Path: "a path",
}


def signature(function: Callable) -> inspect.Signature:
  """As `inspect.signature`, with annotations that are text read as what they stand for."""
  try:
    return inspect.signature(function, eval_str=True)
  except Exception:  # names that are there for a type checker alone
    return inspect.signature(function)


def fits(value: Any, annotation: Any) -> bool:
  """Whether a value is of an annotated kind; of kinds that no config can say, always."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  kind = origin or annotation
  if kind in (typing.Union, types.UnionType):
    return any(fits(value, one) for one in args)
  if kind is typing.Literal:
    return value in args
  if kind is float:
    if isinstance(value, int):
      return not isinstance(value, bool) and abs(value) < 2**1023  # what a float holds
    return _is_number(value, numbers.Real) and not math.isnan(value)
  if kind is int:  # what no array of integers holds is no size of anything
    return _is_number(value, numbers.Integral) and abs(value) < 2**63
  if kind is bool:
    return isinstance(value, bool) or type(value).__name__ == "bool_"
  if kind in (None, type(None)):
    return value is None
  if kind is str:
    return isinstance(value, str)
  if kind in _PATHS:
    return isinstance(value, os.PathLike)
  if kind in _MAPPINGS:
    return isinstance(value, abc.Mapping)
  if kind in _SEQUENCES:
    return _is_sequence(value, kind, args)
  return True


def in_words(annotation: Any) -> str:
  """What a kind is called in a message."""
  origin, args = typing.get_origin(annotation), typing.get_args(annotation)
  kind = origin or annotation
  if kind in (typing.Union, types.UnionType):
    return " or ".join(dict.fromkeys(in_words(one) for one in args))
  if kind is typing.Literal:
    return f"one of {', '.join(map(repr, args))}"
  if kind in _MAPPINGS:
    return "a section, {...}"
  if kind in _SEQUENCES:
    if kind is tuple and args and args[-1] is not Ellipsis:
      return f"a tuple, ({', '.join(in_words(one) for one in args)})"
    return f"a tuple, each {in_words(args[0])}" if args and args[0] is not Any else "a tuple"
  return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))


def _is_number(value: Any, kind: type) -> bool:
  return isinstance(value, kind) and not isinstance(value, bool)


def _is_sequence(value: Any, kind: Any, args: tuple) -> bool:
  if hasattr(value, "__array__"):
    return True
  if not isinstance(value, tuple | list):
    return False
  if kind is tuple and args and args[-1] is not Ellipsis:
    return len(value) == len(args) and all(map(fits, value, args))
  return not args or all(fits(one, args[0]) for one in value)
