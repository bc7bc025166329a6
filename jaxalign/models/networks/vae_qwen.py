"""AutoencoderKLQwenImage on images: a causal video autoencoder (Wan 2.1's), exact for one frame.

Qwen-Image, arXiv:2508.02324; Wan, arXiv:2503.20314, section 4.1. A causal convolution has zeros in
front of the first frame, so that of one frame only the last temporal slice of its kernel sees more
than zeros; and the first frame of a video is never resampled in time. What is left is a network of
2-D convolutions, under diffusers' names. `from_file` makes its tensors of those of a file,
`to_file` those of a file again.

Like `vae`, the network speaks of latents as it makes them; a denoiser takes `normalize` of them.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.models.networks import config_fields, layers, vae
from jaxalign.types import Array

# Fields of what happens in time, or in training.
FIXED = {"temperal_downsample": ((False, True, True),), "dropout": (0.0,)}
_SMALLEST_NORM = 1e-12
_MEAN = (
  *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
  *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
_STD = (
  *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
  *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)


@dataclasses.dataclass(frozen=True)
class QwenVAEConfig:
  """The fields of `vae/config.json` that matter to one frame, with diffusers' defaults.

  dim_mult: width of each level, in units of `base_dim`.
  attn_scales: the encoder attends where its map has one of these sizes, relative to the image.
  latents_mean, latents_std: by channel, see `normalize`.
  """

  base_dim: int = 96
  z_dim: int = 16
  dim_mult: tuple[int, ...] = (1, 2, 4, 4)
  num_res_blocks: int = 2
  attn_scales: tuple[float, ...] = ()
  input_channels: int = 3
  latents_mean: tuple[float, ...] = _MEAN
  latents_std: tuple[float, ...] = _STD

  def __post_init__(self):
    checks.check_range("vae config: base_dim", self.base_dim, 2, checks.MOST)  # halved on the way
    checks.check_range("vae config: z_dim", self.z_dim, 1, checks.MOST)
    checks.check_range("vae config: input_channels", self.input_channels, 1, checks.MOST)
    checks.check_range("vae config: num_res_blocks", self.num_res_blocks, 1, layers.MOST)
    checks.check_range("vae config: levels of dim_mult", len(self.dim_mult), 1, layers.MOST)
    for k, multiple in enumerate(self.dim_mult):
      checks.check_range(f"vae config: dim_mult {k}", multiple, 1, checks.MOST // self.base_dim)
    for name in ("latents_mean", "latents_std"):
      if len(getattr(self, name)) != self.z_dim:
        raise ValueError(
          f"vae config: {name}: expected {self.z_dim} numbers (z_dim), found "
          f"{len(getattr(self, name))}"
        )
    if not all(std > 0 for std in self.latents_std):
      raise ValueError(
        f"vae config: latents_std: expected numbers above 0, found {checks.shown(self.latents_std)}"
      )

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "QwenVAEConfig":
    """Reads the parsed `vae/config.json`; other entries, among them time's, are left alone."""
    return cls(**config_fields.of(cls, config))

  @property
  def downscale(self) -> int:
    """Image pixels per latent pixel, along each side."""
    return 2 ** (len(self.dim_mult) - 1)

  @property
  def latent_channels(self) -> int:
    """`z_dim`, as other autoencoders call it."""
    return self.z_dim

  @property
  def in_channels(self) -> int:
    """`input_channels`, as other autoencoders call it."""
    return self.input_channels


def normalize(latents: Array, config: QwenVAEConfig) -> Array:
  """`x_0 = (latents - latents_mean) / latents_std` by channel, `[B, h, w, C]`; in float32."""
  mean, std = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
  return ((latents.astype(jnp.float32) - mean) / std).astype(latents.dtype)


def denormalize(x_0: Array, config: QwenVAEConfig) -> Array:
  """The inverse of `normalize`."""
  mean, std = (np.asarray(x, np.float32) for x in (config.latents_mean, config.latents_std))
  return (x_0.astype(jnp.float32) * std + mean).astype(x_0.dtype)


def from_file(name: str, tensor: Any) -> np.ndarray | None:
  """The tensor of the 2-D network that a file's `tensor`, stored as `name`, stands for.

  Names stay as they are, and so does PyTorch's layout. Of a kernel `[out, in, t, k, k]` it is the
  last slice in time, of a norm's weight `[C, 1, ...]` a vector; None is resampling in time.
  """
  *_, module, leaf = name.split(".")
  if module == "time_conv":
    return None
  tensor = np.asarray(tensor)
  if leaf == "gamma":
    return tensor.reshape(-1)
  return tensor[:, :, -1] if tensor.ndim == 5 else tensor


def shape_from_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...] | None:
  """The shape of `from_file`'s result for a tensor of this shape, which is not read."""
  *_, module, leaf = name.split(".")
  if module == "time_conv":
    return None
  if leaf == "gamma":
    return (math.prod(shape),)
  return (*shape[:2], *shape[3:]) if len(shape) == 5 and shape[2] else shape


def to_file(name: str, tensor: np.ndarray | None, read: Any) -> np.ndarray:
  """The inverse of `from_file`: the tensor that a file holds as `name`.

  Args:
    tensor: of the 2-D network; None where it has none.
    read: what the file that the network came from holds as `name`: the slices that one frame does
      not see are its own.
  """
  read = np.asarray(read)
  if tensor is None:
    return read
  if read.ndim != 5:
    return np.asarray(tensor, read.dtype).reshape(read.shape)
  kernel = read.copy()
  kernel[:, :, -1] = tensor
  return kernel


class AutoencoderKLQwenImage(nn.Module):
  """The autoencoder; call it as `apply(variables, images, method="encode")` or `"decode"`."""

  config: QwenVAEConfig

  def setup(self):
    config = self.config
    self.encoder = Encoder(config)
    self.decoder = Decoder(config)
    self.quant_conv = layers.Conv(2 * config.z_dim, kernel_size=1, padding=0)
    self.post_quant_conv = layers.Conv(config.z_dim, kernel_size=1, padding=0)

  def encode(self, images: Array) -> tuple[Array, Array]:
    """`q(z | image) = N(mean, exp(log_var))`; Qwen-Image's edits take the mean.

    Args:
      images: `[B, H, W, 3]` in [-1, 1]; H and W multiples of `config.downscale`.

    Returns:
      `(mean, log_var)`, each `[B, h, w, C]`, not normalised; `log_var` in [-30, 20].
    """
    mean, log_var = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
    return mean, jnp.clip(log_var, *vae.LOG_VAR_RANGE)

  def decode(self, latents: Array) -> Array:
    """Latents `[B, h, w, C]`, as `encode` has them, to images `[B, H, W, 3]` in [-1, 1]."""
    return jnp.clip(self.decoder(self.post_quant_conv(latents)), -1.0, 1.0)

  def normalize(self, latents: Array) -> Array:
    """What a denoiser sees of latents, both `[B, h, w, C]`."""
    return normalize(latents, self.config)

  def denormalize(self, x_0: Array) -> Array:
    """The inverse of `normalize`."""
    return denormalize(x_0, self.config)

  def __call__(self, images: Array) -> Array:
    """Images `[B, H, W, 3]` to their reconstruction from the mean; touches every parameter."""
    mean, _ = self.encode(images)
    return self.decode(mean)


class Encoder(nn.Module):
  """Images `[B, H, W, 3]` to the moments `[B, h, w, 2 C]`; the blocks of all levels in one list."""

  config: QwenVAEConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = layers.Conv(self.config.base_dim, name="conv_in")(x)
    for k, block in enumerate(self._blocks()):
      x = block(name=f"down_blocks_{k}")(x)
    x = MidBlock(name="mid_block")(x)
    x = jax.nn.silu(ChannelNorm(name="norm_out")(x))
    return layers.Conv(2 * self.config.z_dim, name="conv_out")(x)

  def _blocks(self) -> list[Callable[..., nn.Module]]:
    config = self.config
    blocks: list[Callable[..., nn.Module]] = []
    for level, multiple in enumerate(config.dim_mult):
      for _ in range(config.num_res_blocks):
        blocks.append(functools.partial(ResidualBlock, multiple * config.base_dim))
        if 0.5**level in config.attn_scales:
          blocks.append(PixelAttention)
      if level < len(config.dim_mult) - 1:
        blocks.append(Downsample)
    return blocks


class Decoder(nn.Module):
  """Latents `[B, h, w, C]` to images `[B, H, W, 3]`; one block more per level than the encoder."""

  config: QwenVAEConfig

  @nn.compact
  def __call__(self, x: Array) -> Array:
    config = self.config
    x = layers.Conv(config.dim_mult[-1] * config.base_dim, name="conv_in")(x)
    x = MidBlock(name="mid_block")(x)
    last = len(config.dim_mult) - 1
    for k, multiple in enumerate(reversed(config.dim_mult)):
      block = UpBlock(config, multiple * config.base_dim, upsample=k < last, name=f"up_blocks_{k}")
      x = block(x)
    x = jax.nn.silu(ChannelNorm(name="norm_out")(x))
    return layers.Conv(config.input_channels, name="conv_out")(x)


class UpBlock(nn.Module):
  """Residual blocks, then upsampling."""

  config: QwenVAEConfig
  features: int
  upsample: bool

  @nn.compact
  def __call__(self, x: Array) -> Array:
    for k in range(self.config.num_res_blocks + 1):
      x = ResidualBlock(self.features, name=f"resnets_{k}")(x)
    return Upsample(name="upsamplers_0")(x) if self.upsample else x


class MidBlock(nn.Module):
  """Residual block, self-attention over all pixels, residual block."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = ResidualBlock(x.shape[-1], name="resnets_0")(x)
    x = PixelAttention(name="attentions_0")(x)
    return ResidualBlock(x.shape[-1], name="resnets_1")(x)


class ResidualBlock(nn.Module):
  """`shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x))))))`."""

  features: int

  @nn.compact
  def __call__(self, x: Array) -> Array:
    h: Array = jax.nn.silu(ChannelNorm(name="norm1")(x))
    h = layers.Conv(self.features, name="conv1")(h)
    h = jax.nn.silu(ChannelNorm(name="norm2")(h))
    h = layers.Conv(self.features, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = layers.Conv(self.features, kernel_size=1, padding=0, name="conv_shortcut")(x)
    return x + h


class PixelAttention(nn.Module):
  """`x` plus single-head self-attention over the H * W pixels of the normalised `x`."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    batch, _, _, channels = x.shape
    h = ChannelNorm(name="norm")(x)
    h = layers.Conv(3 * channels, kernel_size=1, padding=0, name="to_qkv")(h)
    query, key, value = jnp.split(h.reshape(batch, -1, 1, 3 * channels), 3, axis=-1)
    h = layers.attention(query, key, value).reshape(x.shape)
    return x + layers.Conv(channels, kernel_size=1, padding=0, name="proj")(h)


class ChannelNorm(nn.Module):
  """Root-mean-square norm over the channels of each pixel, `sqrt(C) * gamma * x / |x|`; float32.

  Not `layers.RMSNorm`: nothing is added to the mean square, and the norm itself has a floor.
  """

  @nn.compact
  def __call__(self, x: Array) -> Array:  # [B, H, W, C]
    channels = x.shape[-1]
    gamma = layers.parameter(self, "gamma", nn.initializers.ones, (channels,))
    x_32 = x.astype(jnp.float32)
    square = jnp.sum(jnp.square(x_32), axis=-1, keepdims=True)
    normalized = x_32 * jax.lax.rsqrt(jnp.maximum(square, _SMALLEST_NORM**2))
    return (normalized * channels**0.5 * gamma).astype(x.dtype)


class Downsample(nn.Module):
  """Halves H and W; pads only below and to the right."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    padding = ((0, 1), (0, 1))
    return layers.Conv(x.shape[-1], stride=2, padding=padding, name="resample_1")(x)


class Upsample(nn.Module):
  """Doubles H and W by repeating pixels, then halves the channels by a convolution."""

  @nn.compact
  def __call__(self, x: Array) -> Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return layers.Conv(x.shape[-1] // 2, name="resample_1")(x)
