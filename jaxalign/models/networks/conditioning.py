"""What a UNet is told of prompts: their token ids, through one text encoder or two, to its `cond`.

Token ids are one array whatever the number of tokenizers, `[B, N]` or `[B, 2, N]`, and `cond` is a
dict of arrays whose first axis is the batch, so nobody else has to know how many there are.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxalign.models.networks import clip
from jaxalign.types import Array, Params, expand_to


@dataclasses.dataclass(frozen=True)
class OneTextEncoder:
  """Stable Diffusion 1.x and 2.x: the hidden states of one encoder (arXiv:2112.10752)."""

  text_encoder: clip.CLIPTextModel

  @property
  def modules(self) -> dict[str, nn.Module]:
    """The networks by the name of their component."""
    return {"text_encoder": self.text_encoder}

  @property
  def width(self) -> int:
    """D of `cond["text"]`, `[B, N, D]`."""
    return self.text_encoder.config.hidden_size

  @property
  def ids_shape(self) -> tuple[int, ...]:
    """The shape of a prompt's token ids."""
    return (self.text_encoder.config.max_position_embeddings,)

  def encode(self, params: Mapping[str, Params], token_ids: Array, image_size: tuple) -> dict:
    """Token ids `[B, N]` to `{"text": [B, N, D]}`; the size of the images plays no part."""
    del image_size
    return {"text": _apply(self.text_encoder, params["text_encoder"], token_ids).hidden}


@dataclasses.dataclass(frozen=True)
class TwoTextEncoders:
  """Stable Diffusion XL (Podell et al. 2023, arXiv:2307.01952, sections 2.1 and 2.2).

  zero_empty: the empty prompt is all zeros, as it was where captions were dropped in training.
  """

  text_encoder: clip.CLIPTextModel
  text_encoder_2: clip.CLIPTextModelWithProjection
  zero_empty: bool

  def __post_init__(self):
    lengths = [model.config.max_position_embeddings for model in self.modules.values()]
    if lengths[0] != lengths[1]:
      raise ValueError(
        f"expected max_position_embeddings of text_encoder == text_encoder_2, found {lengths[0]} "
        f"and {lengths[1]}"
      )

  @property
  def modules(self) -> dict[str, Any]:
    """The networks by the name of their component."""
    return {"text_encoder": self.text_encoder, "text_encoder_2": self.text_encoder_2}

  @property
  def width(self) -> int:
    """D of `cond["text"]`, `[B, N, D]`: that of both encoders together."""
    return sum(model.config.hidden_size for model in self.modules.values())

  @property
  def ids_shape(self) -> tuple[int, ...]:
    """The shape of a prompt's token ids."""
    return (2, self.text_encoder.config.max_position_embeddings)

  def encode(self, params: Mapping[str, Params], token_ids: Array, image_size: tuple) -> dict:
    """Token ids `[B, 2, N]`, one row for each encoder, to what the UNet of XL is told.

    Args:
      params: `{"text_encoder": ..., "text_encoder_2": ...}`; other entries are left alone.
      token_ids: from both tokenizers.
      image_size: `(H, W)` in pixels; the images are described as whole and of this size.

    Returns:
      `text [B, N, D]`, the penultimate hidden states of both encoders side by side; `text_embeds
      [B, P]`, the pooled and projected output of the second; `time_ids [B, 6]`, original height
      and width, crop top and left, target height and width.
    """
    first = _apply(self.text_encoder, params["text_encoder"], token_ids[:, 0])
    second = _apply(self.text_encoder_2, params["text_encoder_2"], token_ids[:, 1])
    text = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
    cond = {"text": text, "text_embeds": second.pooled}
    if self.zero_empty:
      # In the empty prompt the end follows the start.
      end = clip.end_positions(token_ids[:, 0], self.text_encoder.config.eos_token_id)
      cond = {name: jnp.where(expand_to(end != 1, x), x, 0.0) for name, x in cond.items()}
    sizes = jnp.array([*image_size, 0, 0, *image_size], jnp.float32)
    return {**cond, "time_ids": jnp.broadcast_to(sizes, (token_ids.shape[0], 6))}


def _apply(module: nn.Module, params: Params, token_ids: Array) -> clip.EncodedText:
  return module.apply({"params": params}, token_ids)  # type: ignore[return-value]


def make(
  text_encoder: Mapping[str, Any], text_encoder_2: Mapping[str, Any] | None, *, zero_empty: bool
) -> OneTextEncoder | TwoTextEncoders:
  """From the parsed config.json of each text encoder; `zero_empty` concerns two of them only."""
  first = clip.CLIPTextModel(clip.CLIPTextConfig.from_dict(text_encoder))
  if text_encoder_2 is None:
    return OneTextEncoder(first)
  second = clip.CLIPTextModelWithProjection(clip.CLIPTextConfig.from_dict(text_encoder_2))
  return TwoTextEncoders(first, second, zero_empty)
