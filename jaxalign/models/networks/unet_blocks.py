"""The levels of a latent diffusion UNet: down, middle and up blocks of resnets and transformers.

Module names follow the published checkpoints, so that weights convert by rule (`models/weights`).
Source: Rombach et al. 2022, arXiv:2112.10752; Ho et al. 2020, arXiv:2006.11239, appendix B.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign.models.networks import layers, rematerialization, transformer_2d
from jaxalign.types import Array


@dataclasses.dataclass(frozen=True)
class Level:
  """What the blocks at one resolution are made of.

  Attributes:
    channels: width of the feature map.
    num_resnets: residual blocks, skip connections included on the way up.
    has_attention: whether a transformer follows each residual block.
    num_transformer_layers: transformer blocks in each transformer.
    num_heads: attention heads; divides `channels`.
    norm_num_groups, norm_eps: of every group normalisation in a residual block.
    use_linear_projection: transformers project with a linear map instead of a 1 x 1 convolution.
    remat: what each block keeps for its gradient, a name of `rematerialization.REMAT`.
  """

  channels: int
  num_resnets: int
  has_attention: bool
  num_transformer_layers: int
  num_heads: int
  norm_num_groups: int
  norm_eps: float
  use_linear_projection: bool
  remat: str = "none"

  def resnet(self, index: int, output_scale: float = 1.0) -> "ResnetBlock":
    kind = rematerialization.rematerialized(ResnetBlock, self.remat)
    name = f"resnets_{index}"
    return kind(self.channels, self.norm_num_groups, self.norm_eps, output_scale, name=name)

  def transformer(self, index: int) -> transformer_2d.Transformer2D:
    kind = rematerialization.rematerialized(transformer_2d.Transformer2D, self.remat)
    return kind(
      self.num_heads,
      self.num_transformer_layers,
      self.norm_num_groups,
      self.use_linear_projection,
      name=f"attentions_{index}",
    )


class ResnetBlock(nn.Module):
  """Residual block of two convolutions; the time embedding is added between them.

  `(shortcut(x) + h) / output_scale`, where the shortcut is a 1 x 1 convolution when widths differ.
  """

  channels: int
  norm_num_groups: int
  norm_eps: float
  output_scale: float = 1.0

  @nn.compact
  def __call__(self, x: Array, temb: Array) -> Array:  # [B, H, W, C_in], [B, E] -> [B, H, W, C]
    h: Array = jax.nn.silu(layers.GroupNorm(self.norm_num_groups, self.norm_eps, name="norm1")(x))
    h = layers.Conv(self.channels, name="conv1")(h)
    h = h + layers.Dense(self.channels, name="time_emb_proj")(jax.nn.silu(temb))[:, None, None]
    h = jax.nn.silu(layers.GroupNorm(self.norm_num_groups, self.norm_eps, name="norm2")(h))
    h = layers.Conv(self.channels, name="conv2")(h)
    if x.shape[-1] != self.channels:
      x = layers.Conv(self.channels, kernel_size=1, padding=0, name="conv_shortcut")(x)
    return (x + h) / self.output_scale


class Downsample(nn.Module):
  """Halves the resolution, rounding up, with a strided convolution."""

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, H, W, C] -> [B, ceil(H / 2), ceil(W / 2), C]
    return layers.Conv(x.shape[-1], stride=2, name="conv")(x)


class Upsample(nn.Module):
  """Nearest-neighbour upsampling to `height` x `width`, then a convolution.

  The target is the size that `Downsample` halved, `2 n` or `2 n - 1`. For both the nearest source
  of position d is d // 2, so doubling and cropping is exact and needs no gather, whose gradient
  would be a slow scatter.
  """

  height: int
  width: int

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, H, W, C] -> [B, height, width, C]
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)[:, : self.height, : self.width]
    return layers.Conv(x.shape[-1], name="conv")(x)


class DownBlock(nn.Module):
  """Residual blocks, each with a transformer if the level has attention, then a downsampling."""

  level: Level
  downsample: bool

  @nn.compact
  def __call__(self, x: Array, temb: Array, text: Array) -> tuple[Array, list[Array]]:
    """Returns the output and the feature maps for the way up, in order."""
    skips = []
    for i in range(self.level.num_resnets):
      x = self.level.resnet(i)(x, temb)
      if self.level.has_attention:
        x = self.level.transformer(i)(x, text)
      skips.append(x)
    if self.downsample:
      x = Downsample(name="downsamplers_0")(x)
      skips.append(x)
    return x, skips


class MidBlock(nn.Module):
  """Residual block, transformer, residual block at the lowest resolution."""

  level: Level
  output_scale: float

  @nn.compact
  def __call__(self, x: Array, temb: Array, text: Array) -> Array:  # [B, H, W, C] -> [B, H, W, C]
    x = self.level.resnet(0, self.output_scale)(x, temb)
    x = self.level.transformer(0)(x, text)
    return self.level.resnet(1, self.output_scale)(x, temb)


class UpBlock(nn.Module):
  """Like `DownBlock`, with one skip connection consumed by each residual block, then upsampling."""

  level: Level
  upsample: bool

  @nn.compact
  def __call__(self, x: Array, skips: list[Array], temb: Array, text: Array) -> Array:
    """Pops `num_resnets` maps off the end of `skips`, the last first."""
    for i in range(self.level.num_resnets):
      x = self.level.resnet(i)(jnp.concatenate([x, skips.pop()], axis=-1), temb)
      if self.level.has_attention:
        x = self.level.transformer(i)(x, text)
    if self.upsample:
      height, width = skips[-1].shape[1:3]
      x = Upsample(height, width, name="upsamplers_0")(x)
    return x
