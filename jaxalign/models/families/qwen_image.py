"""Qwen-Image (and 2512): a rectified flow by an MMDiT, told prompts by a Qwen2.5-VL.

Qwen Team 2025, arXiv:2508.02324. On disk it is the folder that diffusers' QwenImagePipeline reads
and writes.
"""

import functools
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.models.families import flow
from jaxalign.models.identity import classes, fields
from jaxalign.models.identity.parts import Kind, Part
from jaxalign.models.networks import (
  language_model,
  packing,
  qwen_image_transformer,
  vae_qwen,
)
from jaxalign.models.weights import lazy
from jaxalign.types import Array, Params

_ORDER = "c_dy_dx"  # of a packed pixel's channels
_SAMPLE_SIZE = 128  # latent pixels along each side, where the pipeline is told nothing
# What the language model reads, a constant of the model, like a weight; and how many of its tokens
# come before the prompt, which the transformer is not told.
_TEMPLATE = (
  "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, "
  "text, spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
  "{}<|im_end|>\n<|im_start|>assistant\n"
)
_DROPPED = 34


def _own_vae(
  tensors: Mapping[str, lazy.LazyArray], expected: Collection[str], config: Mapping[str, Any]
) -> dict[str, lazy.LazyArray]:
  """What one frame needs of a file's tensors, see `vae_qwen.from_file`."""
  del expected, config
  found = {}
  for name, array in tensors.items():
    shape = vae_qwen.shape_from_file(name, array.shape)
    if shape is not None:
      found[name] = lazy.LazyArray(shape, functools.partial(_read, name, array), array.name)
  return found


def _read(name: str, array: lazy.LazyArray, index: lazy.Index) -> np.ndarray:
  found = vae_qwen.from_file(name, array)
  assert found is not None  # it has a shape
  return found[index]


KIND = Kind(
  "a Qwen-Image",
  classes.FLOWS["qwen_image"],
  {
    "transformer": Part(
      ("QwenImageTransformer2DModel",),
      fields.of(qwen_image_transformer.QwenImageConfig, qwen_image_transformer.FIXED),
    ),
    "vae": Part(
      ("AutoencoderKLQwenImage",),
      fields.of(vae_qwen.QwenVAEConfig, vae_qwen.FIXED),
      own=_own_vae,
      copied=True,
    ),
    **flow.told_by("Qwen2_5_VLForConditionalGeneration"),
  },
)


class Texts(language_model.LanguageModel):
  """The language model of the Qwen2.5-VL, whose last hidden state is read; padding is masked."""

  def texts(self, folder: str | os.PathLike, prompts: Sequence[str]) -> list[str]:
    """Each prompt in the pipeline's own template."""
    del folder
    return [_TEMPLATE.format(prompt) for prompt in prompts]

  def encode(self, params: Mapping[str, Params], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """`text [B, N, D]` from the prompt on, 0 where there is padding, and its `mask [B, N]`."""
    (text,) = self.states(params, tokens)
    mask = jnp.asarray(tokens["mask"], bool)[:, _DROPPED:]
    return {"text": jnp.where(mask[..., None], text[:, _DROPPED:], 0.0), "mask": mask}


class Networks(flow.Networks):
  """Of Qwen-Image."""

  empty_prompt = " "  # its makers' own
  encodes_mean = True

  def arguments(self, x_t: Array, t: Array, cond: flow.Cond) -> tuple[Any, ...]:
    return packing.pack(x_t, _ORDER), t, cond["text"], cond["mask"]

  def velocity(self, prediction: Array) -> Array:
    return packing.unpack(prediction, _ORDER)

  def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    text = flow.float_shapes(text=(1, 1, self.transformer.config.joint_attention_dim))
    return {**text, "mask": jax.ShapeDtypeStruct((1, 1), jnp.bool_)}


def make(configs: Mapping[str, Mapping[str, Any]], text_length: int) -> Networks:
  """From the parsed config.json of each component.

  Raises ValueError where two of them do not fit each other.
  """
  config = qwen_image_transformer.QwenImageConfig.from_dict(configs["transformer"])
  vae_config = vae_qwen.QwenVAEConfig.from_dict(configs["vae"])
  flow.check_equal(
    ("transformer in_channels", config.in_channels),
    ("4 times vae z_dim", 4 * vae_config.z_dim),
  )
  flow.check_equal(
    ("transformer patch_size ** 2 * out_channels", config.patch_size**2 * config.out_channels),
    ("transformer in_channels", config.in_channels),
  )
  network = language_model.make_network(
    configs["text_encoder"], (-1,), config.joint_attention_dim
  )
  side = _SAMPLE_SIZE * vae_config.downscale
  return Networks(
    transformer=qwen_image_transformer.QwenImageTransformer2DModel(config),
    vae=vae_qwen.AutoencoderKLQwenImage(vae_config),
    text=Texts(network, text_length + _DROPPED),
    image_size=(side, side),
    grid={"even": True},
    **flow.guided(4.0, "norm_keeping"),
  )


FAMILY = flow.Family(KIND, make, 512)
open_model = functools.partial(flow.open_model, FAMILY)
