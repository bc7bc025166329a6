"""Random parameters, drawn on the host: XLA takes minutes to compile hundreds of draws."""

from typing import Any

import jax
import numpy as np

from jaxalign import streams
from jaxalign.types import Key, Params


def random_params(key: Key, shapes: Params, **constants: float) -> Any:
  """A tree like `shapes` of float32 numpy arrays, drawn as `models.layers` initialises itself.

  Kernels have variance 1 / fan_in, embeddings a standard deviation of 0.02, and single vectors one
  over the root of their width; scales are 1 and biases 0.

  Args:
    key: decides all of it.
    shapes: the parameter tree, of anything with a shape.
    constants: the values of leaves that have one, by name.
  """
  rng = streams.generator_of(key)
  constants = {"scale": 1.0, "bias": 0.0, **constants}

  def draw(path, leaf):
    name, shape = path[-1].key, leaf.shape
    if name in constants:
      return np.full(shape, constants[name], np.float32)
    fan_in = np.prod(shape[:-1]) if name == "kernel" else shape[-1]
    std = 0.02 if name == "embedding" else fan_in**-0.5
    return np.float32(std) * rng.standard_normal(shape, np.float32)

  return jax.tree_util.tree_map_with_path(draw, shapes)
