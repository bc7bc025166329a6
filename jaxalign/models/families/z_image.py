"""Z-Image (base, Turbo): a rectified flow of one stream, told prompts by a Qwen3.

Z-Image Team 2025, arXiv:2511.22699. On disk it is the folder that diffusers' ZImagePipeline reads
and writes.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.models import tokenization
from jaxalign.models.families import flow
from jaxalign.models.identity import classes, fields
from jaxalign.models.identity.parts import Kind, Part
from jaxalign.models.networks import language_model, vae, z_image_transformer
from jaxalign.types import Array, Params

_IMAGE_SIZE = (1024, 1024)  # where the pipeline is told nothing
_MULTIPLE = z_image_transformer.MULTIPLE

KIND = Kind(
  "a Z-Image",
  classes.FLOWS["z_image"],
  {
    "transformer": Part(
      ("ZImageTransformer2DModel",),
      fields.of(z_image_transformer.ZImageConfig, z_image_transformer.FIXED),
    ),
    "vae": Part(("AutoencoderKL",), fields.VAE),
    **flow.told_by("Qwen3Model", "Qwen3ForCausalLM"),
  },
)


class Texts(language_model.LanguageModel):
  """The Qwen3, of which the last hidden state but one is read, and no padding."""

  def texts(self, folder: str | os.PathLike, prompts: Sequence[str]) -> list[str]:
    """Each prompt is a user's message, behind which the model may think."""
    messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
    options = {"add_generation_prompt": True, "enable_thinking": True}
    return tokenization.rendered(folder, messages, **options)

  def encode(self, params: Mapping[str, Params], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """`text [B, N, D]`, N a multiple of 32, and `length [B]`, how many tokens are real."""
    (text,) = self.states(params, tokens)
    text = jnp.pad(text, ((0, 0), (0, -text.shape[1] % _MULTIPLE), (0, 0)))
    return {"text": text, "length": jnp.sum(tokens["mask"], axis=1, dtype=jnp.int32)}


class Networks(flow.Networks):
  """Of Z-Image, whose time runs from noise to data."""

  @property
  def most_tokens(self) -> tuple[int, int]:  # type: ignore[override]
    return self.transformer.config.axes_lens[1:]

  def arguments(self, x_t: Array, t: Array, cond: flow.Cond) -> tuple[Any, ...]:
    return x_t, (1000.0 - t) / 1000.0, cond["text"], cond["length"]

  def velocity(self, prediction: Array) -> Array:
    return -prediction

  def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    text = flow.float_shapes(text=(1, _MULTIPLE, self.transformer.config.cap_feat_dim))
    return {**text, "length": jax.ShapeDtypeStruct((1,), jnp.int32)}


def make(configs: Mapping[str, Mapping[str, Any]], text_length: int) -> Networks:
  """From the parsed config.json of each component.

  Raises ValueError where two of them do not fit each other.
  """
  config = z_image_transformer.ZImageConfig.from_dict(configs["transformer"])
  vae_config = vae.VAEConfig.from_dict(configs["vae"])
  flow.check_equal(
    ("transformer in_channels", config.in_channels),
    ("vae latent_channels", vae_config.latent_channels),
  )
  if config.all_patch_size != (2,):  # as the pipeline counts tokens, and rounds sizes
    raise ValueError(f"expected transformer all_patch_size [2], found {config.all_patch_size}")
  most = (config.axes_lens[0] - 2) // _MULTIPLE * _MULTIPLE
  if text_length > most:
    raise ValueError(
      f"text_length: expected at most {most}, for which the transformer has positions (axes_lens), "
      f"got {text_length}"
    )
  network = language_model.make_network(configs["text_encoder"], (-2,), config.cap_feat_dim)
  return Networks(
    transformer=z_image_transformer.ZImageTransformer2DModel(config),
    vae=vae.AutoencoderKL(vae_config),
    text=Texts(network, text_length),
    image_size=_IMAGE_SIZE,
    grid={"even": True},
    **flow.guided(5.0, "classifier_free_w"),
  )


FAMILY = flow.Family(KIND, make, 512)
open_model = functools.partial(flow.open_model, FAMILY)
