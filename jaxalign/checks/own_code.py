"""Code of users: imported and called so that whatever it does ends in a sentence."""

import contextlib
import importlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxalign.checks.text import closest, in_one_line, shown

# What code of users may raise that is theirs: sys.exit is no Exception.
FAILURES = (Exception, SystemExit)

_PYTHON = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib"))
_LIBRARIES = tuple(sysconfig.get_path(name) for name in ("purelib", "platlib"))
_OURS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@contextlib.contextmanager
def apart() -> Iterator[None]:
  """A block in which a module may be imported: it reads nothing, and what it prints is no result.

  A command that waits for an answer nobody sees would stand still for ever.
  """
  before = sys.stdin
  with open(os.devnull) as nothing, contextlib.redirect_stdout(sys.stderr):
    sys.stdin = nothing
    try:
      yield
    finally:
      sys.stdin = before


def is_theirs(error: BaseException) -> bool:
  """Whether a user's code raised the error, or called a library that did."""
  frames = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
  known = ("<", *_PYTHON, *_LIBRARIES)  # in an installed package we are among these
  frames = [name for name in frames if name.startswith(_OURS) or not name.startswith(known)]
  return bool(frames) and not frames[-1].startswith(_OURS)


def place(error: BaseException, default: str = "an unknown place") -> str:
  """The file and line of a user's code that an error is from: "my_rewards.py, line 3"."""
  if isinstance(error, SyntaxError) and error.filename:
    return f"{error.filename}, line {error.lineno}"
  frames = traceback.extract_tb(error.__traceback__)
  frames = [frame for frame in frames if not frame.filename.startswith(("<frozen", _OURS))]
  libraries = [f for f in frames if f.filename.startswith(_LIBRARIES)]
  own = [f for f in frames if not f.filename.startswith((*_PYTHON, *_LIBRARIES))]
  found = own or libraries or frames
  return f"{found[-1].filename}, line {found[-1].lineno}" if found else default


def in_words(error: BaseException) -> str:
  """What code of a user did: its error, or that it ended the process, and where."""
  if isinstance(error, SystemExit):
    return f"sys.exit({shown(error.code) if error.code is not None else ''}) in {place(error)}"
  said = in_one_line(error)
  if isinstance(error, EOFError):
    said += " (it asks for input, and a command has none to give)"
  return said


def ended(error: SystemExit) -> str:
  """What to tell the user of a process that their code would have ended."""
  return (
    f"the run was ended by {in_words(error)}\n"
    "Code that a run calls returns, or raises an error; it ends no process."
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

  Raises ValueError, which starts with `what` and the name, if there is no such function, and for
  whatever its module does on import instead: raise, exit, read arguments or input.
  """
  module_name, _, function_name = name.partition(":")
  if not (module_name and function_name.isidentifier()):
    raise ValueError(f'{what} "{name}": expected "package.module:function"')
  try:
    with apart():
      module = importlib.import_module(module_name)
      function = getattr(module, function_name, _ABSENT)
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # importing runs the user's code, which may raise anything
    raise ValueError(f'{what} "{name}": {_not_imported(module_name, error)}') from error
  if function is _ABSENT:
    raise ValueError(
      f'{what} "{name}": module "{module_name}" has no "{function_name}"'
      f"{closest(function_name, vars(module))}"
    )
  if not callable(function):
    raise ValueError(f'{what} "{name}": expected a function, got {type(function).__name__}')
  return function


_ABSENT = object()


def _not_imported(module: str, error: BaseException) -> str:
  if isinstance(error, SystemExit):
    return (
      f'module "{module}" ends the process as it is imported: {in_words(error)}\n'
      'Put what only a script does, such as reading arguments, under if __name__ == "__main__".'
    )
  said = f'could not import module "{module}": {in_words(error)}\n'
  if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
    return f"{said}Run from the folder that holds it, or put that folder on PYTHONPATH."
  return f"{said}It was raised in {place(error)}."
