"""Models by name: the family that a path belongs to, opened as a `Model`."""

import importlib
import inspect
import os
import pathlib
from collections.abc import Callable
from typing import Any

from jaxalign import checks
from jaxalign.models import encoding
from jaxalign.models.identity import classes
from jaxalign.models.model import Model

# Where the function `open_model` of each family is, by the path of what is embedded and by the
# class in a folder's model_index.json. What is in neither table is taken for a Stable Diffusion.
_FAMILIES = "jaxalign.models.families"
EMBEDDED = {"gaussian": f"{_FAMILIES}.gaussian", "planner": f"{_FAMILIES}.planner"}
CLASSES = {
  "GaussianPipeline": EMBEDDED["gaussian"],
  "PlannerPipeline": EMBEDDED["planner"],
  **{name: f"{_FAMILIES}.{family}" for family, names in classes.FLOWS.items() for name in names},
}
_STABLE_DIFFUSION = f"{_FAMILIES}.stable_diffusion"
_ON_THE_HUB = tuple(f"{_FAMILIES}.{family}" for family in classes.FLOWS)  # beside it


def open_model(
  path: str | os.PathLike, *, encode_once: bool = False, **options: Any
) -> Model:
  """Opens a model of any family; parameters are lazy until placed.

  Args:
    path: "gaussian", "planner", or "shapes", which are embedded; a folder, whose model_index.json
      names the class of its pipeline; a single .safetensors file or a hub id; or a family of
      another package as "package.module:function", which is called with the options alone.
    encode_once: texts are encoded when they are tokenized, see `models.encoding`.
    **options: what the family's own `open_model` takes, such as `dtype`. `shapes_only` reaches a
      family of another package only where it is true.

  Raises:
    ValueError: an option that the family does not have (with the near miss), a path where there is
      nothing, or a function of another package that returns something else.
  """
  model = _open(path, options)
  return encoding.once(model) if encode_once else model


def _open(path: str | os.PathLike, options: dict[str, Any]) -> Model:
  name = os.fspath(path)
  if _is_function(name):
    return _call_foreign(name, options)
  module = EMBEDDED.get(name) or _of_file(name) or CLASSES.get(_class_name(name))
  if module is not None:
    return _call(importlib.import_module(module).open_model, path, options)
  from jaxalign.models.families import stable_diffusion

  return stable_diffusion.as_model(_call(stable_diffusion.open_model, path, options))


def check_options(
  path: str | os.PathLike, *, encode_once: bool = False, **options: Any
) -> None:
  """Raises ValueError for options that the family of `path` does not take.

  Reads no more than a folder's index. What would have to be fetched may be of any family that has
  folders on the hub, so that one which takes the options will do.
  """
  del encode_once  # is of all families
  name = os.fspath(path)
  if _is_function(name):
    checks.check_call(f'model "{name}"', checks.load_function("config.model.path", name), **options)
    return
  module = EMBEDDED.get(name) or _of_file(name)
  here = pathlib.Path(name).expanduser()
  if module is None and here.is_dir():
    module = CLASSES.get(_class_name(name))
  fetched = module is None and not here.exists()
  modules = [module or _STABLE_DIFFUSION, *(_ON_THE_HUB if fetched else ())]
  errors = [error for error in (_misfit(one, path, options) for one in modules) if error]
  if len(errors) == len(modules):
    raise errors[0]


def _misfit(module: str, path: str | os.PathLike, options: dict[str, Any]) -> ValueError | None:
  """Why a family does not take the options."""
  function = importlib.import_module(module).open_model
  try:
    checks.check_section("config.model", {"path": path, **_given(options, function)}, function)
  except ValueError as error:
    return error
  return None


def _is_function(name: str) -> bool:
  module, _, function = name.partition(":")
  parts = module.split(".")
  return function.isidentifier() and all(part.isidentifier() for part in parts)


def _call(function: Callable, path: str | os.PathLike, options: dict[str, Any]) -> Any:
  options = _given(options, function)
  checks.check_section("config.model", {"path": path, **options}, function)
  return function(path, **options)


def _given(options: dict[str, Any], function: Callable) -> dict[str, Any]:
  """The options without those that say nothing, "" or None, where a family does not know them.

  A config that suits several families has fields of each.
  """
  known = inspect.signature(function).parameters
  return {k: value for k, value in options.items() if k in known or value not in ("", None)}


def _call_foreign(name: str, options: dict[str, Any]) -> Model:
  function = checks.load_function("config.model.path", name)
  if not options.get("shapes_only", True):
    options = {key: value for key, value in options.items() if key != "shapes_only"}
  checks.check_call(f'model "{name}"', function, **options)
  model = function(**options)
  if not isinstance(model, Model):
    raise ValueError(
      f'config.model.path "{name}": expected it to return a models.model.Model, got '
      f"{type(model).__name__}"
    )
  return model


def _of_file(name: str) -> str | None:
  """The family of flow transformers whose file it is; None for anything else."""
  from jaxalign.models.weights import flow_file

  path = pathlib.Path(name).expanduser()
  kind = flow_file.find_kind(path) if path.is_file() and path.suffix == ".safetensors" else ""
  return f"{_FAMILIES}.{kind}" if kind else None


def _class_name(name: str) -> str:
  """The class in model_index.json; "" where there is none, as of a single file."""
  from jaxalign.models.identity import folders
  from jaxalign.models.weights import hub

  path = pathlib.Path(name).expanduser()
  if path.is_file() or path.suffix == ".safetensors":
    return ""
  return folders.class_name(hub.find_folder(name))
