"""FLUX.2 (dev, klein): a rectified flow that is told prompts by a language model.

On disk it is the folder that diffusers' Flux2Pipeline or Flux2KleinPipeline reads and writes. The
language model is a Mistral, of dev, or a Qwen3, of klein; three of its hidden states are read.
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
from jaxalign.models.networks import (
  flux2_transformer,
  language_model,
  packing,
  vae_flux2,
)
from jaxalign.types import Array, Params

_ORDER = "c_dy_dx"  # of a packed pixel's channels
_SAMPLE_SIZE = 128  # latent pixels along each side, where the pipeline is told nothing
_DEPTHS = {"mistral": (10, 20, 30), "qwen3": (9, 18, 27)}  # of the hidden states that are read
# What the Mistral is told before each prompt: a constant of the model, like a weight.
_SYSTEM_MESSAGE = (
  "You are an AI that reasons about image descriptions. You give structured responses focusing on "
  "object relationships, object\nattribution and actions without speculation."
)

KIND = Kind(
  "a FLUX.2",
  classes.FLOWS["flux2"],
  {
    "transformer": Part(("Flux2Transformer2DModel",), fields.of(flux2_transformer.Flux2Config)),
    "vae": Part(
      ("AutoencoderKLFlux2",),
      fields.of(
        vae_flux2.Flux2VAEConfig,
        {"sample_size": (1024,), "force_upcast": (True,), "batch_norm_momentum": (0.1,)},
      ),
      copied=True,
    ),
    **flow.told_by("Qwen3ForCausalLM", "Mistral3ForConditionalGeneration"),
  },
)


class Texts(language_model.LanguageModel):
  """The language model; padding is attended to by the transformer, not within the model."""

  padding_side = None

  def texts(self, folder: str | os.PathLike, prompts: Sequence[str]) -> list[str]:
    """Klein's prompts are a user's message, with an empty thought behind; dev's follow a message
    that is always the same.
    """
    if self.network.config.qk_norm:  # a Qwen3
      messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
      options = {"add_generation_prompt": True, "enable_thinking": False}
      return tokenization.rendered(folder, messages, **options)
    # A mark of an image in the text would make the tokenizer expect one.
    texts = [prompt.replace("[IMG]", "") for prompt in prompts]
    messages = [[_message("system", _SYSTEM_MESSAGE), _message("user", text)] for text in texts]
    return tokenization.rendered(folder, messages, add_generation_prompt=False)

  def encode(self, params: Mapping[str, Params], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """`text [B, N, 3 D]`: the hidden states of each token side by side, padding included."""
    return {"text": jnp.concatenate(self.states(params, tokens), axis=-1)}


def _message(role: str, text: str) -> dict[str, Any]:
  return {"role": role, "content": [{"type": "text", "text": text}]}


class Networks(flow.Networks):
  """Of FLUX.2; `cond` may hold the `guidance` that the transformer is told."""

  encodes_mean = True

  def arguments(self, x_t: Array, t: Array, cond: flow.Cond) -> tuple[Any, ...]:
    return packing.pack(x_t, _ORDER), t, cond["text"], cond.get("guidance")

  def velocity(self, prediction: Array) -> Array:
    return packing.unpack(prediction, _ORDER)

  def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    config = self.transformer.config
    guidance = {"guidance": (1,)} if config.guidance_embeds else {}
    return flow.float_shapes(text=(1, 1, config.joint_attention_dim), **guidance)


def empirical_mu(image_seq_len: int, num_steps: int) -> float:
  """The shift exponent mu of FLUX.2, by packed tokens of an image and steps.

  Two lines in the tokens that were fitted at 10 and at 200 steps, and a line in the steps through
  both; of large images the second one alone.
  """
  at_200 = 0.00016927 * image_seq_len + 0.45666666
  if image_seq_len > 4300:
    return at_200
  at_10 = 8.73809524e-05 * image_seq_len + 1.89833333
  slope = (at_200 - at_10) / 190.0
  return at_200 + slope * (num_steps - 200.0)


def make(configs: Mapping[str, Mapping[str, Any]], text_length: int) -> Networks:
  """From the parsed config.json of each component.

  Raises ValueError where two of them do not fit each other.
  """
  config = flux2_transformer.Flux2Config.from_dict(configs["transformer"])
  vae_config = vae_flux2.Flux2VAEConfig.from_dict(configs["vae"])
  flow.check_equal(
    ("transformer in_channels", config.in_channels),
    ("4 times vae latent_channels", vae_config.packed_channels),
  )
  flow.check_equal(
    ("transformer out_channels", config.out_channels or config.in_channels),
    ("transformer in_channels", config.in_channels),
  )
  is_mistral = configs["text_encoder"].get("model_type") == "mistral"
  depths = _DEPTHS["mistral" if is_mistral else "qwen3"]
  network = language_model.make_network(
    configs["text_encoder"], depths, config.joint_attention_dim
  )
  side = _SAMPLE_SIZE * vae_config.downscale
  embedded, steps = config.guidance_embeds, configs["pipeline"].get("is_distilled")
  return Networks(
    transformer=flux2_transformer.Flux2Transformer2DModel(config),
    vae=vae_flux2.AutoencoderKLFlux2(vae_config),
    text=Texts(network, text_length),
    image_size=(side, side),
    grid={"even": True, "mu": empirical_mu},
    **(flow.distilled(embedded, 4.0) if embedded or steps else flow.guided(4.0)),
  )


FAMILY = flow.Family(KIND, make, 512)
open_model = functools.partial(flow.open_model, FAMILY)
