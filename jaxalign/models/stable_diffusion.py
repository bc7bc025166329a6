"""Stable Diffusion 1.x, 2.x and XL as one bundle: networks, tokenizers, scheduler config.

The networks are pure functions of explicit parameters. On disk a bundle is the folder that
diffusers' pipeline of the same kind reads and writes.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import files
from jaxalign.models import conditioning, lean_decoding, model_index, tokenization, unet, vae
from jaxalign.models.weights import hub, safetensors_io
from jaxalign.types import Array, Key, Params

_WEIGHTS = {
  "unet": safetensors_io.WEIGHTS,
  "vae": safetensors_io.WEIGHTS,
  "text_encoder": safetensors_io.TEXT_WEIGHTS,
  "text_encoder_2": safetensors_io.TEXT_WEIGHTS,
}


@dataclasses.dataclass(frozen=True)
class Networks:
  """The networks as pure functions. Holds no arrays, so a jitted closure captures none.

  image_size: `(H, W)` in pixels of the images that are sampled.
  decode_batch, decode_tile: see `load`.
  """

  unet: unet.UNet2DConditionModel
  vae: vae.AutoencoderKL
  text: conditioning.OneTextEncoder | conditioning.TwoTextEncoders
  image_size: tuple[int, int]
  decode_batch: int | None = None
  decode_tile: int | None = None

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """`(h, w, C)` of the latents that decode to `image_size`."""
    height, width = (pixels // self.vae.config.downscale for pixels in self.image_size)
    return height, width, self.vae.config.latent_channels

  # The ignores: flax types `apply` as perhaps a pair, which it is only with `mutable`.

  def denoise(self, variables: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
    """The UNet's prediction, `[B, h, w, C]`.

    Args:
      variables: `{"params": ...}` and, with an adapter, `"lora": ...`.
      x_t: `[B, h, w, C]` noisy latents; t: `[B]` timesteps in [0, 1000).
      cond: from `encode_text`; for a UNet that reads more channels than `x_t` has, also `image`
        `[B, h, w, in_channels - C]`, which follow those of `x_t`: the unscaled latents of the image
        to edit (arXiv:2211.09800), or a mask and the latents of what it leaves.
    """
    x_t = self._with_image(x_t, cond)
    return self.unet.apply(variables, x_t, t, cond["text"], cond)  # type: ignore[return-value]

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

  # The autoencoder computes in float32 whatever it is given: lower precision overflows in the one
  # of XL, and costs visible detail in the others.

  def vae_moments(self, params: Params, images: Array) -> tuple[Array, Array]:
    """Images `[B, H, W, 3]` in [-1, 1] to the unscaled `(mean, log_var)`, each `[B, h, w, C]`."""
    images = images.astype(jnp.float32)
    return self.vae.apply({"params": params}, images, method="encode")  # type: ignore[return-value]

  def vae_decode(self, params: Params, latents: Array) -> Array:
    """Unscaled latents `[B, h, w, C]` to images `[B, H, W, 3]`, about [-1, 1]."""
    decode_fn: lean_decoding.DecodeFn = self._decode_whole
    if self.decode_tile is not None:
      decode_fn = lean_decoding.tiled(decode_fn, self.decode_tile, self.vae.config.downscale)
    if self.decode_batch is not None:
      decode_fn = lean_decoding.sliced(decode_fn, self.decode_batch)
    return decode_fn(params, latents.astype(jnp.float32))

  def _decode_whole(self, params: Params, latents: Array) -> Array:
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
    latents = latents.astype(jnp.float32)
    images = self.vae_decode(params, latents / self.vae.config.scaling_factor + self._shift)
    return jnp.clip(0.5 * images + 0.5, 0.0, 1.0)

  @property
  def _shift(self) -> float:
    return self.vae.config.shift_factor or 0.0

  def param_shapes(self) -> dict[str, Params]:
    """The parameter tree of each component, with shapes in place of arrays."""
    key = jax.random.key(0)
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
    params: `{"unet": ..., "vae": ..., "text_encoder": ...}` and, for XL, "text_encoder_2", or {}
      before there are any; numpy arrays in host memory after `load`.
    configs: the parsed config.json of each component and of the scheduler, as found; "pipeline"
      holds the class and the settings of model_index.json.
    tokenizer_folder: holds vocab.json and merges.txt.
    tokenizer_2_folder: the same for the second text encoder, if there is one.
  """

  networks: Networks
  params: dict[str, Params]
  configs: dict[str, dict[str, Any]]
  tokenizer_folder: pathlib.Path
  tokenizer_2_folder: pathlib.Path | None = None

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
    return self.networks.text.ids_shape[-1]

  def tokenize(self, prompts: Sequence[str]) -> np.ndarray:
    """Prompts to int32 `[B, N]`, or `[B, 2, N]` with two tokenizers.

    Padded; tokens beyond N are dropped (warned of once).
    """
    folders = [folder for folder in (self.tokenizer_folder, self.tokenizer_2_folder) if folder]
    rows = [tokenization.tokenize(folder, prompts, self.context_length) for folder in folders]
    return np.stack(rows, axis=1).reshape(len(prompts), *self.networks.text.ids_shape)

  def init_params(self, key: Key) -> dict[str, Params]:
    """Random parameters of all components, as numpy arrays in host memory.

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
    config = dataclasses.replace(self.networks.vae.config, scaling_factor=scaling_factor)
    networks = dataclasses.replace(self.networks, vae=vae.AutoencoderKL(config))
    vae_config = {**self.configs["vae"], "scaling_factor": scaling_factor}
    return dataclasses.replace(
      self, networks=networks, configs={**self.configs, "vae": vae_config}
    )

  def with_image_size(self, height: int, width: int) -> "StableDiffusion":
    """This model for images of another size, in pixels; a folder it is saved to keeps the old."""
    downscale = self.networks.vae.config.downscale
    if height < downscale or width < downscale or height % downscale or width % downscale:
      raise ValueError(
        f"image size: expected multiples of {downscale}, the pixels of a latent one, got "
        f"{height} x {width}"
      )
    networks = dataclasses.replace(self.networks, image_size=(height, width))
    return dataclasses.replace(self, networks=networks)


def build(
  *,
  unet: dict[str, Any],
  vae: dict[str, Any],
  text_encoder: dict[str, Any],
  scheduler: dict[str, Any],
  tokenizer_folder: str | os.PathLike,
  text_encoder_2: dict[str, Any] | None = None,
  tokenizer_2_folder: str | os.PathLike | None = None,
  pipeline: dict[str, Any] | None = None,
) -> StableDiffusion:
  """Builds the bundle, without parameters, from the parsed config.json of each component.

  With `text_encoder_2` and its tokenizer it is an XL. `pipeline` holds the class and the settings
  of its model_index.json, by default those of the published models.
  """
  two = text_encoder_2 is not None
  if two != (tokenizer_2_folder is not None):
    raise ValueError("expected text_encoder_2 and tokenizer_2_folder together, found only one")
  folders = [
    pathlib.Path(folder) for folder in (tokenizer_folder, tokenizer_2_folder) if folder is not None
  ]
  for folder in folders:
    tokenization.check_folder(folder)
  configs = {
    "unet": unet,
    "vae": vae,
    "text_encoder": text_encoder,
    "scheduler": scheduler,
    "pipeline": pipeline or model_index.default(two),
  }
  if text_encoder_2 is not None:
    configs["text_encoder_2"] = text_encoder_2
  return StableDiffusion(_networks(configs), {}, configs, *folders)


def _networks(configs: Mapping[str, dict[str, Any]]) -> Networks:
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
    unet.UNet2DConditionModel(unet_config),
    vae.AutoencoderKL(vae_config),
    text,
    _trained_image_size(unet_config, vae_config),
  )


def _trained_image_size(
  unet_config: unet.UNetConfig, vae_config: vae.VAEConfig
) -> tuple[int, int]:
  """`(H, W)` in pixels, by the latents of the UNet or, where it does not say, the autoencoder's."""
  downscale, size = vae_config.downscale, unet_config.sample_size
  if size is None:
    height, width = _pair(vae_config.sample_size)
    return height // downscale * downscale, width // downscale * downscale
  height, width = _pair(size)
  return height * downscale, width * downscale


def _pair(size: int | tuple[int, ...]) -> tuple[int, int]:
  entries = size if isinstance(size, tuple) else (size,)
  return entries[0], entries[-1]


def load(
  path: str | os.PathLike,
  *,
  image_size: tuple[int, int] | None = None,
  decode_batch: int | None = None,
  decode_tile: int | None = None,
) -> StableDiffusion:
  """Reads "shapes" (the embedded model), a folder in the diffusers layout, or a hub id.

  Args:
    path: one of these.
    image_size: `(H, W)` in pixels; by default what the model was trained on.
    decode_batch: images are decoded at most this many at a time; by default all of a batch.
    decode_tile: larger latents are decoded in tiles with this side; by default whole.
  """
  folder = hub.find_folder(path)
  pipeline, two = model_index.read(folder)
  components = [name for name in _WEIGHTS if two or name != "text_encoder_2"]
  configs = {name: files.read_json(folder / name / "config.json") for name in components}
  model = build(
    **configs,
    scheduler=files.read_json(folder / "scheduler" / "scheduler_config.json"),
    tokenizer_folder=folder / "tokenizer",
    tokenizer_2_folder=folder / "tokenizer_2" if two else None,
    pipeline=pipeline,
  )
  model = model if image_size is None else model.with_image_size(*image_size)
  networks = dataclasses.replace(
    model.networks, decode_batch=decode_batch, decode_tile=decode_tile
  )
  return dataclasses.replace(model, networks=networks).with_params(
    {
      name: safetensors_io.read_component(folder / name, shapes)
      for name, shapes in model.networks.param_shapes().items()
    }
  )


def save(model: StableDiffusion, folder: str | os.PathLike) -> None:
  """Writes the folder that `load` and diffusers read; configs and tokenizers as they were found."""
  folder = pathlib.Path(folder)
  components = [name for name in _WEIGHTS if name in model.configs]
  missing = sorted(set(components) - model.params.keys())
  if missing:
    raise ValueError(f"expected params of {sorted(components)}, found none of {missing}")
  index = model_index.make(model.configs)
  for name in components:
    config = model.configs[name]
    safetensors_io.write_component(folder / name, model.params[name], config, _WEIGHTS[name])
  tokenization.copy(model.tokenizer_folder, folder / "tokenizer")
  if model.tokenizer_2_folder is not None:
    tokenization.copy(model.tokenizer_2_folder, folder / "tokenizer_2")
  (folder / "scheduler").mkdir(exist_ok=True)
  files.write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler_config)
  files.write_json(folder / model_index.FILE, index)  # last: without it nothing loads the folder
