"""Paths as users write them: with ~, or relative to the folder that a command starts in.

They are made absolute once, where they come in, and are kept so: a run is found again from any
folder, and what was a folder here is never looked for on the hub.
"""

import glob
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from absl import flags
from ml_collections import config_dict

from jaxalign.data import records
from jaxalign.models.weights import hub

# Fields of a config, of whichever section, that may name a file or a folder.
FIELDS = ("path", "tokenizer", "configs", "source", "validation", "held_out", "init_from")


class PathParser(flags.ArgumentParser):
  """The value of a flag as an absolute path; an empty one is None."""

  def parse(self, argument: Any) -> pathlib.Path | None:
    return absolute(argument) if argument else None

  def flag_type(self) -> str:
    return "path"


def define(name: str, default: str | None, help: str, **options: Any) -> flags.FlagHolder:
  """A flag that is a path, `pathlib.Path` or None; `options` as of `flags.DEFINE`."""
  serializer = flags.ArgumentSerializer()
  return flags.DEFINE(PathParser(), name, default, help, serializer=serializer, **options)


def absolute(path: str | os.PathLike) -> pathlib.Path:
  """The path from the root, with the home folder for ~; ValueError where there is none.

  Links in it stay as they are written, but before a "..", which is of what they lead to.
  """
  try:
    found = pathlib.Path(path).expanduser().absolute()
    return found.resolve() if ".." in found.parts else found
  except RuntimeError as error:  # no such user, or no HOME
    raise ValueError(f"{path}: expected a path, found a ~ without a home folder") from error


def make_absolute(config: config_dict.ConfigDict) -> None:
  """The paths in a config made absolute; names of embedded sets, hub ids and functions stay."""
  with config.unlocked():
    for key, value in config.items():
      config[key] = _absolute_in(key, value)


def _absolute_in(key: str, value: Any) -> Any:
  if isinstance(value, config_dict.ConfigDict):
    make_absolute(value)
    return value
  if isinstance(value, Mapping):
    return {name: _absolute_in(name, one) for name, one in value.items()}
  if isinstance(value, tuple | list):
    return type(value)(_absolute_in(key, one) for one in value)
  return of_field(value) if key in FIELDS and isinstance(value, str) else value


def of_field(value: str) -> str:
  """What a field of a config has, as an absolute path if it is one."""
  if not value or value in hub.EMBEDDED or value in records.NAMED:
    return value
  # What is not there may be a hub id, unless it is written as only paths are.
  is_path = value.startswith(("~", "/", "./", "../")) or os.path.exists(value)
  is_pattern = glob.has_magic(value) and any(glob.iglob(value, recursive=True))
  return str(absolute(value)) if is_path or is_pattern else value
