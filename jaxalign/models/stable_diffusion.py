"""Stable Diffusion as one bundle: UNet, autoencoder, text encoder, tokenizer, scheduler config.

The networks are pure functions of explicit parameters. On disk a bundle is the folder that
diffusers' `StableDiffusionPipeline` reads and writes.
"""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import files
from jaxalign.models import clip, tokenization, unet, vae
from jaxalign.models.weights import hub, safetensors_io, single_file
from jaxalign.types import Array, Key, Params

_WEIGHTS = {
  "unet": safetensors_io.WEIGHTS,
  "vae": safetensors_io.WEIGHTS,
  "text_encoder": safetensors_io.TEXT_WEIGHTS,
}


@dataclasses.dataclass(frozen=True)
class Networks:
  """The three networks as pure functions. Holds no arrays, so a jitted closure captures none."""

  unet: unet.UNet2DConditionModel
  vae: vae.AutoencoderKL
  text_encoder: clip.CLIPTextModel

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, C)` of the latents that the UNet was trained on."""
    size = self.unet.config.sample_size
    if size is None:
      pixels = self.vae.config.sample_size
      downscale = self.vae.config.downscale
      size = tuple(p // downscale for p in (pixels if isinstance(pixels, tuple) else (pixels,)))
    height, width = size if isinstance(size, tuple) and len(size) == 2 else (_scalar(size),) * 2
    return height, width, self.unet.config.in_channels

  @property
  def image_size(self) -> tuple[int, int]:
    """`(H, W)` in pixels of the images that `latent_shape` decodes to."""
    height, width, _ = self.latent_shape
    downscale = self.vae.config.downscale
    return height * downscale, width * downscale

  # The ignores: flax types `apply` as perhaps a pair, which it is only with `mutable`.

  def denoise(self, variables: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
    """The UNet's prediction, `[B, h, w, C]`.

    Args:
      variables: `{"params": ...}` and, with an adapter, `"lora": ...`.
      x_t: `[B, h, w, C]` noisy latents; t: `[B]` timesteps in [0, 1000).
      cond: `{"text": [B, N, D]}`, from `encode_text`.
    """
    return self.unet.apply(variables, x_t, t, cond["text"])  # type: ignore[return-value]

  def encode_text(self, params: Params, token_ids: Array) -> Array:
    """Token ids `[B, N]` to hidden states `[B, N, D]`."""
    return self.text_encoder.apply({"params": params}, token_ids)[0]

  def vae_moments(self, params: Params, images: Array) -> tuple[Array, Array]:
    """Images `[B, H, W, 3]` in [-1, 1] to the unscaled `(mean, log_var)`, each `[B, h, w, C]`."""
    return self.vae.apply({"params": params}, images, method="encode")  # type: ignore[return-value]

  def vae_decode(self, params: Params, latents: Array) -> Array:
    """Unscaled latents `[B, h, w, C]` to images `[B, H, W, 3]`, about [-1, 1]."""
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
    images = self.vae_decode(params, latents / self.vae.config.scaling_factor + self._shift)
    return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)

  @property
  def _shift(self) -> float:
    return self.vae.config.shift_factor or 0.0

  def param_shapes(self) -> dict[str, Params]:
    """The parameter tree of each component, with shapes in place of arrays."""
    height, width, channels = self.latent_shape
    config = self.text_encoder.config
    token_ids = jnp.zeros((1, config.max_position_embeddings), jnp.int32)
    text = jnp.zeros((1, config.max_position_embeddings, config.hidden_size))
    x_t = jnp.zeros((1, height, width, channels))
    images = jnp.zeros((1, *self.image_size, self.vae.config.in_channels))
    key = jax.random.key(0)
    variables = {
      "unet": jax.eval_shape(self.unet.init, key, x_t, jnp.zeros(1), text),
      "vae": jax.eval_shape(self.vae.init, key, images),
      "text_encoder": jax.eval_shape(self.text_encoder.init, key, token_ids),
    }
    return {name: component["params"] for name, component in variables.items()}


def _scalar(size: int | tuple[int, ...]) -> int:
  return size[0] if isinstance(size, tuple) else size


def _random_leaf(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """The initialisation of `models.layers`: kernels of variance 1 / fan_in, embeddings of 0.02^2."""
  if name == "scale":
    return np.ones(shape, np.float32)
  if name == "bias":
    return np.zeros(shape, np.float32)
  std = 0.02 if name == "embedding" else np.prod(shape[:-1]) ** -0.5
  return np.float32(std) * rng.standard_normal(shape, np.float32)


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
  """Networks, their parameters, and everything else that a model's folder holds.

  The functions of `networks` are attributes here too; they never see `params` unless given.

  Attributes:
    networks: the pure functions.
    params: `{"unet": ..., "vae": ..., "text_encoder": ...}`, or {} before there are any; numpy
      arrays in host memory after `load`, in their files still after `open_model`.
    configs: the parsed config.json of each component and of the scheduler, as found.
    tokenizer_folder: holds vocab.json and merges.txt.
  """

  networks: Networks
  params: dict[str, Params]
  configs: dict[str, dict[str, Any]]
  tokenizer_folder: pathlib.Path

  denoise = property(lambda self: self.networks.denoise)
  encode_text = property(lambda self: self.networks.encode_text)
  vae_moments = property(lambda self: self.networks.vae_moments)
  vae_decode = property(lambda self: self.networks.vae_decode)
  encode_images = property(lambda self: self.networks.encode_images)
  decode = property(lambda self: self.networks.decode)
  latent_shape = property(lambda self: self.networks.latent_shape)
  image_size = property(lambda self: self.networks.image_size)

  @property
  def scheduler_config(self) -> dict[str, Any]:
    """The parsed scheduler/scheduler_config.json."""
    return self.configs["scheduler"]

  @property
  def scaling_factor(self) -> float:
    """Multiplies the autoencoder's latents so that `x_0` has about unit variance."""
    return self.networks.vae.config.scaling_factor

  @property
  def context_length(self) -> int:
    """Tokens per prompt, N."""
    return self.networks.text_encoder.config.max_position_embeddings

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts to int32 `[B, N]`, padded; tokens beyond N are dropped (warned of once)."""
    return tokenization.tokenize(self.tokenizer_folder, prompts, self.context_length)

  def init_params(self, key: Key) -> dict[str, Params]:
    """Random parameters of all three components, as numpy arrays in host memory.

    Drawn on the host: compiling the random draws of hundreds of layers takes XLA minutes.
    """
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: _random_leaf(rng, path[-1].key, leaf.shape), self.networks.param_shapes()
    )

  def with_params(self, params: dict[str, Params]) -> "StableDiffusion":
    """This model with other parameters."""
    return dataclasses.replace(self, params=params)

  def with_scaling_factor(self, scaling_factor: float) -> "StableDiffusion":
    """This model with other latents; a UNet trained on the old ones no longer fits."""
    vae_config = {**self.configs["vae"], "scaling_factor": scaling_factor}
    configs = {**self.configs, "vae": vae_config}
    other = build(**configs, tokenizer_folder=self.tokenizer_folder)
    return other.with_params(self.params)


def build(
  *,
  unet: dict[str, Any],
  vae: dict[str, Any],
  text_encoder: dict[str, Any],
  scheduler: dict[str, Any],
  tokenizer_folder: str | os.PathLike,
) -> StableDiffusion:
  """Builds the bundle, without parameters, from the parsed config.json of each component."""
  tokenization.check_folder(tokenizer_folder)
  networks = _networks(unet, vae, text_encoder)
  configs = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}
  return StableDiffusion(networks, {}, configs, pathlib.Path(tokenizer_folder))


def _networks(unet_config: dict, vae_config: dict, text_config: dict) -> Networks:
  unet_fields = unet.UNetConfig.from_dict(unet_config)
  vae_fields = vae.VAEConfig.from_dict(vae_config)
  text_fields = clip.CLIPTextConfig.from_dict(text_config)
  if unet_fields.in_channels != vae_fields.latent_channels:
    raise ValueError(
      f"expected unet in_channels == vae latent_channels, found {unet_fields.in_channels} and "
      f"{vae_fields.latent_channels}; inpainting and other image-conditioned UNets do not fit"
    )
  if unet_fields.cross_attention_dim != text_fields.hidden_size:
    raise ValueError(
      f"expected unet cross_attention_dim == text_encoder hidden_size, found "
      f"{unet_fields.cross_attention_dim} and {text_fields.hidden_size}"
    )
  return Networks(
    unet.UNet2DConditionModel(unet_fields),
    vae.AutoencoderKL(vae_fields),
    clip.CLIPTextModel(text_fields),
  )


def load(path: str | os.PathLike, tokenizer: str = "", configs: str = "") -> StableDiffusion:
  """As `open_model`, with all parameters read into memory."""
  model = open_model(path, tokenizer, configs)
  return model.with_params(jax.tree.map(np.asarray, model.params))


def open_model(path: str | os.PathLike, tokenizer: str = "", configs: str = "") -> StableDiffusion:
  """Opens a model, whose parameters are `weights.lazy.LazyArray`s until they are placed.

  Args:
    path: "shapes" (the embedded model), a folder in the diffusers layout, a hub id, or a single
      .safetensors file under the original names.
    tokenizer: folder or hub id of a tokenizer, instead of the model's own; a single file has none.
    configs: folder or hub id of a model whose configurations, and tokenizer, are those of a single
      file; by default they are the published ones of its kind.
  """
  found = hub.find_model(path)
  if found.is_file():
    return _open_single_file(found, tokenizer, configs)
  if configs:
    raise ValueError(f"configs: expected none with the folder {found}, which has its own")
  _check_pipeline(found)
  model = build(
    **_read_configs(found),
    tokenizer_folder=hub.find_tokenizer(tokenizer) if tokenizer else found / "tokenizer",
  )
  return model.with_params(
    {
      name: safetensors_io.open_component(found / name, shapes)
      for name, shapes in model.networks.param_shapes().items()
    }
  )


def _read_configs(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
  configs = {name: files.read_json(folder / name / "config.json") for name in _WEIGHTS}
  scheduler = files.read_json(folder / "scheduler" / "scheduler_config.json")
  return {**configs, "scheduler": scheduler}


def _open_single_file(file: pathlib.Path, tokenizer: str, configs: str) -> StableDiffusion:
  checkpoint = single_file.open_checkpoint(file)
  if checkpoint.kind == "xl":
    raise ValueError(f"{file} holds Stable Diffusion XL; expected a single file of 1.x or 2.x")
  if not (tokenizer or configs):
    raise ValueError(
      f"{file} holds no tokenizer\nset config.model.tokenizer (--tokenizer) to a folder with "
      f"vocab.json and merges.txt or to a hub id, such as openai/clip-vit-large-patch14 for 1.x"
    )
  if checkpoint.kind == "2.x" and not configs:
    warnings.warn(
      f"{file}: whether a 2.x predicts noise or velocity cannot be seen in its tensors; taken for "
      f"2.1, velocity at 768 pixels. For 2-base, say, name a model with its configs (--configs).",
      stacklevel=2,
    )
  model = build(
    **(_read_configs(hub.find_folder(configs)) if configs else checkpoint.configs),
    tokenizer_folder=hub.find_tokenizer(tokenizer or configs),
  )
  return model.with_params(
    {name: checkpoint.component(name, s) for name, s in model.networks.param_shapes().items()}
  )


def _check_pipeline(folder: pathlib.Path) -> None:
  """Raises unless the folder's model_index.json describes a Stable Diffusion 1.x or 2.x."""
  index = files.read_json(folder / "model_index.json")
  present = {name for name, entry in index.items() if isinstance(entry, list) and any(entry)}
  missing = sorted({*_WEIGHTS, "tokenizer", "scheduler"} - present)
  foreign = sorted(present & {"text_encoder_2", "transformer", "prior"})
  if missing or foreign:
    raise ValueError(
      f"{folder / 'model_index.json'}: expected a Stable Diffusion 1.x or 2.x pipeline, found "
      f"{index.get('_class_name', 'no class')}"
      + (f" without {', '.join(missing)}" if missing else f" with {', '.join(foreign)}")
    )


def save(model: StableDiffusion, folder: str | os.PathLike) -> None:
  """Writes the folder that `load` and diffusers read; configs and tokenizer as they were found."""
  folder = pathlib.Path(folder)
  missing = sorted(_WEIGHTS.keys() - model.params.keys())
  if missing:
    raise ValueError(f"expected params of {sorted(_WEIGHTS)}, found none of {missing}")
  index = _model_index(model.scheduler_config)
  for name, filename in _WEIGHTS.items():
    config = model.configs[name]
    safetensors_io.write_component(folder / name, model.params[name], config, filename)
  tokenization.copy(model.tokenizer_folder, folder / "tokenizer")
  (folder / "scheduler").mkdir(exist_ok=True)
  files.write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler_config)
  files.write_json(folder / "model_index.json", index)  # last: without it nothing loads the folder


def _model_index(scheduler_config: Mapping[str, Any]) -> dict[str, Any]:
  """Names the class of each component, as diffusers wants it."""
  if "_class_name" not in scheduler_config:
    raise ValueError("expected '_class_name' in the scheduler config, e.g. 'DDIMScheduler'")
  return {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.30.0",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", scheduler_config["_class_name"]],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
