"""The transformer of FLUX.1 (dev, schnell, Kontext), driven by its config.json.

Labs et al. 2025, arXiv:2506.15742: blocks of two streams, which are the MMDiT's of
arXiv:2403.03206 with rotary positions, then blocks of one stream over text and image. Module names
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
  joint_attention,
  layers,
  modulation,
  packing,
  parallel_block,
  rematerialization,
  rope,
)
from jaxalign.types import Array

_AXES = 3  # of positions: image, row, column
_THETA = 10000.0
_REFERENCE = 1  # the number of the image to edit; that of the target is 0


def check_sizes(config: Any, axes: int) -> None:
  """Raises ValueError unless a FLUX config's sizes are in range and fit each other."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.type in (int, "int") or (field.name == "out_channels" and value is not None):
      most = layers.MOST if field.name in ("num_layers", "num_single_layers") else checks.MOST
      checks.check_range(f"transformer config: {field.name}", value, 1, most)
  if config.patch_size != 1:
    raise ValueError(
      f"transformer config: expected patch_size 1, for latents that are packed already, found "
      f"{config.patch_size}"
    )
  rope.check_axes("axes_dims_rope", config.axes_dims_rope, axes, config.attention_head_dim)


def check_guidance(embedded: bool, guidance: Array | None) -> None:
  """Raises ValueError unless guidance is given just where the config embeds it."""
  if embedded and guidance is None:
    raise ValueError("expected a guidance scale (transformer config: guidance_embeds), got None")
  if not embedded and guidance is not None:
    raise ValueError("expected no guidance (transformer config: guidance_embeds false), got some")


@dataclasses.dataclass(frozen=True)
class FluxConfig:
  """The fields of `transformer/config.json`, with diffusers' defaults."""

  patch_size: int = 1
  in_channels: int = 64
  out_channels: int | None = None
  num_layers: int = 19
  num_single_layers: int = 38
  attention_head_dim: int = 128
  num_attention_heads: int = 24
  joint_attention_dim: int = 4096
  pooled_projection_dim: int = 768
  guidance_embeds: bool = False
  axes_dims_rope: tuple[int, ...] = (16, 56, 56)

  def __post_init__(self):
    check_sizes(self, _AXES)

  @property
  def width(self) -> int:
    """D of image and text tokens inside."""
    return self.num_attention_heads * self.attention_head_dim

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "FluxConfig":
    """Reads the parsed `transformer/config.json`; other entries are left alone."""
    return cls(**config_fields.of(cls, config))


class FluxTransformer2DModel(nn.Module):
  """Predicts the velocity of a rectified flow from noisy latents, time and text.

  It computes in the dtype of `x_t`; norms, attention logits, rotations and the sinusoids are
  float32. `remat` says what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  config: FluxConfig
  remat: str = "none"

  @nn.compact
  def __call__(
    self,
    x_t: Array,
    t: Array,
    text: Array,
    pooled: Array,
    guidance: Array | None = None,
    references: tuple[Array, ...] = (),
  ) -> Array:
    """Runs the network.

    Args:
      x_t: `[B, H, W, in_channels]`, packed (`packing.pack`), of any sides.
      t: `[B]` or `[1]` times, 1000 sigma; diffusers' transformer is given sigma and multiplies.
      text: `[B, N, joint_attention_dim]`; N of any length, padding included.
      pooled: `[B, pooled_projection_dim]`, of the whole prompt.
      guidance: `[B]` or `[1]` guidance scales, as users write them, where `guidance_embeds`.
      references: the image to edit, if any, packed as `x_t`: `[B, h, w, in_channels]`.

    Returns:
      `[B, H, W, out_channels]`, the dtype of `x_t`.
    """
    config, dtype = self.config, x_t.dtype
    check_guidance(config.guidance_embeds, guidance)
    size, first = x_t.shape[1:3], text.shape[1]
    embed = embeddings.TimeEmbedding(config.width, name="time_text_embed")
    embedding = embed(t, dtype, guidance, pooled)
    maps = [x_t, *(reference.astype(dtype) for reference in references)]
    turn = rotation(config, first, [x.shape[1:3] for x in maps])
    x = layers.Dense(config.width, name="x_embedder")(packing.tokens(maps))
    text = layers.Dense(config.width, name="context_embedder")(text.astype(dtype))
    kind = rematerialization.rematerialized(JointBlock, self.remat)
    for k in range(config.num_layers):
      block = kind(config.num_attention_heads, name=f"transformer_blocks_{k}")
      x, text = block(x, text, embedding, turn)
    x = jnp.concatenate([text, x], axis=1)
    kind = rematerialization.rematerialized(parallel_block.ParallelBlock, self.remat)
    for k in range(config.num_single_layers):
      block = kind(config.num_attention_heads, name=f"single_transformer_blocks_{k}")
      x = block(x, embedding, turn)
    x = x[:, first : first + size[0] * size[1]]
    x = modulation.ContinuousAdaLN(name="norm_out")(x, embedding)
    x = layers.Dense(config.out_channels or config.in_channels, name="proj_out")(x)
    return x.reshape(x.shape[0], *size, -1)


def rotation(config: FluxConfig, length: int, sizes: list[tuple[int, ...]]) -> joint_attention.Turn:
  """Cosines and sines of text tokens, all at position 0, then of the target's and the reference's.

  Args:
    config: of the transformer.
    length: N of the text.
    sizes: sides of the target, and of the reference if there is one.
  """
  if len(sizes) > 2:
    # More would have the same positions, and no published model has seen that.
    raise ValueError(f"expected at most one reference image for FLUX.1, got {len(sizes) - 1}")
  ids = [np.zeros((length, _AXES), np.int64), packing.positions(0, sizes[0])]
  ids += [packing.positions(_REFERENCE, size) for size in sizes[1:]]
  cos, sin = rope.table(np.concatenate(ids), config.axes_dims_rope, _THETA)
  return jnp.asarray(cos), jnp.asarray(sin)  # one constant of the program, and not one a block


class JointBlock(nn.Module):
  """Joint attention and a feed-forward network for each stream, all modulated."""

  num_heads: int

  @nn.compact
  def __call__(
    self, x: Array, text: Array, embedding: Array, turn: joint_attention.Turn
  ) -> tuple[Array, Array]:
    """Image `[B, T, D]` and text `[B, N, D]` after the block."""
    attend = joint_attention.JointAttention(self.num_heads, name="attn")
    return joint_attention.residuals(
      x,
      text,
      modulation.AdaLN(2, name="norm1")(embedding),
      modulation.AdaLN(2, name="norm1_context")(embedding),
      functools.partial(attend, turn=turn),
      feed_forward.FeedForward(name="ff"),
      feed_forward.FeedForward(name="ff_context"),
    )
