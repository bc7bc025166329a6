"""CLIP with both towers: how well an image fits a prompt, as a number with a gradient.

Radford et al. 2021 (arXiv:2103.00020). PickScore (arXiv:2305.01569) is this model with other
weights. On disk it is the folder that transformers' `CLIPModel` and `CLIPTokenizer` read and write.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import files, streams
from jaxalign.models import tokenization
from jaxalign.models.families import initialization
from jaxalign.models.networks import clip, clip_vision, layers
from jaxalign.models.weights import safetensors_io
from jaxalign.types import Array, Key, Params


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
  """What a CLIP model's config.json says about the network."""

  text: clip.CLIPTextConfig
  vision: clip_vision.CLIPVisionConfig
  projection_dim: int = 512
  logit_scale_init_value: float = 2.6592

  @classmethod
  def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
    """Reads the parsed config.json; other entries are left alone."""
    missing = [name for name in ("text_config", "vision_config") if not config.get(name)]
    if missing:
      raise ValueError(
        f"expected the config.json of a CLIPModel, found no {' or '.join(missing)} in that of "
        f"{config.get('architectures', 'an unnamed class')}"
      )
    names = ("projection_dim", "logit_scale_init_value")
    return cls(
      clip.CLIPTextConfig.from_dict(config["text_config"]),
      clip_vision.CLIPVisionConfig.from_dict(config["vision_config"]),
      **{name: config[name] for name in names if name in config},
    )


class CLIPModel(nn.Module):
  """Both towers, and the projections into the space where they are compared."""

  config: CLIPConfig

  def setup(self):
    dim = self.config.projection_dim
    self.text_model = clip.TextTransformer(self.config.text)
    self.vision_model = clip_vision.VisionTransformer(self.config.vision)
    self.text_projection = layers.Dense(dim, use_bias=False)
    self.visual_projection = layers.Dense(dim, use_bias=False)
    init = nn.initializers.constant(self.config.logit_scale_init_value)
    self.logit_scale = layers.parameter(self, "logit_scale", init, ())

  def image_features(self, images: Array) -> Array:
    """Images `[B, H, W, 3]` in [0, 1] to unit vectors `[B, E]`."""
    inputs = clip_vision.preprocess(images, self.config.vision.image_size)
    return _unit(self.visual_projection(self.vision_model(inputs)))

  def text_features(self, token_ids: Array) -> Array:
    """Token ids `[B, N]` to unit vectors `[B, E]`."""
    return _unit(self.text_projection(self.text_model(token_ids).pooled))

  def __call__(self, images: Array, token_ids: Array) -> Array:
    """`exp(logit_scale) * cosine` of each image and its prompt, `[B]`."""
    cosine = jnp.sum(self.image_features(images) * self.text_features(token_ids), axis=-1)
    return jnp.exp(self.logit_scale) * cosine


def _unit(x: Array) -> Array:
  return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class CLIP:
  """The network, its parameters, and everything else that a model's folder holds.

  `image_features`, `text_features` and `score` are pure and see no `params` unless given.

  Attributes:
    network: holds no arrays.
    params: numpy arrays in host memory after `load`, {} after `build`.
    config: the parsed config.json, as found.
    tokenizer_folder: holds vocab.json and merges.txt.
  """

  network: CLIPModel
  params: Params
  config: dict[str, Any]
  tokenizer_folder: pathlib.Path

  # The ignores: flax types `apply` as perhaps a pair, which it is only with `mutable`.

  def image_features(self, params: Params, images: Array) -> Array:
    """Images `[B, H, W, 3]` in [0, 1] to unit vectors `[B, E]`."""
    return self.network.apply({"params": params}, images, method="image_features")  # type: ignore[return-value]

  def text_features(self, params: Params, token_ids: Array) -> Array:
    """Token ids `[B, N]` to unit vectors `[B, E]`."""
    return self.network.apply({"params": params}, token_ids, method="text_features")  # type: ignore[return-value]

  def score(self, params: Params, images: Array, token_ids: Array) -> Array:
    """`exp(logit_scale) * cosine` of each image and its prompt, `[B]`; the PickScore.

    Args:
      params: as the attribute.
      images: `[B, H, W, 3]` in [0, 1], of any size; gradients flow to them.
      token_ids: `[B, N]`, from `tokenize`.
    """
    return self.network.apply({"params": params}, images, token_ids)  # type: ignore[return-value]

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts to int32 `[B, N]`, padded; see `tokenization.tokenize`."""
    text = self.network.config.text
    return tokenization.tokenize(
      self.tokenizer_folder,
      prompts,
      text.max_position_embeddings,
      num_embeddings=text.vocab_size,
    )

  def param_shapes(self) -> Params:
    """The parameter tree with shapes in place of arrays."""
    size = self.network.config.vision.image_size
    images, token_ids = jnp.zeros((1, size, size, 3)), jnp.zeros((1, 1), jnp.int32)
    key = streams.key_shape()
    return jax.eval_shape(self.network.init, key, images, token_ids)["params"]

  def init_params(self, key: Key) -> Params:
    """Random parameters, as numpy arrays in host memory."""
    scale = self.network.config.logit_scale_init_value
    return initialization.random_params(key, self.param_shapes(), logit_scale=scale)

  def with_params(self, params: Params) -> "CLIP":
    """This model with other parameters."""
    return dataclasses.replace(self, params=params)


def build(config: dict[str, Any], *, tokenizer_folder: str | os.PathLike) -> CLIP:
  """Builds the model, without parameters, from its parsed config.json."""
  tokenization.check_folder(tokenizer_folder)
  network = CLIPModel(CLIPConfig.from_dict(config))
  return CLIP(network, {}, config, pathlib.Path(tokenizer_folder))


def load(folder: str | os.PathLike, *, shapes_only: bool = False) -> CLIP:
  """Reads the folder of a CLIPModel and its tokenizer; ValueError says what is not as expected.

  With `shapes_only` parameters are shapes, by the config, and the folder needs no weights.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.is_dir():
    raise ValueError(
      f"expected the folder of a CLIPModel, found no folder {folder}\n"
      f"A model of the hub is downloaded once with: hf download OWNER/NAME --local-dir FOLDER"
    )
  model = build(files.read_json(folder / "config.json"), tokenizer_folder=folder)
  shapes = model.param_shapes()
  return model.with_params(
    shapes if shapes_only else safetensors_io.read_component(folder, shapes)
  )


def save(model: CLIP, folder: str | os.PathLike) -> None:
  """Writes the folder that `load` and transformers read; config and tokenizer as found."""
  if not model.params:
    raise ValueError("expected a CLIP model with params, found none; see CLIP.with_params")
  safetensors_io.write_component(folder, model.params, model.config, safetensors_io.TEXT_WEIGHTS)
  tokenization.copy(model.tokenizer_folder, folder)
