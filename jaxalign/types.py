"""Array types and the one shape check that every loss starts with."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Programs take both; step tables, selections and weights as read from a file are numpy. Where the
# annotation is jax.Array, numpy will not do.
Array = jax.Array | np.ndarray
Key = jax.Array  # a typed key, as made by jaxalign.streams
Params = Mapping[str, Any]  # nested dict of arrays
# A row of input: {"prompt": ...} where a model reads text, {"start": ..., "goal": ...} of a plan.
Record = Mapping[str, Any]

# denoise_fn(params, x_t [B, *D], t [B], cond) -> prediction [B, *D]
DenoiseFn = Callable[[Params, Array, Array, Any], Array]


def check_same_shape(**arrays: Array) -> None:
  """Raises ValueError, naming the arguments, unless all arrays have one shape.

  Without it `[B] - [B, 1]` broadcasts to `[B, B]` and still gives a finite loss.
  """
  shapes = {name: tuple(array.shape) for name, array in arrays.items()}
  if len(set(shapes.values())) > 1:
    raise ValueError(f"expected equal shapes, got {shapes}")


def expand_to(per_example: Array, like: Array) -> Array:
  """Adds trailing axes of size one, so that `[B]` broadcasts against `[B, *D]`.

  A scalar is returned as it is.
  """
  if per_example.ndim == 0:
    return per_example
  return per_example.reshape(per_example.shape + (1,) * (like.ndim - per_example.ndim))


def at_least_float32(x: Array) -> jax.Array:
  """`x` in float32 if it is narrower, or an integer; float64 stays, where JAX has been told to."""
  return jnp.asarray(x, jnp.promote_types(x.dtype, jnp.float32))
