"""A user's own reward, named in the config as "package.module:function"."""

from collections.abc import Callable

from jaxalign.checks import load_function


def load(name: str) -> Callable:
  """Imports the function that `name` stands for; ValueError if there is none.

  The named object is the reward function itself, `fn(samples, records, **kwargs) -> [B]`, with the
  `kwargs` of the config. What is slow to build, such as a network, belongs at the top of the
  module or in a function under `functools.cache`. It may be called from several threads at once.
  The records are its own to change, the samples cannot be written to; true and false are 1 and 0.
  """
  return load_function("reward", name)
