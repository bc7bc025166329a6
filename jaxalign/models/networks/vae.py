"""AutoencoderKL: images to latents an eighth (or so) of their size, and back.

The network of Rombach et al. 2022 (arXiv:2112.10752, appendix D.1 and G), under the parameter
names of diffusers. It speaks of *unscaled* latents: `x_0 = (mean - shift_factor) * scaling_factor`
belongs to whoever puts the autoencoder together with a denoiser.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.networks import config_fields, layers
from jaxalign.types import Array

_NORM_EPSILON = 1e-6  # the autoencoder's norms differ from the UNet's 1e-5
LOG_VAR_RANGE = (-30.0, 20.0)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """The fields of `vae/config.json` that shape the network or scale its latents."""

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)
  block_out_channels: tuple[int, ...] = (64,)
  layers_per_block: int = 1
  act_fn: str = "silu"
  latent_channels: int = 4
  norm_num_groups: int = 32
  sample_size: int | tuple[int, ...] = 32
  scaling_factor: float = 0.18215
  shift_factor: float | None = None
  force_upcast: bool = True
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True

  def __post_init__(self):
    widths = {f"block_out_channels {k}": width for k, width in enumerate(self.block_out_channels)}
    names = ("in_channels", "out_channels", "latent_channels", "norm_num_groups")
    sizes = {name: getattr(self, name) for name in names}
    if self.norm_num_groups is None:
      raise ValueError("vae config: norm_num_groups: expected a whole number, found null")
    if not self.scaling_factor:
      raise ValueError("vae config: scaling_factor: expected another than 0, found 0")
    for name, size in {**sizes, **widths}.items():
      checks.check_range(f"vae config: {name}", size, 1, checks.MOST)
    checks.check_range("vae config: layers_per_block", self.layers_per_block, 1, layers.MOST)
    _check_blocks("down_block_types", self.down_block_types, "DownEncoderBlock2D")
    _check_blocks("up_block_types", self.up_block_types, "UpDecoderBlock2D")
    stages = len(self.block_out_channels)
    if not stages == len(self.down_block_types) == len(self.up_block_types):
      raise ValueError(
        f"vae config: block_out_channels has {stages} entries, down_block_types "
        f"{len(self.down_block_types)}, up_block_types {len(self.up_block_types)}; make them equal"
      )
    if self.act_fn not in ("silu", "swish"):
      raise ValueError(f"vae config: expected act_fn 'silu', found {checks.shown(self.act_fn)}")
    uneven = [width for width in self.block_out_channels if width % self.norm_num_groups]
    if uneven:
      raise ValueError(
        f"vae config: block_out_channels {uneven} not divisible by norm_num_groups "
        f"{self.norm_num_groups}"
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "VAEConfig":
    """Reads the parsed `vae/config.json`; entries that no field is named after are left alone.

    Raises ValueError where one would change the latents.
    """
    for name in ("latents_mean", "latents_std"):
      if config.get(name) is not None:
        raise ValueError(f"vae config: expected {name} null, found {checks.shown(config[name])}")
    return cls(**config_fields.of(cls, config))

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 2 ** (len(self.block_out_channels) - 1)


def _check_blocks(field: str, found: tuple[str, ...], supported: str) -> None:
  unknown = sorted(set(found) - {supported})
  if unknown:
    raise ValueError(f"vae config: {field} holds {unknown}, only {supported!r} is supported")


class AutoencoderKL(nn.Module):
  """The autoencoder; call it as `apply(variables, images, method="encode")` or `"decode"`."""

  config: VAEConfig

  def setup(self):
    config = self.config
    self.encoder = Encoder(config)
    self.decoder = Decoder(config)
    if config.use_quant_conv:
      self.quant_conv = layers.Conv(2 * config.latent_channels, kernel_size=1, padding=0)
    if config.use_post_quant_conv:
      self.post_quant_conv = layers.Conv(config.latent_channels, kernel_size=1, padding=0)

  def encode(self, images: Array) -> tuple[Array, Array]:
    """`q(z | image) = N(mean, exp(log_var))`.

    Args:
      images: `[B, H, W, 3]` in [-1, 1]; H and W multiples of `config.downscale`.

    Returns:
      `(mean, log_var)`, each `[B, h, w, C]`, unscaled; `log_var` in [-30, 20].
    """
    moments = self.encoder(images)
    if self.config.use_quant_conv:
      moments = self.quant_conv(moments)
    mean, log_var = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(log_var, *LOG_VAR_RANGE)

  def decode(self, latents: Array) -> Array:
    """Unscaled latents `[B, h, w, C]` to images `[B, H, W, 3]`, about [-1, 1], not clipped."""
    if self.config.use_post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents)

  def normalize(self, latents: Array) -> Array:
    """What a denoiser sees of latents `[B, h, w, C]`: `(latents - shift) * scaling_factor`."""
    return (latents - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

  def denormalize(self, x_0: Array) -> Array:
    """The inverse of `normalize`."""
    return x_0 / self.config.scaling_factor + (self.config.shift_factor or 0.0)

  def __call__(self, images: Array) -> Array:
    """Images `[B, H, W, 3]` to their reconstruction from the mean; touches every parameter."""
    mean, _ = self.encode(images)
    return self.decode(mean)


class Encoder(nn.Module):
  """Images `[B, H, W, 3]` to the moments `[B, h, w, 2 C]`."""

  config: VAEConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config = self.config
    x = layers.Conv(config.block_out_channels[0], name="conv_in")(x)
    last = len(config.block_out_channels) - 1
    for i, width in enumerate(config.block_out_channels):
      x = DownEncoderBlock(config, width, downsample=i < last, name=f"down_blocks_{i}")(x)
    x = MidBlock(config, name="mid_block")(x)
    x = layers.GroupNorm(config.norm_num_groups, _NORM_EPSILON, name="conv_norm_out")(x)
    return layers.Conv(2 * config.latent_channels, name="conv_out")(jax.nn.silu(x))


class Decoder(nn.Module):
  """Latents `[B, h, w, C]` to images `[B, H, W, 3]`; one resnet more per block than the encoder."""

  config: VAEConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config = self.config
    x = layers.Conv(config.block_out_channels[-1], name="conv_in")(x)
    x = MidBlock(config, name="mid_block")(x)
    last = len(config.block_out_channels) - 1
    for i, width in enumerate(reversed(config.block_out_channels)):
      x = UpDecoderBlock(config, width, upsample=i < last, name=f"up_blocks_{i}")(x)
    x = layers.GroupNorm(config.norm_num_groups, _NORM_EPSILON, name="conv_norm_out")(x)
    return layers.Conv(config.out_channels, name="conv_out")(jax.nn.silu(x))


class DownEncoderBlock(nn.Module):
  """Resnets, then a convolution of stride 2."""

  config: VAEConfig
  features: int
  downsample: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i in range(self.config.layers_per_block):
      x = ResnetBlock(self.config, self.features, name=f"resnets_{i}")(x)
    if self.downsample:
      x = Downsample(self.features, name="downsamplers_0")(x)
    return x


class UpDecoderBlock(nn.Module):
  """Resnets, then nearest-neighbour upsampling and a convolution."""

  config: VAEConfig
  features: int
  upsample: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for i in range(self.config.layers_per_block + 1):
      x = ResnetBlock(self.config, self.features, name=f"resnets_{i}")(x)
    if self.upsample:
      x = Upsample(self.features, name="upsamplers_0")(x)
    return x


class MidBlock(nn.Module):
  """Resnet, self-attention over all pixels (if the config says so), resnet."""

  config: VAEConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    features = self.config.block_out_channels[-1]
    x = ResnetBlock(self.config, features, name="resnets_0")(x)
    if self.config.mid_block_add_attention:
      x = PixelAttention(self.config.norm_num_groups, name="attentions_0")(x)
    return ResnetBlock(self.config, features, name="resnets_1")(x)


class ResnetBlock(nn.Module):
  """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`, without a time embedding."""

  config: VAEConfig
  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    groups = self.config.norm_num_groups
    h: Array = jax.nn.silu(layers.GroupNorm(groups, _NORM_EPSILON, name="norm1")(x))
    h = layers.Conv(self.features, name="conv1")(h)
    h = jax.nn.silu(layers.GroupNorm(groups, _NORM_EPSILON, name="norm2")(h))
    h = layers.Conv(self.features, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = layers.Conv(self.features, kernel_size=1, padding=0, name="conv_shortcut")(x)
    return x + h


class PixelAttention(nn.Module):
  """`x` plus single-head self-attention over the H * W pixels of the normalised `x`."""

  num_groups: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, _, _, channels = x.shape
    h = layers.GroupNorm(self.num_groups, _NORM_EPSILON, name="group_norm")(x)
    h = h.reshape(batch, -1, channels)
    query, key, value = (
      layers.Dense(channels, name=name)(h)[:, :, None] for name in ("to_q", "to_k", "to_v")
    )  # [B, HW, 1, C]
    h = layers.Dense(channels, name="to_out_0")(layers.attention(query, key, value))
    return x + h.reshape(x.shape)


class Downsample(nn.Module):
  """Halves H and W; pads only below and to the right, which decides how latents are aligned."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    padding = ((0, 1), (0, 1))
    return layers.Conv(self.features, stride=2, padding=padding, name="conv")(x)


class Upsample(nn.Module):
  """Doubles H and W by repeating pixels, then convolves."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return layers.Conv(self.features, name="conv")(x)
