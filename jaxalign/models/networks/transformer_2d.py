"""The spatial transformer of a latent diffusion UNet: self-attention, cross-attention, GEGLU.

Module names follow the published checkpoints, so that weights convert by rule (`models/weights`).
Source: Rombach et al. 2022, arXiv:2112.10752, appendix E.2.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.distributed import placement
from jaxalign.models.networks import layers
from jaxalign.types import Array


class Attention(nn.Module):
  """Multi-head attention of `x` over `context`; q, k and v have no bias."""

  num_heads: int

  @nn.compact
  def __call__(self, x: Array, context: Array) -> Array:  # [B, T, C], [B, N, D] -> [B, T, C]
    channels = x.shape[-1]
    query = self._heads(layers.Dense(channels, use_bias=False, name="to_q")(x))
    key = self._heads(layers.Dense(channels, use_bias=False, name="to_k")(context))
    value = self._heads(layers.Dense(channels, use_bias=False, name="to_v")(context))
    return layers.Dense(channels, name="to_out_0")(layers.attention(query, key, value))

  def _heads(self, x: Array) -> Array:  # [B, T, C] -> [B, T, H, C / H]
    return x.reshape(*x.shape[:-1], self.num_heads, -1)


class GatedLinear(nn.Module):
  """GEGLU: `a * gelu(g)`, `a` and `g` the halves of one projection (arXiv:2002.05202, eq. 6)."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., C] -> [..., features]
    projected = layers.Dense(2 * self.features, name="proj")(x)
    return _gated(projected) if placement.platform() == "cpu" else _lean_gated(projected)


def _gated(projected: jax.Array) -> jax.Array:  # [..., 2 F] -> [..., F]
  value, gate = jnp.split(projected, 2, axis=-1)
  return value * jax.nn.gelu(gate, approximate=False)


@jax.custom_vjp
def _lean_gated(projected: jax.Array) -> jax.Array:
  """`_gated`, which keeps the projection alone for its gradient; in reverse mode only.

  Left to itself, XLA writes two more maps of this size, the largest of a block, and reads them
  again. On a CPU, computing the error function again takes longer than that.
  """
  return _gated(projected)


def _lean_gated_backward(projected, grad):
  # The barriers keep XLA from finding that the forward pass, or the other half, computes some of
  # this, so that one kernel writes both halves side by side and reads nothing else.
  once = jax.lax.optimization_barrier(projected)
  again = jax.lax.optimization_barrier(once)
  gelu = functools.partial(jax.nn.gelu, approximate=False)
  value, gate = jnp.split(once, 2, axis=-1)
  grad_value = grad * gelu(jnp.split(again, 2, axis=-1)[1])
  return (jnp.concatenate([grad_value, *jax.vjp(gelu, gate)[1](grad * value)], axis=-1),)


_lean_gated.defvjp(lambda projected: (_gated(projected), projected), _lean_gated_backward)


class FeedForward(nn.Module):
  """GEGLU to four times the width and a projection back; net_1 is dropout in the checkpoints."""

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [..., C] -> [..., C]
    hidden = GatedLinear(4 * x.shape[-1], name="net_0")(x)
    return layers.Dense(x.shape[-1], name="net_2")(hidden)


class TransformerBlock(nn.Module):
  """Pre-norm residual block: self-attention, cross-attention to the text, feed-forward."""

  num_heads: int

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:  # [B, T, C], [B, N, D] -> [B, T, C]
    h = layers.LayerNorm(name="norm1")(x)
    x = x + Attention(self.num_heads, name="attn1")(h, h)
    h = layers.LayerNorm(name="norm2")(x)
    x = x + Attention(self.num_heads, name="attn2")(h, text)
    h = layers.LayerNorm(name="norm3")(x)
    return x + FeedForward(name="ff")(h)


class Transformer2D(nn.Module):
  """A residual stack of transformer blocks over the H * W positions of a feature map."""

  num_heads: int
  num_layers: int
  norm_num_groups: int
  use_linear_projection: bool

  @nn.compact
  def __call__(self, x: Array, text: Array) -> Array:  # [B, H, W, C], [B, N, D] -> [B, H, W, C]
    # This epsilon is 1e-6 in every checkpoint, whatever the config's norm_eps says.
    h = layers.GroupNorm(self.norm_num_groups, 1e-6, name="norm")(x)
    h = self._projection(x.shape[-1], "proj_in")(h)
    h = h.reshape(x.shape[0], -1, x.shape[-1])  # [B, HW, C]
    for i in range(self.num_layers):
      h = TransformerBlock(self.num_heads, name=f"transformer_blocks_{i}")(h, text)
    return x + self._projection(x.shape[-1], "proj_out")(h.reshape(x.shape))

  def _projection(self, features: int, name: str) -> nn.Module:
    if self.use_linear_projection:
      return layers.Dense(features, name=name)
    return layers.Conv(features, kernel_size=1, padding=0, name=name)
