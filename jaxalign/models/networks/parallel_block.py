"""Parallel blocks: attention and feed-forward network side by side, from one norm, in one stream.

Dehghani et al. 2023, arXiv:2302.05442, section 2. The stream is text and image together. Modules
are named as in diffusers' transformers of FLUX.1 and FLUX.2, which differ in what is one matrix.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import feed_forward, joint_attention, layers, modulation
from jaxalign.types import Array

_RATIO = 4  # of the feed-forward network's channels to D in FLUX.1


class ParallelBlock(nn.Module):
  """The single-stream block of FLUX.1, a matrix for each part, with a modulation of its own.

  num_heads: H; a head has D / H channels.
  """

  num_heads: int

  @nn.compact
  def __call__(self, x: Array, embedding: Array, turn: joint_attention.Turn) -> Array:
    """Text and image tokens `[B, T, D]` after the block.

    Args:
      x: `[B, T, D]`.
      embedding: `[B, D]`, of what modulates.
      turn: `rope.table` of the T tokens.
    """
    width = x.shape[-1]
    (modulated,) = modulation.AdaLN(1, name="norm")(embedding)
    h = modulated.of(x)
    attend = joint_attention.SelfAttention(self.num_heads, has_output=False, name="attn")
    attended = attend(h, turn)
    hidden = layers.Dense(_RATIO * width, name="proj_mlp")(h)
    both = jnp.concatenate([attended, jax.nn.gelu(hidden, approximate=True)], axis=-1)
    return modulated.add(x, layers.Dense(width, name="proj_out")(both))


class FusedParallelBlock(nn.Module):
  """The single-stream block of FLUX.2, two matrices in all, modulated by what all blocks share.

  num_heads: H; a head has D / H channels.
  hidden: channels of the feed-forward network inside.
  """

  num_heads: int
  hidden: int

  @nn.compact
  def __call__(
    self, x: Array, modulated: modulation.Modulation, turn: joint_attention.Turn
  ) -> Array:
    """Text and image tokens `[B, T, D]` after the block.

    Args:
      x: `[B, T, D]`.
      modulated: arrays `[B, 1, D]`, or `[1, 1, D]` where all examples are modulated alike.
      turn: `rope.table` of the T tokens.
    """
    attend = FusedAttention(self.num_heads, self.hidden, name="attn")
    return modulated.add(x, attend(modulated.of(x), turn))


class FusedAttention(nn.Module):
  """Attention with the feed-forward network in its projections: one matrix in, one out."""

  num_heads: int
  hidden: int

  @nn.compact
  def __call__(self, x: Array, turn: joint_attention.Turn) -> Array:  # [B, T, D] -> [B, T, D]
    width = x.shape[-1]
    project = layers.Dense(3 * width + 2 * self.hidden, use_bias=False, name="to_qkv_mlp_proj")
    *parts, projected = jnp.split(project(x), [width, 2 * width, 3 * width], axis=-1)
    query, key, value = (part.reshape(*x.shape[:2], self.num_heads, -1) for part in parts)
    query, key = layers.RMSNorm(name="norm_q")(query), layers.RMSNorm(name="norm_k")(key)
    attended = joint_attention.attend(query, key, value, turn, None)
    both = jnp.concatenate([attended, feed_forward.gated(projected)], axis=-1)
    return layers.Dense(width, use_bias=False, name="to_out")(both)
