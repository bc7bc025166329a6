"""Joint attention (MMDiT): image and text tokens, each with weights of their own, in one softmax.

Esser et al. 2024, arXiv:2403.03206, section 4. Modules are named as in diffusers' transformers of
SD3, FLUX and Qwen-Image, whose blocks are made of these parts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import layers, rope
from jaxalign.types import Array

Turn = tuple[Array, Array]  # cosines and sines of `rope`


def attend(
  query: Array, key: Array, value: Array, turn: Turn | None, mask: Array | None
) -> jax.Array:
  """Attention with rotated queries and keys, `[B, T, H, D / H]` each to `[B, T, D]`.

  `turn` are `rope.table`'s angles of all tokens, None for no rotation; `mask` is bool `[B, T]`,
  False for tokens that nothing attends to.
  """
  if turn is not None:
    query, key = rope.rotate_pairs(query, turn), rope.rotate_pairs(key, turn)
  return layers.attention(query, key, value, None if mask is None else mask[:, None, None])


class _Attention(nn.Module):
  """What attention of one stream and of two have in common.

  num_heads: H; a head has D / H channels.
  use_bias: of all projections.
  normalize: queries and keys by a root-mean-square norm of each head (arXiv:2403.03206, 5.3.3).
  epsilon: of these norms.
  """

  num_heads: int
  use_bias: bool = True
  normalize: bool = True
  epsilon: float = 1e-6

  def _heads(self, x: Array, names: Sequence[str], norms: Sequence[str]) -> list[jax.Array]:
    """Query, key and value of a stream, `[B, T, H, D / H]`, the first two normalised."""
    heads = [
      self._dense(x.shape[-1], name)(x).reshape(*x.shape[:2], self.num_heads, -1) for name in names
    ]
    if self.normalize:
      heads[:2] = [
        layers.RMSNorm(self.epsilon, name=name)(h)
        for name, h in zip(norms, heads[:2], strict=True)
      ]
    return heads

  def _dense(self, features: int, name: str) -> layers.Dense:
    return layers.Dense(features, use_bias=self.use_bias, name=name)


class JointAttention(_Attention):
  """Attention of image and text tokens over both.

  text_first: the order of the two in the softmax; rotation and mask follow it.
  text_ends: nothing reads the text after this block, so that it has no output.
  """

  text_first: bool = True
  text_ends: bool = False

  @nn.compact
  def __call__(
    self, x: Array, text: Array, turn: Turn | None = None, mask: Array | None = None
  ) -> tuple[Array, Any]:
    """Outputs for the image `[B, T, D]` and for the text `[B, N, D]`, or None in its place.

    Args:
      x: `[B, T, D]` image tokens.
      text: `[B, N, D]` text tokens.
      turn, mask: as in `attend`, of all T + N tokens in the order of the softmax.
    """
    of_image = self._heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    names = ("add_q_proj", "add_k_proj", "add_v_proj")
    of_text = self._heads(text, names, ("norm_added_q", "norm_added_k"))
    both = [of_text, of_image] if self.text_first else [of_image, of_text]
    out = attend(*(jnp.concatenate(parts, 1) for parts in zip(*both, strict=True)), turn, mask)
    first = text.shape[1] if self.text_first else x.shape[1]
    parts = (out[:, :first], out[:, first:])
    text_out, x_out = parts if self.text_first else parts[::-1]
    x_out = self._dense(x.shape[-1], "to_out_0")(x_out)
    return x_out, None if self.text_ends else self._dense(text.shape[-1], "to_add_out")(text_out)


class SelfAttention(_Attention):
  """Attention of one stream over itself.

  has_output: whether it has an output projection; without one its block has one for more.
  """

  has_output: bool = True

  @nn.compact
  def __call__(self, x: Array, turn: Turn | None = None, mask: Array | None = None) -> Array:
    """`x` `[B, T, D]` to the same; `turn` and `mask` as in `attend`."""
    heads = self._heads(x, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
    out = attend(*heads, turn, mask)
    return self._dense(x.shape[-1], "to_out_0")(out) if self.has_output else out


def residuals(
  x: Array,
  text: Array,
  of_image: Sequence[Any],
  of_text: Sequence[Any],
  attention: Callable[[Array, Array], tuple[Array, Array]],
  feed_forward: Callable[[Array], Array],
  text_feed_forward: Callable[[Array], Array],
) -> tuple[Array, Array]:
  """A block of both streams: joint attention, then a feed-forward network for each.

  Args:
    x: `[B, T, D]` image tokens.
    text: `[B, N, D]` text tokens.
    of_image, of_text: modulations of attention and feed-forward network, see
      `modulation.Modulation`.
    attention: `(x, text) -> (x, text)`.
    feed_forward, text_feed_forward: of each stream.
  """
  (first, second), (text_first, text_second) = of_image, of_text
  x_out, text_out = attention(first.of(x), text_first.of(text))
  x, text = first.add(x, x_out), text_first.add(text, text_out)
  x = second.add(x, feed_forward(second.of(x)))
  return x, text_second.add(text, text_feed_forward(text_second.of(text)))
