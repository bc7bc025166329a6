"""A user's own reward, named in the config as "package.module:function"."""

import importlib
from collections.abc import Callable

from jaxalign.checks import closest


def load(name: str) -> Callable:
  """Imports the function that `name` stands for.

  The named object is the reward function itself, `fn(images, prompts, **kwargs) -> [B]`, with the
  `kwargs` of the config. What is slow to build, such as a network, belongs at the top of the
  module or in a function under `functools.cache`. It may be called from several threads at once.
  """
  module_name, _, function_name = name.partition(":")
  if not (module_name and function_name.isidentifier()):
    raise ValueError(f'reward "{name}": expected "package.module:function"')
  try:
    module = importlib.import_module(module_name)
  except Exception as error:  # importing runs the user's code, which may raise anything
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise ValueError(
      f'reward "{name}": could not import module "{module_name}": {reason}\n'
      "Run from the folder that holds it, or put that folder on PYTHONPATH."
    ) from error
  if not hasattr(module, function_name):
    raise ValueError(
      f'reward "{name}": module "{module_name}" has no "{function_name}"'
      f"{closest(function_name, vars(module))}"
    )
  function = getattr(module, function_name)
  if not callable(function):
    raise ValueError(
      f'reward "{name}": expected a function fn(images, prompts), got {type(function).__name__}'
    )
  return function
