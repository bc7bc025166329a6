"""Images to latents and back: the autoencoder of a latent diffusion model, as pure functions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import checks
from jaxalign.models.networks import lean_decoding
from jaxalign.types import Array, Key, Params, at_least_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoencoding:
  """What latents have to do with images. Holds no arrays, so a jitted closure captures none.

  vae: its `encode` and `decode` know latents as it makes them, its `normalize` and `denormalize`
    what a denoiser sees of them; its config has `downscale` and `latent_channels`.
  image_size: `(H, W)` in pixels of the images that are sampled.
  decode_batch, decode_tile: see `stable_diffusion.open_model`.
  vae_dtype: what images are decoded in.
  """

  vae: Any
  image_size: tuple[int, int]
  decode_batch: int | None = None
  decode_tile: int | None = None
  vae_dtype: str = "float32"

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, C)` of the latents that decode to `image_size`."""
    height, width = (pixels // self.vae.config.downscale for pixels in self.image_size)
    return height, width, self.vae.config.latent_channels

  # The autoencoder computes in float32 whatever it is given, unless `vae_dtype` says otherwise of
  # decoding: lower precision costs visible detail, in the one of XL most.
  # The ignores: flax types `apply` as perhaps a pair, which it is only with `mutable`.

  def vae_moments(self, params: Params, images: Array) -> tuple[Array, Array]:
    """Images `[B, H, W, 3]` in [-1, 1] to the unscaled `(mean, log_var)`, each `[B, h, w, C]`."""
    images = images.astype(jnp.float32)
    return self.vae.apply({"params": params}, images, method="encode")  # type: ignore[return-value]

  def vae_decode(self, params: Params, latents: Array) -> Array:
    """Unscaled latents `[B, h, w, C]` to images `[B, H, W, 3]`, about [-1, 1]."""
    decode_fn: lean_decoding.DecodeFn = self._decode_whole
    if self.decode_tile is not None:
      decode_fn = lean_decoding.tiled(decode_fn, self.decode_tile, self.vae.config.downscale)
    if self.decode_batch is not None:
      decode_fn = lean_decoding.sliced(decode_fn, self.decode_batch)
    return at_least_float32(decode_fn(params, latents.astype(self.vae_dtype)))

  def _decode_whole(self, params: Params, latents: Array) -> Array:
    return self.vae.apply({"params": params}, latents, method="decode")  # type: ignore[return-value]

  def encode_images(self, params: Params, images: Array, key: Key | None = None) -> Array:
    """Images `[B, H, W, 3]` in [0, 1] to `x_0`, the normalised latents `z`, `[B, h, w, C]`.

    `z` is the posterior's mean when `key` is None, else a sample.
    """
    z, log_var = self.vae_moments(params, 2.0 * images - 1.0)
    if key is not None:
      z = z + jnp.exp(0.5 * log_var) * jax.random.normal(key, z.shape, z.dtype)
    return self.vae.apply({"params": params}, z, method="normalize")  # type: ignore[return-value]

  def encode_samples(self, params: Params, images: Array, key: Key | None) -> Array:
    """`encode_images` of samples as `models.model.Model.encode` takes them: bytes are 0 to 255."""
    images = images / 255.0 if images.dtype == jnp.uint8 else images
    return self.encode_images(params, images, key)

  def decode(self, params: Params, latents: Array) -> Array:
    """`x_0` `[B, h, w, C]` to images `[B, H, W, 3]`, clipped to [0, 1]."""
    latents = latents.astype(jnp.float32)
    z: Any = self.vae.apply({"params": params}, latents, method="denormalize")
    return jnp.clip(0.5 * self.vae_decode(params, z) + 0.5, 0.0, 1.0)

  def sized(self, height: int, width: int, multiple: int) -> Any:
    """This value for images of another size, whose sides are multiples of `multiple` pixels.

    Raises ValueError for sides that are not.
    """
    if min(height, width) < multiple or height % multiple or width % multiple:
      raise ValueError(
        f"image size: expected multiples of {multiple} pixels, got {height} x {width}"
      )
    return dataclasses.replace(self, image_size=(height, width))


def image_size(field: str, size: int | tuple[int, ...]) -> tuple[int, int]:
  """Height and width from a field of a config that has one number or both.

  Raises ValueError, naming the field, for anything else.
  """
  entries = size if isinstance(size, tuple) else (size,)
  if len(entries) not in (1, 2) or not all(0 < entry < checks.MOST for entry in entries):
    raise ValueError(f"{field}: expected a size, or height and width, got {checks.shown(size)}")
  return entries[0], entries[-1]
