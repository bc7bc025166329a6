"""Samplers by name: `SAMPLERS[name](pipeline, **kwargs)` makes a `Sampler`.

A name with a colon, "package.module:function", is a user's own: a function of the same signature.
"""

from collections.abc import Callable
from typing import Any

from jaxalign.checks import check_call, find_function
from jaxalign.pipeline import Pipeline
from jaxalign.steering import best_of_n
from jaxalign.steering.sampler import Inputs, Sampled, Sampler, in_words, make_chain

__all__ = ["SAMPLERS", "Inputs", "Sampled", "Sampler", "in_words", "make"]

SAMPLERS: dict[str, Callable[..., Sampler]] = {
  "chain": make_chain,
  "best_of_n": best_of_n.make,
}


def make(pipeline: Pipeline, *, name: str, **kwargs: Any) -> Sampler:
  """The sampler called `name`: an entry of `SAMPLERS`, or a user's "package.module:function".

  Raises ValueError for a name that nothing has, arguments that it does not take, or a function that
  returns something else.
  """
  factory = find_function("sampler", name, SAMPLERS, unknown=f'unknown sampler "{name}"')
  check_call(f'sampler "{name}"', factory, pipeline, **kwargs)
  sampler = factory(pipeline, **kwargs)
  if not isinstance(sampler, Sampler):
    raise ValueError(
      f'sampler "{name}": expected it to return a jaxalign.steering.Sampler, got '
      f"{type(sampler).__name__}"
    )
  return sampler._replace(name=name, settings=kwargs)
