"""The flag that says where a command writes."""

import pathlib

from absl import flags

from jaxalign.cli import paths

_OUTPUT = paths.define(
  "output", None, "Folder to write to, made if needed; an older export there is replaced."
)


def folder(default: str = "") -> pathlib.Path:
  """The value of --output; flags.Error if it has none and there is no default."""
  if not (_OUTPUT.value or default):
    raise flags.Error("expected --output=FOLDER")
  return _OUTPUT.value or paths.absolute(default)
