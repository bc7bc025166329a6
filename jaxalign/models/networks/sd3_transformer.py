"""The MMDiT of Stable Diffusion 3 and 3.5, driven by its config.json.

Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2. Module names are diffusers', and so are
those of the fields.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.networks import (
  config_fields,
  embeddings,
  feed_forward,
  joint_attention,
  layers,
  modulation,
  packing,
  rematerialization,
)
from jaxalign.types import Array


@dataclasses.dataclass(frozen=True)
class SD3Config:
  """The fields of `transformer/config.json`, with diffusers' defaults."""

  sample_size: int = 128
  patch_size: int = 2
  in_channels: int = 16
  num_layers: int = 18
  attention_head_dim: int = 64
  num_attention_heads: int = 18
  joint_attention_dim: int = 4096
  caption_projection_dim: int = 1152
  pooled_projection_dim: int = 2048
  out_channels: int = 16
  pos_embed_max_size: int = 96
  dual_attention_layers: tuple[int, ...] = ()
  qk_norm: str | None = None

  def __post_init__(self):
    for field in dataclasses.fields(self):
      if field.type in (int, "int"):
        most = layers.MOST if field.name == "num_layers" else checks.MOST
        where = f"transformer config: {field.name}"
        checks.check_range(where, getattr(self, field.name), 1, most)
    if self.caption_projection_dim != self.width:
      raise ValueError(
        f"transformer config: expected caption_projection_dim to be {self.width}, num_attention_"
        f"heads times attention_head_dim, found {checks.shown(self.caption_projection_dim)}"
      )
    if self.width % 4:
      raise ValueError(
        f"transformer config: expected num_attention_heads * attention_head_dim to be a multiple "
        f"of 4, for positions on two axes, found {self.width}"
      )
    if self.qk_norm not in (None, "rms_norm"):
      found = checks.shown(self.qk_norm)
      raise ValueError(f"transformer config: qk_norm: expected null or rms_norm, found {found}")
    beyond = [k for k in self.dual_attention_layers if not 0 <= k < self.num_layers]
    if beyond:
      raise ValueError(
        f"transformer config: dual_attention_layers: expected layers below {self.num_layers} "
        f"(num_layers), found {checks.first([str(k) for k in beyond])}"
      )

  @property
  def width(self) -> int:
    """D of image and text tokens inside."""
    return self.num_attention_heads * self.attention_head_dim

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "SD3Config":
    """Reads the parsed `transformer/config.json`; other entries are left alone."""
    found = config_fields.of(cls, config)
    if found.get("out_channels", 0) is None:
      found["out_channels"] = found.get("in_channels", cls.in_channels)
    return cls(**found)


class SD3Transformer2DModel(nn.Module):
  """Predicts the velocity of a rectified flow from noisy latents, time and text.

  It computes in the dtype of `x_t`; norms, attention logits and the sinusoids are float32. `remat`
  says what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  config: SD3Config
  remat: str = "none"

  @nn.compact
  def __call__(self, x_t: Array, t: Array, text: Array, pooled: Array) -> Array:
    """Runs the network.

    Args:
      x_t: `[B, H, W, in_channels]`; H and W multiples of `patch_size`, at most `pos_embed_max_size`
        patches each.
      t: `[B]` times, 1000 sigma.
      text: `[B, N, joint_attention_dim]`; N of any length, padding included.
      pooled: `[B, pooled_projection_dim]`, of the whole prompt.

    Returns:
      `[B, H, W, out_channels]`, the dtype of `x_t`.
    """
    config, dtype = self.config, x_t.dtype
    x = PatchEmbed(config, name="pos_embed")(x_t)
    embed = embeddings.TimeEmbedding(config.width, name="time_text_embed")
    embedding = embed(t, dtype, pooled=pooled)
    text = layers.Dense(config.width, name="context_embedder")(text.astype(dtype))
    kind = rematerialization.rematerialized(JointBlock, self.remat)
    for k in range(config.num_layers):
      dual, ends = k in config.dual_attention_layers, k == config.num_layers - 1
      block = kind(
        config.num_attention_heads,
        config.qk_norm is not None,
        dual,
        ends,
        name=f"transformer_blocks_{k}",
      )
      x, text = block(x, text, embedding)
    x = modulation.ContinuousAdaLN(name="norm_out")(x, embedding)
    x = layers.Dense(config.patch_size**2 * config.out_channels, name="proj_out")(x)
    rows, columns = (pixels // config.patch_size for pixels in x_t.shape[1:3])
    x = x.reshape(x.shape[0], rows, columns, -1)
    return packing.unpack(x, "dy_dx_c", config.patch_size)


class PatchEmbed(nn.Module):
  """Patches to tokens, plus the middle of a stored table of positions."""

  config: SD3Config

  @nn.compact
  def __call__(self, x_t: Array) -> Array:  # [B, H, W, C] -> [B, T, D]
    config = self.config
    patch, most = config.patch_size, config.pos_embed_max_size
    rows, columns = (pixels // patch for pixels in x_t.shape[1:3])
    if x_t.shape[1] % patch or x_t.shape[2] % patch or max(rows, columns) > most:
      raise ValueError(
        f"expected latents with sides that are multiples of {patch} up to {patch * most}, got "
        f"{x_t.shape[1]} x {x_t.shape[2]}"
      )
    x = layers.Conv(config.width, kernel_size=patch, stride=patch, padding=0, name="proj")(x_t)
    table = layers.parameter(self, "pos_embed", positions(config), (1, most * most, config.width))
    table = jax.lax.stop_gradient(jnp.asarray(table)).reshape(most, most, -1)
    top, left = (most - rows) // 2, (most - columns) // 2
    table = table[top : top + rows, left : left + columns]
    return (x + table).astype(x.dtype).reshape(x.shape[0], rows * columns, -1)


def positions(config: SD3Config) -> Callable[..., Array]:
  """Initialises the table as it is in files: sines and cosines of column, then of row.

  Positions count from 0 to `sample_size / patch_size`, which the longest side spans.
  """

  def init(key, shape, dtype=jnp.float32):
    del key
    most, quarter = config.pos_embed_max_size, config.width // 4
    position = jnp.arange(most) * (config.sample_size // config.patch_size) / most
    angles = position[:, None] * 10000.0 ** (-jnp.arange(quarter) / quarter)
    waves = jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)  # [most, D / 2]
    by_column = jnp.broadcast_to(waves[None], (most, most, 2 * quarter))
    by_row = jnp.broadcast_to(waves[:, None], (most, most, 2 * quarter))
    return jnp.concatenate([by_column, by_row], axis=-1).reshape(shape).astype(dtype)

  return init


class JointBlock(nn.Module):
  """Joint attention and a feed-forward network for each stream, all modulated.

  dual: the image also attends to itself alone (MMDiT-X of 3.5 medium).
  text_ends: nothing reads the text after this block.
  """

  num_heads: int
  normalize: bool
  dual: bool
  text_ends: bool

  @nn.compact
  def __call__(self, x: Array, text: Array, embedding: Array) -> tuple[Array, Array | None]:
    first, second, *third = modulation.AdaLN(3 if self.dual else 2, name="norm1")(embedding)
    if self.text_ends:
      text_in = modulation.ContinuousAdaLN(name="norm1_context")(text, embedding)
    else:
      text_first, text_second = modulation.AdaLN(2, name="norm1_context")(embedding)
      text_in = text_first.of(text)
    attend = joint_attention.JointAttention(
      self.num_heads,
      normalize=self.normalize,
      text_first=False,
      text_ends=self.text_ends,
      name="attn",
    )
    x_out, text_out = attend(first.of(x), text_in)
    joined = first.add(x, x_out)
    for alone in third:
      attend = joint_attention.SelfAttention(
        self.num_heads, normalize=self.normalize, name="attn2"
      )
      # Of the tokens as they came: both attentions of the block read the same.
      joined = alone.add(joined, attend(alone.of(x)))
    x = second.add(joined, feed_forward.FeedForward(name="ff")(second.of(joined)))
    if self.text_ends:
      return x, None
    text = text_first.add(text, text_out)
    of_text = feed_forward.FeedForward(name="ff_context")
    return x, text_second.add(text, of_text(text_second.of(text)))
