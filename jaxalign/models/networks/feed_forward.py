"""The feed-forward networks of transformer blocks, by what their matrices are called."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import layers
from jaxalign.types import Array


def gated(projected: Array) -> jax.Array:
  """SwiGLU of gates and values in one array: `[..., 2 F] -> [..., F]` (arXiv:2002.05202, eq. 6)."""
  gate, value = jnp.split(projected, 2, axis=-1)
  return jax.nn.silu(gate) * value


class FeedForward(nn.Module):
  """`net_2(gelu(net_0.proj(x)))`, the GELU by its tanh; net_1 is dropout in the checkpoints."""

  ratio: int = 4

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
    hidden = Projection(self.ratio * x.shape[-1], name="net_0")(x)
    return layers.Dense(x.shape[-1], name="net_2")(jax.nn.gelu(hidden, approximate=True))


class Projection(nn.Module):
  """A linear map one level deeper, which is where the checkpoints have it."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    return layers.Dense(self.features, name="proj")(x)


class FusedSwiGLU(nn.Module):
  """SwiGLU with gates and values by one matrix, `linear_in`; no biases."""

  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
    projected = layers.Dense(2 * self.hidden, use_bias=False, name="linear_in")(x)
    return layers.Dense(x.shape[-1], use_bias=False, name="linear_out")(gated(projected))


class SwiGLU(nn.Module):
  """`w2(silu(w1(x)) * w3(x))`, without biases."""

  hidden: int

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
    gate, value = (
      layers.Dense(self.hidden, use_bias=False, name=name)(x) for name in ("w1", "w3")
    )
    return layers.Dense(x.shape[-1], use_bias=False, name="w2")(jax.nn.silu(gate) * value)
