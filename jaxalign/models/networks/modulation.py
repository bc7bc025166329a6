"""Adaptive layer norm (AdaLN): norms whose scale and shift, and gates, come from an embedding.

Peebles and Xie 2022, arXiv:2212.09748, section 3.2. The embedding is that of the time, mostly, with
what is known of the whole prompt. Norms here have no parameters of their own.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import layers
from jaxalign.types import Array

EPSILON = 1e-6


class Modulation(NamedTuple):
  """What one residual branch is modulated by, `[B, 1, D]` each."""

  shift: Array
  scale: Array
  gate: Array

  def of(self, x: Array) -> jax.Array:
    """The branch's input: `x` `[B, T, D]` normalised, scaled and shifted, in the dtype of `x`."""
    return shifted(layers.standardized(x, EPSILON), self.scale, self.shift).astype(x.dtype)

  def add(self, x: Array, branch: Array) -> jax.Array:
    """`x` plus the branch's output behind its gate."""
    return x + self.gate * branch


def shifted(x: Array, scale: Array, shift: Array) -> jax.Array:
  """`x * (1 + scale) + shift`."""
  return x * (1.0 + scale) + shift


def split(projected: Array, count: int) -> tuple[Modulation, ...]:
  """A projection `[B, count * 3 * D]` as modulations, each of shift, scale and gate."""
  parts = jnp.split(projected[:, None], 3 * count, axis=-1)
  return tuple(Modulation(*parts[k : k + 3]) for k in range(0, len(parts), 3))


class AdaLN(nn.Module):
  """Modulations by a linear map of the embedding, of one block or shared by many."""

  count: int
  use_bias: bool = True

  @nn.compact
  def __call__(self, embedding: Array) -> tuple[Modulation, ...]:  # [B, D] -> count
    width = 3 * self.count * embedding.shape[-1]
    linear = layers.Dense(width, use_bias=self.use_bias, name="linear")
    return split(linear(jax.nn.silu(embedding)), self.count)


class ContinuousAdaLN(nn.Module):
  """The norm in front of an output: scale and shift, in this order, and no gate."""

  use_bias: bool = True

  @nn.compact
  def __call__(self, x: Array, embedding: Array) -> Array:  # [B, T, D], [B, E] -> [B, T, D]
    linear = layers.Dense(2 * x.shape[-1], use_bias=self.use_bias, name="linear")
    scale, shift = jnp.split(linear(jax.nn.silu(embedding))[:, None], 2, axis=-1)
    return shifted(layers.standardized(x, EPSILON), scale, shift).astype(x.dtype)
