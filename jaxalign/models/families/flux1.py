"""FLUX.1 (dev, schnell): a rectified flow whose guidance is distilled, told prompts by CLIP and T5.

Labs et al. 2025, arXiv:2506.15742. On disk it is the folder that diffusers' FluxPipeline reads and
writes.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxalign.models import tokenization
from jaxalign.models.families import flow
from jaxalign.models.identity import classes, fields
from jaxalign.models.identity.parts import TOKENIZER, Kind, Part
from jaxalign.models.networks import clip, flux1_transformer, packing, t5, vae
from jaxalign.types import Array, Params

_ORDER = "c_dy_dx"  # of a packed pixel's channels
_SAMPLE_SIZE = 128  # latent pixels along each side, where the pipeline is told nothing

KIND = Kind(
  "a FLUX.1",
  classes.FLOWS["flux1"],
  {
    "transformer": Part(("FluxTransformer2DModel",), fields.of(flux1_transformer.FluxConfig)),
    "vae": Part(("AutoencoderKL",), fields.VAE),
    "text_encoder": Part(("CLIPTextModel",), fields.CLIP, "transformers"),
    "text_encoder_2": Part(
      ("T5EncoderModel",), fields.of(t5.T5Config, complete=False), "transformers"
    ),
    "tokenizer": Part(("CLIPTokenizer", "CLIPTokenizerFast"), TOKENIZER, "transformers"),
    "tokenizer_2": Part(("T5TokenizerFast", "T5Tokenizer"), TOKENIZER, "transformers"),
    "scheduler": flow.SCHEDULER,
  },
  ("feature_extractor", "image_encoder"),
)


@dataclasses.dataclass(frozen=True)
class Texts:
  """A CLIP, of which only the summary of a prompt is read, and a T5 of `length` tokens."""

  text_encoder: clip.CLIPTextModel
  text_encoder_2: t5.T5EncoderModel
  length: int

  @property
  def modules(self) -> dict[str, nn.Module]:
    """The networks by the name of their component."""
    return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

  def tokens(self, folder: str | os.PathLike, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """`{"clip": [B, N], "t5": [B, length]}`."""
    folder = pathlib.Path(folder)
    first, second = self.text_encoder.config, self.text_encoder_2.config
    length = first.max_position_embeddings
    return {
      "clip": tokenization.tokenize(
        folder / "tokenizer", prompts, length, num_embeddings=first.vocab_size
      ),
      "t5": tokenization.tokenize(
        folder / "tokenizer_2",
        prompts,
        self.length,
        num_embeddings=second.vocab_size,
        kind="T5",
      ),
    }

  def encode(self, params: Mapping[str, Params], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """`text [B, length, D]` of the T5, padding included, and `pooled [B, P]` of the CLIP."""
    of_clip: Any = self.text_encoder.apply({"params": params["text_encoder"]}, tokens["clip"])
    of_t5: Any = self.text_encoder_2.apply({"params": params["text_encoder_2"]}, tokens["t5"])
    return {"text": of_t5, "pooled": of_clip.pooled}


class Networks(flow.Networks):
  """Of FLUX.1; `cond` may hold the `guidance` that the transformer is told."""

  def arguments(self, x_t: Array, t: Array, cond: flow.Cond) -> tuple[Any, ...]:
    packed = packing.pack(x_t, _ORDER)
    return packed, t, cond["text"], cond["pooled"], cond.get("guidance")

  def velocity(self, prediction: Array) -> Array:
    return packing.unpack(prediction, _ORDER)

  def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    config = self.transformer.config
    text, pooled = (1, 1, config.joint_attention_dim), (1, config.pooled_projection_dim)
    guidance = {"guidance": (1,)} if config.guidance_embeds else {}
    return flow.float_shapes(text=text, pooled=pooled, **guidance)


def make(configs: Mapping[str, Mapping[str, Any]], text_length: int) -> Networks:
  """From the parsed config.json of each component.

  Raises ValueError where two of them do not fit each other.
  """
  config = flux1_transformer.FluxConfig.from_dict(configs["transformer"])
  vae_config = vae.VAEConfig.from_dict(configs["vae"])
  first = clip.CLIPTextConfig.from_dict(configs["text_encoder"])
  second = t5.T5Config.from_dict(configs["text_encoder_2"])
  flow.check_equal(
    ("transformer in_channels", config.in_channels),
    ("4 times vae latent_channels", 4 * vae_config.latent_channels),
  )
  flow.check_equal(
    ("transformer out_channels", config.out_channels or config.in_channels),
    ("transformer in_channels", config.in_channels),
  )
  flow.check_equal(
    ("transformer pooled_projection_dim", config.pooled_projection_dim),
    ("hidden_size of text_encoder", first.hidden_size),
  )
  flow.check_equal(
    ("transformer joint_attention_dim", config.joint_attention_dim),
    ("d_model of text_encoder_2", second.d_model),
  )
  side = _SAMPLE_SIZE * vae_config.downscale
  return Networks(
    transformer=flux1_transformer.FluxTransformer2DModel(config),
    vae=vae.AutoencoderKL(vae_config),
    text=Texts(clip.CLIPTextModel(first), t5.T5EncoderModel(second), text_length),
    image_size=(side, side),
    grid={"even": True},
    **flow.distilled(config.guidance_embeds, 3.5),
  )


FAMILY = flow.Family(KIND, make, 512)
open_model = functools.partial(flow.open_model, FAMILY)
