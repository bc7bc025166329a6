"""Configs by name or path, with what flags change in them.

  --config=ddpo                    one that comes with jaxalign, from any folder
  --config=ddpo:lora,quicktest     with its variants
  --config=mine/ddpo.py:lora       a file, relative to the working directory

A config is a Python file with a function `get_config()`, or `get_config(variant)`.
"""

import contextlib
import importlib.machinery
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import config_dict

from jaxalign import checks
from jaxalign.checks import own_code
from jaxalign.cli import overrides, paths

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]
# Inside an installed package; beside the package in a clone.
_PLACES = (_PACKAGE / "configs", _PACKAGE.parent / "configs")
FOLDER = _PLACES[0] if _PLACES[0].is_dir() else _PLACES[1]
SHARED = ("common", "flows")  # what the others import; no configs

CHANGES = "config."  # the flag that holds what `--config.KEY=VALUE` says, in order


def define(values: flags.FlagValues) -> None:
  """Defines --config and --config.KEY."""
  flags.DEFINE_string(
    "config",
    None,
    "A config by its name, such as ddpo, or ddpo:lora with a variant; or the path of a file.",
    flag_values=values,
  )
  help = "--config.KEY=VALUE changes a field of the config; of the same KEY the last one counts."
  flags.DEFINE_multi_string(CHANGES, [], help, flag_values=values)


def as_overrides(arguments: Sequence[str], values: flags.FlagValues) -> list[str]:
  """The arguments with `--config.KEY=VALUE` as values of one flag, if the command has a config."""
  if CHANGES not in values:
    return list(arguments)
  found, rest = [], list(arguments)
  while rest:
    argument = rest.pop(0)
    match = re.fullmatch(r"--?(no)?config\.([^=]*)(=.*)?", argument, re.DOTALL)
    if not match:
      found.append(argument)
      continue
    no, key, value = match.groups()
    if no:
      value = "=False"
    elif value is None and rest and re.match(r"[^-]|-[\d.]", rest[0]):
      value = f"={rest.pop(0)}"
    found.append(f"--{CHANGES}={key}{value or ''}")
  return found


def load(
  name: str, changes: Sequence[str] = (), *, optional: Collection[str] = ()
) -> config_dict.ConfigDict:
  """The config called `name`, "ddpo", "ddpo:lora" or a path, locked, with changes "KEY=VALUE".

  `optional` are sections that a config may lack and a change may begin. Raises ValueError for a
  name that nothing has, a file that is no config or raises, and a change that does not fit.
  """
  name, variant = _split(name)
  path = find(name)
  with _shared(own=path.parent == FOLDER):
    config = _call(path, _function(path), variant)
  overrides.apply(config, changes, optional=optional)
  config.lock()
  return config


def names() -> list[str]:
  """Of the configs that come with jaxalign."""
  return sorted({path.stem for path in FOLDER.glob("*.py")} - {*SHARED, "__init__"})


def find(name: str) -> pathlib.Path:
  """The file of a config; ValueError with the near miss, or all names, where there is none."""
  is_path = name.endswith(".py") or "/" in name or name.startswith("~")
  if not is_path:
    if name not in names():
      near = checks.closest(name, names()) or f"; known: {', '.join(names())}"
      here = os.path.exists(f"{name}.py")  # False for what is no name of a file
      there = f"\nthe file here is named by its path, --config={name}.py" if here else ""
      raise ValueError(f"--config: found no config {checks.shown(name)}{near}{there}")
    return FOLDER / f"{name}.py"
  path = paths.absolute(name)
  if not os.path.isfile(path):
    stem = path.stem if path.suffix == ".py" else path.name
    near = stem if stem in names() else ""
    hint = f"\n--config={near} is the one that comes with jaxalign" if near else ""
    what = "a folder" if os.path.isdir(path) else "no such file"
    found = f"{what}: {checks.cut(name, 300)}{hint}"
    raise ValueError(f"--config: expected a config file, found {found}")
  return path


def _split(name: str) -> tuple[str, str | None]:
  """Name and variant, None without a colon; a folder may have one in its name."""
  match = re.fullmatch(r"(.*?\.py|[^:]*)(:)?(.*)", name, re.DOTALL)
  assert match is not None  # anything fits
  file, colon, variant = match.groups()
  if variant and not colon:  # what follows .py is no variant
    return name, None
  return file, variant if colon else None


@contextlib.contextmanager
def _shared(own: bool) -> Iterator[None]:
  """A block in which `from configs import common` finds ours, wherever a command starts.

  In a user's own file, one of theirs comes before it. It is on no path, where other files of the
  package would be modules too.
  """
  hidden = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "configs"}
  package = types.ModuleType("configs")
  package.__path__ = [str(FOLDER)]
  if not own:
    for name in hidden:
      del sys.modules[name]
    spec = importlib.machinery.PathFinder.find_spec("configs")
    if spec is not None and spec.origin is not None:  # a package or module of theirs
      sys.modules.update(hidden)
      yield
      return
    theirs = list(spec.submodule_search_locations or ()) if spec is not None else []
    package.__path__ = [*theirs, str(FOLDER)]
  for name in hidden:
    sys.modules.pop(name, None)
  sys.modules["configs"] = package
  try:
    yield
  finally:
    for name in [n for n in sys.modules if n.split(".")[0] == "configs"]:
      del sys.modules[name]
    sys.modules.update(hidden)


def _function(path: pathlib.Path) -> Callable[..., Any]:
  """`get_config` of a file."""
  spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
  assert spec is not None and spec.loader is not None  # the suffix is .py
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look for it
  with _in_words(path):
    spec.loader.exec_module(module)
  found = getattr(module, "get_config", None)
  if not callable(found):
    near = checks.closest("get_config", vars(module))
    raise ValueError(f"--config: {path}: expected a function get_config(), found none{near}")
  return found


def _call(
  path: pathlib.Path, function: Callable[..., Any], variant: str | None
) -> config_dict.ConfigDict:
  try:
    inspect.signature(function).bind(*([] if variant is None else [variant]))
  except TypeError:
    said = "a variant, NAME.py:VARIANT" if variant is None else f"no variant, got {variant!r}"
    raise ValueError(f"--config: {path.name}: get_config expects {said}") from None
  with _in_words(path):
    made = function() if variant is None else function(variant)
    if isinstance(made, Mapping):
      made = config_dict.ConfigDict(made)
  if not isinstance(made, config_dict.ConfigDict):
    raise ValueError(
      f"--config: {path}: expected get_config() to return a ConfigDict, got {type(made).__name__}"
      f"{'; is there no return?' if made is None else ''}"
    )
  return made


@contextlib.contextmanager
def _in_words(path: pathlib.Path) -> Iterator[None]:
  """A block of a config's own code, whose errors become a sentence with file and line."""
  try:
    with own_code.apart():
      yield
  except KeyboardInterrupt:
    raise
  except BaseException as error:  # it is the user's code, which may raise anything
    if type(error) is ValueError and path.parent == FOLDER:
      raise  # what ours say themselves, such as of an unknown variant
    where = own_code.place(error, str(path))
    raise ValueError(f"--config: {where}: {own_code.in_words(error)}") from error
