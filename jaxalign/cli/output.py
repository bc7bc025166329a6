"""The flag that says where a command writes."""

import pathlib

from absl import flags

from jaxalign.cli import paths


def define(values: flags.FlagValues) -> None:
  """Defines --output."""
  help = "Folder to write to, made if needed; an older export there is replaced."
  paths.define("output", None, help, flag_values=values)


def folder(values: flags.FlagValues, default: str = "") -> pathlib.Path:
  """The value of --output; flags.Error if it has none and there is no default."""
  if not (values.output or default):
    raise flags.Error("expected --output=FOLDER")
  return values.output or paths.absolute(default)
