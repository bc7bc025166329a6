"""Stable Diffusion 3 and 3.5: a rectified flow by an MMDiT, told prompts by two CLIPs and a T5.

Esser et al. 2024, arXiv:2403.03206. On disk it is the folder that diffusers'
StableDiffusion3Pipeline reads and writes.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax

from jaxalign.models.families import flow
from jaxalign.models.identity import classes, fields
from jaxalign.models.identity.parts import TOKENIZER, Kind, Part
from jaxalign.models.networks import clip, sd3_conditioning, sd3_transformer, t5, vae
from jaxalign.types import Array

_CLIP = ("CLIPTextModelWithProjection", "CLIPTextModel")
_CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
_CLIP_FIELDS = fields.of(clip.CLIPTextConfig, complete=False)
KIND = Kind(
  "a Stable Diffusion 3",
  classes.FLOWS["sd3"],
  {
    "transformer": Part(("SD3Transformer2DModel",), fields.of(sd3_transformer.SD3Config)),
    "vae": Part(("AutoencoderKL",), fields.VAE),
    "text_encoder": Part(_CLIP, _CLIP_FIELDS, "transformers"),
    "text_encoder_2": Part(_CLIP, _CLIP_FIELDS, "transformers"),
    "text_encoder_3": Part(
      ("T5EncoderModel",), fields.of(t5.T5Config, complete=False), "transformers", optional=True
    ),
    "tokenizer": Part(_CLIP_TOKENIZER, TOKENIZER, "transformers"),
    "tokenizer_2": Part(_CLIP_TOKENIZER, TOKENIZER, "transformers"),
    "tokenizer_3": Part(
      ("T5TokenizerFast", "T5Tokenizer"), TOKENIZER, "transformers", optional=True
    ),
    "scheduler": flow.SCHEDULER,
  },
  ("feature_extractor", "image_encoder"),
)


class Networks(flow.Networks):
  """Of Stable Diffusion 3."""

  @property
  def patch(self) -> int:  # type: ignore[override]
    return self.transformer.config.patch_size

  @property
  def most_tokens(self) -> tuple[int, int]:  # type: ignore[override]
    most = self.transformer.config.pos_embed_max_size
    return most, most

  def arguments(self, x_t: Array, t: Array, cond: flow.Cond) -> tuple[Any, ...]:
    return x_t, t, cond["text"], cond["pooled"]

  def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    config = self.transformer.config
    text, pooled = (1, 1, config.joint_attention_dim), (1, config.pooled_projection_dim)
    return flow.float_shapes(text=text, pooled=pooled)


def make(configs: Mapping[str, Mapping[str, Any]], text_length: int) -> Networks:
  """From the parsed config.json of each component.

  Raises ValueError where two of them do not fit each other.
  """
  config = sd3_transformer.SD3Config.from_dict(configs["transformer"])
  vae_config = vae.VAEConfig.from_dict(configs["vae"])
  text = sd3_conditioning.make(configs, config.joint_attention_dim, text_length)
  channels = (config.in_channels, config.out_channels, vae_config.latent_channels)
  if len(set(channels)) > 1:
    raise ValueError(
      f"expected transformer in_channels == out_channels == vae latent_channels, found "
      f"{channels[0]}, {channels[1]} and {channels[2]}"
    )
  pooled = text.text_encoder.config.projection_dim + text.text_encoder_2.config.projection_dim
  if pooled != config.pooled_projection_dim:
    raise ValueError(
      f"expected transformer pooled_projection_dim == projection_dim of both CLIPs together, found "
      f"{config.pooled_projection_dim} and {pooled}"
    )
  side = config.sample_size * vae_config.downscale
  return Networks(
    transformer=sd3_transformer.SD3Transformer2DModel(config),
    vae=vae.AutoencoderKL(vae_config),
    text=text,
    image_size=(side, side),
    grid={},
    **flow.guided(7.0),
  )


FAMILY = flow.Family(KIND, make, 256)
open_model = functools.partial(flow.open_model, FAMILY)
