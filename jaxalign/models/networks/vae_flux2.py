"""AutoencoderKLFlux2 (FLUX.2): Stable Diffusion's autoencoder, latents by stored statistics.

The network is that of `vae` (arXiv:2112.10752). What a denoiser sees of its latents is *packed* and
*normalised*: the channels of 2 x 2 pixels become those of one, each normalised by the mean and the
variance that a batch norm (arXiv:1502.03167) has stored for it. No scaling factor, no shift.

  images [B, 16 h, 16 w, 3]  encode, patchify      packed [B, h, w, 4 C]  normalize    x_0
  x_0    [B, h, w, 4 C]      denormalize           packed [B, h, w, 4 C]  unpatchify, decode

FLUX.2's transformer takes one packed pixel as a token. The autoencoder's own `normalize` keeps
`x_0` as a map `[B, 2 h, 2 w, C]`: the same numbers in another order.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.networks import config_fields, layers, packing, vae
from jaxalign.types import Array

_PATCH, _ORDER = 2, "c_dy_dx"  # the only size that diffusers' pipelines pack by


@dataclasses.dataclass(frozen=True)
class Flux2VAEConfig:
  """The fields of `vae/config.json` that shape the network or its latents, with their defaults."""

  in_channels: int = 3
  out_channels: int = 3
  down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",) * 4
  up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",) * 4
  block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
  decoder_block_out_channels: tuple[int, ...] | None = None
  layers_per_block: int = 2
  act_fn: str = "silu"
  latent_channels: int = 32
  norm_num_groups: int = 32
  use_quant_conv: bool = True
  use_post_quant_conv: bool = True
  mid_block_add_attention: bool = True
  batch_norm_eps: float = 1e-4
  patch_size: tuple[int, ...] = (_PATCH, _PATCH)

  def __post_init__(self):
    levels, groups = len(self.encoder.block_out_channels), self.norm_num_groups
    widths = self._decoder_widths
    if len(widths) != levels or any(width < 1 or width % groups for width in widths):
      raise ValueError(
        f"vae config: decoder_block_out_channels: expected {levels} widths (as block_out_channels "
        f"has), multiples of norm_num_groups {groups}, found {checks.shown(widths)}"
      )
    checks.check_range("vae config: batch_norm_eps", self.batch_norm_eps, 0.0)
    if self.patch_size != (_PATCH, _PATCH):
      raise ValueError(
        f"vae config: expected patch_size {[_PATCH, _PATCH]}, found {checks.shown(self.patch_size)}"
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "Flux2VAEConfig":
    """Reads the parsed `vae/config.json`; entries that no field is named after are left alone."""
    return cls(**config_fields.of(cls, config))

  @property
  def encoder(self) -> vae.VAEConfig:
    """Of the encoder alone; ValueError for what `vae` does not support."""
    return self._network(self.block_out_channels)

  @property
  def decoder(self) -> vae.VAEConfig:
    """Of the decoder alone, whose widths may be others than the encoder's."""
    return self._network(self._decoder_widths)

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along each side; a packed one is twice as wide."""
    return self.encoder.downscale

  @property
  def packed_channels(self) -> int:
    """Channels of `x_0`."""
    return _PATCH**2 * self.latent_channels

  @property
  def _decoder_widths(self) -> tuple[int, ...]:
    return self.decoder_block_out_channels or self.block_out_channels

  def _network(self, widths: tuple[int, ...]) -> vae.VAEConfig:
    own = {field.name for field in dataclasses.fields(vae.VAEConfig)}
    shared = {name: value for name, value in vars(self).items() if name in own}
    return vae.VAEConfig(**{**shared, "block_out_channels": widths})


class AutoencoderKLFlux2(vae.AutoencoderKL):
  """The autoencoder; FLUX.2 takes the mean of what it encodes, and never a sample.

  The statistics are parameters, at `params["bn"]`.
  """

  config: Flux2VAEConfig  # type: ignore[assignment]

  def setup(self):
    config = self.config
    self.encoder = vae.Encoder(config.encoder)
    self.decoder = vae.Decoder(config.decoder)
    if config.use_quant_conv:
      self.quant_conv = layers.Conv(2 * config.latent_channels, kernel_size=1, padding=0)
    if config.use_post_quant_conv:
      self.post_quant_conv = layers.Conv(config.latent_channels, kernel_size=1, padding=0)
    self.bn = Statistics(config.packed_channels)

  def normalize(self, latents: Array) -> Array:
    """What a denoiser sees of latents, both `[B, 2 h, 2 w, C]`."""
    return unpatchify(normalize(patchify(latents), self.bn(), self.config.batch_norm_eps))

  def denormalize(self, x_0: Array) -> Array:
    """The inverse of `normalize`."""
    return unpatchify(denormalize(patchify(x_0), self.bn(), self.config.batch_norm_eps))

  def __call__(self, images: Array) -> Array:
    """Images `[B, H, W, 3]` to their reconstruction from `x_0`; touches every parameter."""
    mean, _ = self.encode(images)
    return self.decode(self.denormalize(self.normalize(mean)))


class Statistics(nn.Module):
  """Stored mean and variance of each channel of packed latents (of a batch norm)."""

  features: int

  @nn.compact
  def __call__(self) -> dict[str, Array]:  # [features] each
    inits = {"running_mean": nn.initializers.zeros, "running_var": nn.initializers.ones}
    return {
      name: layers.parameter(self, name, init, (self.features,)) for name, init in inits.items()
    }


def normalize(packed: Array, statistics: Mapping[str, Array], epsilon: float) -> Array:
  """`x_0 = (packed - running_mean) / sqrt(running_var + epsilon)` by channel.

  In float32, returned as `packed` is. No gradient reaches the statistics: they are constants of the
  file, which the denoiser was trained with.

  Args:
    packed: `[B, h, w, 4 C]`, from `patchify`.
    statistics: `running_mean` and `running_var`, `[4 C]` each, which are `params["bn"]`.
    epsilon: the config's `batch_norm_eps`.
  """
  mean, std = _mean_and_std(statistics, epsilon)
  return ((packed.astype(jnp.float32) - mean) / std).astype(packed.dtype)


def denormalize(x_0: Array, statistics: Mapping[str, Array], epsilon: float) -> Array:
  """The inverse of `normalize`."""
  mean, std = _mean_and_std(statistics, epsilon)
  return (x_0.astype(jnp.float32) * std + mean).astype(x_0.dtype)


def _mean_and_std(statistics: Mapping[str, Array], epsilon: float) -> tuple[jax.Array, jax.Array]:
  mean, variance = (
    jax.lax.stop_gradient(jnp.asarray(statistics[name], jnp.float32))
    for name in ("running_mean", "running_var")
  )
  return mean, jnp.sqrt(variance + epsilon)


def patchify(latents: Array) -> Array:
  """Packs 2 x 2 pixels into one, `[B, 2 h, 2 w, C]` to `[B, h, w, 4 C]`; pixels vary fastest."""
  return packing.pack(latents, _ORDER, _PATCH)


def unpatchify(packed: Array) -> Array:
  """The inverse of `patchify`, `[B, h, w, 4 C]` to `[B, 2 h, 2 w, C]`."""
  return packing.unpack(packed, _ORDER, _PATCH)
