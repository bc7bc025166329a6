"""The transformer of FLUX.2 (dev, klein), driven by its config.json.

As that of FLUX.1, but no linear map has a bias, feed-forward networks are gated, and all blocks of
a kind share one modulation, which depends on the time alone (and the guidance scale). Module names
are diffusers', and so are those of the fields.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.models.networks import (
  config_fields,
  embeddings,
  feed_forward,
  flux1_transformer,
  joint_attention,
  layers,
  modulation,
  packing,
  parallel_block,
  rematerialization,
  rope,
)
from jaxalign.types import Array

_AXES = 4  # of positions: image, row, column, and the token's number in the text
_REFERENCE = 10  # the number of the first image to edit, and how far the next ones are apart


@dataclasses.dataclass(frozen=True)
class Flux2Config:
  """The fields of `transformer/config.json`, with diffusers' defaults."""

  patch_size: int = 1
  in_channels: int = 128
  out_channels: int | None = None
  num_layers: int = 8
  num_single_layers: int = 48
  attention_head_dim: int = 128
  num_attention_heads: int = 48
  joint_attention_dim: int = 15360
  timestep_guidance_channels: int = 256
  mlp_ratio: float = 3.0
  axes_dims_rope: tuple[int, ...] = (32, 32, 32, 32)
  rope_theta: int = 2000
  eps: float = 1e-6
  guidance_embeds: bool = True

  def __post_init__(self):
    flux1_transformer.check_sizes(self, _AXES)
    if self.timestep_guidance_channels % 2:
      raise ValueError(
        f"transformer config: expected timestep_guidance_channels to be even, for sines and "
        f"cosines, found {self.timestep_guidance_channels}"
      )
    hidden = self.width * self.mlp_ratio
    checks.check_range("transformer config: mlp_ratio times the width", hidden, 1, checks.MOST)
    if self.eps != modulation.EPSILON:
      raise ValueError(f"transformer config: expected eps {modulation.EPSILON}, found {self.eps}")

  @property
  def width(self) -> int:
    """D of image and text tokens inside."""
    return self.num_attention_heads * self.attention_head_dim

  @property
  def hidden(self) -> int:
    """Channels of a feed-forward network inside."""
    return int(self.width * self.mlp_ratio)

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "Flux2Config":
    """Reads the parsed `transformer/config.json`; other entries are left alone."""
    return cls(**config_fields.of(cls, config))


class Flux2Transformer2DModel(nn.Module):
  """Predicts the velocity of a rectified flow from noisy latents, time and text.

  It computes in the dtype of `x_t`; norms, attention logits, rotations and the sinusoids are
  float32. `remat` says what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  config: Flux2Config
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    x_t: Array,
    t: Array,
    text: Array,
    guidance: Array | None = None,
    references: tuple[Array, ...] = (),
  ) -> Array:
    """Runs the network.

    Args:
      x_t: `[B, H, W, in_channels]`, packed (`packing.pack`), of any sides.
      t: `[B]` times, 1000 sigma; diffusers' transformer is given sigma and multiplies. Of one row,
        `[1]`, the modulations are computed once for the whole batch.
      text: `[B, N, joint_attention_dim]`; N of any length, padding included.
      guidance: `[B]` or `[1]` guidance scales, as users write them, where `guidance_embeds`.
      references: images to edit, packed as `x_t`, each of its own sides: `[B, h, w, in_channels]`.

    Returns:
      `[B, H, W, out_channels]`, the dtype of `x_t`.
    """
    config, dtype = self.config, x_t.dtype
    flux1_transformer.check_guidance(config.guidance_embeds, guidance)
    size, first = x_t.shape[1:3], text.shape[1]
    channels = config.timestep_guidance_channels
    embed = embeddings.TimeEmbedding(config.width, channels, False, name="time_guidance_embed")
    embedding = embed(t, dtype, guidance)
    shared = functools.partial(modulation.AdaLN, use_bias=False)
    of_image = shared(2, name="double_stream_modulation_img")(embedding)
    of_text = shared(2, name="double_stream_modulation_txt")(embedding)
    (of_both,) = shared(1, name="single_stream_modulation")(embedding)
    maps = [x_t, *(reference.astype(dtype) for reference in references)]
    turn = rotation(config, first, [x.shape[1:3] for x in maps])
    x = _dense(config.width, "x_embedder")(packing.tokens(maps))
    text = _dense(config.width, "context_embedder")(text.astype(dtype))
    kind = rematerialization.rematerialized(JointBlock, self.remat)
    for k in range(config.num_layers):
      block = kind(config.num_attention_heads, config.hidden, name=f"transformer_blocks_{k}")
      x, text = block(x, text, of_image, of_text, turn)
    x = jnp.concatenate([text, x], axis=1)
    kind = rematerialization.rematerialized(parallel_block.FusedParallelBlock, self.remat)
    for k in range(config.num_single_layers):
      name = f"single_transformer_blocks_{k}"
      x = kind(config.num_attention_heads, config.hidden, name=name)(x, of_both, turn)
    x = x[:, first : first + size[0] * size[1]]
    x = modulation.ContinuousAdaLN(use_bias=False, name="norm_out")(x, embedding)
    x = _dense(config.out_channels or config.in_channels, "proj_out")(x)
    return x.reshape(x.shape[0], *size, -1)


def _dense(features: int, name: str) -> layers.Dense:
  return layers.Dense(features, use_bias=False, name=name)


def rotation(
  config: Flux2Config, length: int, sizes: list[tuple[int, ...]]
) -> joint_attention.Turn:
  """Cosines and sines of text tokens, of the target's and of each reference's in turn.

  Args:
    config: of the transformer.
    length: N of the text.
    sizes: sides of the target and of references.
  """
  text = np.zeros((length, _AXES), np.int64)
  text[:, -1] = np.arange(length)
  images = [packing.positions(_REFERENCE * k, size) for k, size in enumerate(sizes)]
  ids = np.concatenate([text, *(np.pad(image, ((0, 0), (0, 1))) for image in images)])
  cos, sin = rope.table(ids, config.axes_dims_rope, config.rope_theta)
  return jnp.asarray(cos), jnp.asarray(sin)  # one constant of the program, and not one a block


class JointBlock(nn.Module):
  """Joint attention and a gated feed-forward network for each stream, all modulated from outside.

  num_heads: H; a head has D / H channels.
  hidden: channels of a feed-forward network inside.
  """

  num_heads: int
  hidden: int

  @nn.compact
  def __call__(
    self,
    x: Array,
    text: Array,
    of_image: tuple[modulation.Modulation, ...],
    of_text: tuple[modulation.Modulation, ...],
    turn: joint_attention.Turn,
  ) -> tuple[Array, Array]:
    """Image `[B, T, D]` and text `[B, N, D]` after the block; two modulations for each stream."""
    attend = joint_attention.JointAttention(self.num_heads, use_bias=False, name="attn")
    return joint_attention.residuals(
      x,
      text,
      of_image,
      of_text,
      functools.partial(attend, turn=turn),
      feed_forward.FusedSwiGLU(self.hidden, name="ff"),
      feed_forward.FusedSwiGLU(self.hidden, name="ff_context"),
    )
