"""The answer to *what model is this*: configs as they are used, and what was changed in them."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from jaxalign import checks

Configs = dict[str, dict[str, Any]]  # by component; "scheduler" and "pipeline" too

_ABSENT = object()
# What a warning has room for.
_MAX_LINES, _MAX_LINE, _MAX_PATH, _MAX = 4, 150, 90, 600


class Note(NamedTuple):
  """One thing that was assumed or corrected: the component, and the words."""

  component: str
  what: str


class Identity(NamedTuple):
  """A model as it is opened.

  configs: of each component, of the scheduler and of the pipeline, corrected.
  notes: what was assumed and what was corrected.
  """

  configs: Configs
  notes: tuple[Note, ...]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
  """What was changed in a config, in words: the fields left out first, then `field old -> new`."""
  gone = [name for name in before if name not in after]
  found = [f"left out {checks.first(gone)}"] if gone else []
  for name, value in after.items():
    old = before.get(name, _ABSENT)
    if old is _ABSENT or old != value:
      was = "absent" if old is _ABSENT else _shown(old)
      found.append(f"{name} {was} -> {_shown(value)}")
  return found


def _shown(value: Any) -> str:
  """As in the file: JSON, a word without its quotes, cut where it is long."""
  return checks.cut(value if isinstance(value, str) else json.dumps(value), 40)


def in_lines(notes: Iterable[Note]) -> list[str]:
  """The notes, a short line for each component; a few lines whatever there is to say."""
  grouped: dict[str, list[str]] = {}
  for note in notes:
    grouped.setdefault(note.component, []).append(note.what)
  lines = [checks.cut(f"{name}: {'; '.join(words)}", _MAX_LINE) for name, words in grouped.items()]
  return lines[:_MAX_LINES]


def tell(path: str | os.PathLike, notes: Iterable[Note]) -> None:
  """Warns of what was assumed and corrected, once in a process; silent if that is nothing."""
  lines = in_lines(notes)
  name = os.fspath(path)
  name = name if len(name) <= _MAX_PATH else f"...{name[-_MAX_PATH:]}"
  if lines:
    # Its place is here whoever calls: Python then prints it once in a process.
    told = [f"{name}, assumed or corrected (docs/troubleshooting.md):", *lines]
    warnings.warn(checks.cut("\n  ".join(told), _MAX), stacklevel=1)
