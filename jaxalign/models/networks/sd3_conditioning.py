"""What the transformer of Stable Diffusion 3 is told of prompts, by two CLIPs and perhaps a T5.

Esser et al. 2024, arXiv:2403.03206, section 4 and figure 2.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxalign.models import tokenization
from jaxalign.models.networks import clip, t5
from jaxalign.types import Array, Params


@dataclasses.dataclass(frozen=True)
class SD3TextEncoders:
  """Two CLIP text encoders with projections, and a T5 where the model has one.

  t5_length: tokens that the T5 reads; as many zeros stand for it where there is none.
  width: D of `cond["text"]`.
  """

  text_encoder: clip.CLIPTextModelWithProjection
  text_encoder_2: clip.CLIPTextModelWithProjection
  text_encoder_3: t5.T5EncoderModel | None
  t5_length: int
  width: int

  @property
  def modules(self) -> dict[str, nn.Module]:
    """The networks by the name of their component."""
    found: dict[str, nn.Module] = {
      "text_encoder": self.text_encoder,
      "text_encoder_2": self.text_encoder_2,
    }
    return found if self.text_encoder_3 is None else found | {"text_encoder_3": self.text_encoder_3}

  def tokens(self, folder: str | os.PathLike, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """The token ids of prompts by each tokenizer of a model's folder, as `encode` takes them."""
    folder = pathlib.Path(folder)
    clips = [self.text_encoder.config, self.text_encoder_2.config]
    of_clip = [
      tokenization.tokenize(
        folder / name, prompts, config.max_position_embeddings, num_embeddings=config.vocab_size
      )
      for name, config in zip(("tokenizer", "tokenizer_2"), clips, strict=True)
    ]
    found = {"clip": np.stack(of_clip, axis=1)}
    if self.text_encoder_3 is not None:
      found["t5"] = tokenization.tokenize(
        folder / "tokenizer_3",
        prompts,
        self.t5_length,
        num_embeddings=self.text_encoder_3.config.vocab_size,
        kind="T5",
      )
    return found

  def encode(self, params: Mapping[str, Params], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens to what the transformer is told.

    Args:
      params: by component; other entries are left alone.
      tokens: `{"clip": [B, 2, N]}`, a row for each CLIP, and `"t5": [B, t5_length]` with a T5.

    Returns:
      `text [B, N + t5_length, D]`: the penultimate hidden states of both CLIPs side by side, with
      zeros up to D, then those of the T5, whose padding counts as text; and `pooled [B, P]`, the
      projections of both CLIPs side by side.
    """
    first, second = (
      _apply(module, params[name], tokens["clip"][:, row])
      for row, (name, module) in enumerate(list(self.modules.items())[:2])
    )
    of_clip = jnp.concatenate([first.penultimate, second.penultimate], axis=-1)
    of_clip = jnp.pad(of_clip, ((0, 0), (0, 0), (0, self.width - of_clip.shape[-1])))
    if self.text_encoder_3 is None:
      of_t5 = jnp.zeros((len(of_clip), self.t5_length, self.width), of_clip.dtype)
    else:
      of_t5 = _apply(self.text_encoder_3, params["text_encoder_3"], tokens["t5"])
    return {
      "text": jnp.concatenate([of_clip, of_t5], axis=1),
      "pooled": jnp.concatenate([first.pooled, second.pooled], axis=-1),
    }


def _apply(module: nn.Module, params: Params, token_ids: Array) -> Any:
  return module.apply({"params": params}, token_ids)


def make(configs: Mapping[str, Mapping[str, Any]], width: int, t5_length: int) -> SD3TextEncoders:
  """From the parsed config.json of each text encoder, by component.

  Raises ValueError where the hidden states of the encoders are wider than the transformer reads, or
  the T5's not as wide.
  """
  clips = [
    clip.CLIPTextModelWithProjection(clip.CLIPTextConfig.from_dict(configs[name]))
    for name in ("text_encoder", "text_encoder_2")
  ]
  joint = sum(model.config.hidden_size for model in clips)
  if joint > width:
    raise ValueError(
      f"expected joint_attention_dim of the transformer >= hidden_size of both CLIPs together, "
      f"found {width} and {joint}"
    )
  lengths = [model.config.max_position_embeddings for model in clips]
  if lengths[0] != lengths[1]:
    raise ValueError(
      f"expected max_position_embeddings of text_encoder == text_encoder_2, found {lengths[0]} "
      f"and {lengths[1]}"
    )
  third = None
  if "text_encoder_3" in configs:
    third = t5.T5EncoderModel(t5.T5Config.from_dict(configs["text_encoder_3"]))
    if third.config.d_model != width:
      raise ValueError(
        f"expected joint_attention_dim of the transformer == d_model of text_encoder_3, found "
        f"{width} and {third.config.d_model}"
      )
  return SD3TextEncoders(*clips, third, t5_length, width)
