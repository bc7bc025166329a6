"""The networks of Stable Diffusion 1.x, 2.x and XL as pure functions of explicit parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign import streams
from jaxalign.models.families import autoencoding
from jaxalign.models.networks import conditioning, unet, vae
from jaxalign.types import Array, Params, at_least_float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks(autoencoding.Autoencoding):
  """The networks as pure functions. Holds no arrays, so a jitted closure captures none.

  dtype: what the UNet computes in, by name, whatever its parameters are; None is that of `x_t`.
  """

  unet: unet.UNet2DConditionModel
  text: conditioning.OneTextEncoder | conditioning.TwoTextEncoders
  dtype: str | None = None

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
    unet=unet.UNet2DConditionModel(unet_config),
    vae=vae.AutoencoderKL(vae_config),
    text=text,
    image_size=_trained_image_size(unet_config, vae_config),
  )


def _trained_image_size(
  unet_config: unet.UNetConfig, vae_config: vae.VAEConfig
) -> tuple[int, int]:
  """`(H, W)` in pixels, by the latents of the UNet or, where it does not say, the autoencoder's."""
  downscale, size = vae_config.downscale, unet_config.sample_size
  if size is None:
    height, width = autoencoding.image_size("sample_size", vae_config.sample_size)
    return height // downscale * downscale, width // downscale * downscale
  height, width = autoencoding.image_size("sample_size", size)
  return height * downscale, width * downscale
