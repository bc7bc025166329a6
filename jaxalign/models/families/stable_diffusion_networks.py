"""The networks of Stable Diffusion 1.x, 2.x and XL as pure functions of explicit parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import checks, streams
from jaxalign.models.networks import conditioning, lean_decoding, unet, vae
from jaxalign.types import Array, Key, Params, at_least_float32


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks as pure functions. Holds no arrays, so a jitted closure captures none.

  image_size: `(H, W)` in pixels of the images that are sampled.
  decode_batch, decode_tile: see `stable_diffusion.open_model`.
  dtype: what the UNet computes in, by name, whatever its parameters are; None is that of `x_t`.
  vae_dtype: what images are decoded in.
  """

  unet: unet.UNet2DConditionModel
  vae: vae.AutoencoderKL
  text: conditioning.OneTextEncoder | conditioning.TwoTextEncoders
  image_size: tuple[int, int]
  decode_batch: int | None = None
  decode_tile: int | None = None
  dtype: str | None = None
  vae_dtype: str = "float32"

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, C)` of the latents that decode to `image_size`."""
    height, width = (pixels // self.vae.config.downscale for pixels in self.image_size)
    return height, width, self.vae.config.latent_channels

  # The ignores: flax types `apply` as perhaps a pair, which it is only with `mutable`.

  def denoise(self, variables: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
    """The UNet's prediction, `[B, h, w, C]`, in float32 whatever it is computed in.

    Args:
      variables: `{"params": ...}` and, with an adapter, `"lora": ...`.
      x_t: `[B, h, w, C]` noisy latents; t: `[B]` timesteps in [0, 1000).
      cond: from `encode_text`; for a UNet that reads more channels than `x_t` has, also `image`
        `[B, h, w, in_channels - C]`, which follow those of `x_t`: the unscaled latents of the image
        to edit (arXiv:2211.09800), or a mask and the latents of what it leaves.
    """
    x_t = jnp.asarray(self._with_image(x_t, cond), self.dtype)
    prediction: Any = self.unet.apply(variables, x_t, t, cond["text"], cond)
    return at_least_float32(prediction)

  def _with_image(self, x_t: Array, cond: Mapping[str, Array]) -> Array:
    missing = self.unet.config.in_channels - x_t.shape[-1]
    if not missing:
      return x_t
    image = cond.get("image")
    expected = (*x_t.shape[:-1], missing)
    if image is None or image.shape != expected:
      raise ValueError(
        f"this UNet reads {self.unet.config.in_channels} channels, {missing} of them of an image: "
        f"expected cond['image'] {expected}, found {'none' if image is None else image.shape}"
      )
    return jnp.concatenate([x_t, image.astype(x_t.dtype)], axis=-1)

  def encode_text(self, params: Mapping[str, Params], token_ids: Array) -> dict[str, Array]:
    """Token ids `[B, ...]` as `tokenize` gives them to the `cond` of `denoise`.

    `params` holds those of the text encoders by name; other entries are left alone.
    """
    return self.text.encode(params, token_ids, self.image_size)

  # The autoencoder computes in float32 whatever it is given, unless `vae_dtype` says otherwise of
  # decoding: lower precision costs visible detail, in the one of XL most.

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
    """Images `[B, H, W, 3]` in [0, 1] to `x_0 = (z - shift) * scaling_factor`, `[B, h, w, C]`.

    `z` is the posterior's mean when `key` is None, else a sample.
    """
    z, log_var = self.vae_moments(params, 2.0 * images - 1.0)
    if key is not None:
      z = z + jnp.exp(0.5 * log_var) * jax.random.normal(key, z.shape, z.dtype)
    return (z - self._shift) * self.vae.config.scaling_factor

  def decode(self, params: Params, latents: Array) -> Array:
    """`x_0` `[B, h, w, C]` to images `[B, H, W, 3]`, clipped to [0, 1]."""
    latents = latents.astype(jnp.float32)
    images = self.vae_decode(params, latents / self.vae.config.scaling_factor + self._shift)
    return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)

  @property
  def _shift(self) -> float:
    return self.vae.config.shift_factor or 0.0

  def param_shapes(self) -> dict[str, Params]:
    """The parameter tree of each component, with shapes in place of arrays."""
    key = streams.key_shape()
    token_ids = jnp.zeros((1, *self.text.ids_shape), jnp.int32)
    x_t = jnp.zeros((1, *self.latent_shape[:2], self.unet.config.in_channels))
    images = jnp.zeros((1, *self.image_size, self.vae.config.in_channels))
    variables = {
      name: jax.eval_shape(module.init, key, token_ids.reshape(-1, token_ids.shape[-1]))
      for name, module in self.text.modules.items()
    }
    text_params = {name: component["params"] for name, component in variables.items()}
    cond = jax.eval_shape(self.encode_text, text_params, token_ids)
    variables["unet"] = jax.eval_shape(self.unet.init, key, x_t, jnp.zeros(1), cond["text"], cond)
    variables["vae"] = jax.eval_shape(self.vae.init, key, images)
    return {name: component["params"] for name, component in variables.items()}


def make(configs: Mapping[str, dict[str, Any]]) -> Networks:
  """From the parsed config.json of each component and the settings of the pipeline."""
  unet_config = unet.UNetConfig.from_dict(configs["unet"])
  vae_config = vae.VAEConfig.from_dict(configs["vae"])
  text = conditioning.make(
    configs["text_encoder"],
    configs.get("text_encoder_2"),
    zero_empty=configs["pipeline"].get("force_zeros_for_empty_prompt", True),
  )
  read, written = unet_config.in_channels, unet_config.out_channels
  if read < written or written != vae_config.latent_channels:
    raise ValueError(
      f"expected unet in_channels >= out_channels == vae latent_channels, found {read}, {written} "
      f"and {vae_config.latent_channels}"
    )
  if unet_config.cross_attention_dim != text.width:
    raise ValueError(
      f"expected unet cross_attention_dim == the text encoders' joint hidden_size, found "
      f"{unet_config.cross_attention_dim} and {text.width}"
    )
  return Networks(
    unet.UNet2DConditionModel(unet_config),
    vae.AutoencoderKL(vae_config),
    text,
    _trained_image_size(unet_config, vae_config),
  )


def _trained_image_size(
  unet_config: unet.UNetConfig, vae_config: vae.VAEConfig
) -> tuple[int, int]:
  """`(H, W)` in pixels, by the latents of the UNet or, where it does not say, the autoencoder's."""
  downscale, size = vae_config.downscale, unet_config.sample_size
  if size is None:
    height, width = _pair(vae_config.sample_size)
    return height // downscale * downscale, width // downscale * downscale
  height, width = _pair(size)
  return height * downscale, width * downscale


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
  entries = size if isinstance(size, tuple) else (size,)
  if len(entries) not in (1, 2) or not all(0 < entry < checks.MOST for entry in entries):
    raise ValueError(
      f"sample_size: expected a size, or height and width, got {checks.shown(size)}"
    )
  return entries[0], entries[-1]
