"""Stable Diffusion 1.x, 2.x and XL as one bundle: networks, tokenizers, scheduler config.

The networks are pure functions of explicit parameters. On disk a bundle is the folder that
diffusers' pipeline of the same kind reads and writes.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxalign import checks, files
from jaxalign.diffusion import guidance, schedulers, transitions
from jaxalign.modalities.image import IMAGES
from jaxalign.models import tokenization
from jaxalign.models.families import (
  compute,
  initialization,
  model_index,
  stable_diffusion_networks,
)
from jaxalign.models.identity import folders, identity
from jaxalign.models.model import Model, ModelFiles
from jaxalign.models.networks import vae
from jaxalign.models.weights import hub, safetensors_io, single_file
from jaxalign.types import Key, Params

_WEIGHTS = {
  "unet": safetensors_io.WEIGHTS,
  "vae": safetensors_io.WEIGHTS,
  "text_encoder": safetensors_io.TEXT_WEIGHTS,
  "text_encoder_2": safetensors_io.TEXT_WEIGHTS,
}


@dataclasses.dataclass(frozen=True, eq=False)
class StableDiffusion:
  """Networks, their parameters, and everything else that a model's folder holds.

  The functions of `networks` are attributes here too; they never see `params` unless given.

  Attributes:
    networks: the pure functions.
    params: `{"unet": ..., "vae": ..., "text_encoder": ...}` and, for XL, "text_encoder_2", or {}
      before there are any; numpy arrays in host memory after `load`, in their files still after
      `open_model`.
    configs: the parsed config.json of each component and of the scheduler, as found or corrected;
      "pipeline" holds the class and the settings of model_index.json.
    tokenizer_folder: holds vocab.json and merges.txt.
    tokenizer_2_folder: the same for the second text encoder, if there is one.
    param_dtype: what frozen weights of the UNet are stored in on devices, see `with_compute`.
    notes: what was assumed and corrected when it was opened.
  """

  networks: stable_diffusion_networks.Networks
  params: dict[str, Params]
  configs: dict[str, dict[str, Any]]
  tokenizer_folder: pathlib.Path
  tokenizer_2_folder: pathlib.Path | None = None
  param_dtype: str = "float32"
  notes: tuple[identity.Note, ...] = ()

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

    Padded; tokens beyond N are dropped (warned of once). Raises ValueError if a tokenizer's own
    limit is below N, or an id has no embedding.
    """
    folders = [folder for folder in (self.tokenizer_folder, self.tokenizer_2_folder) if folder]
    sizes = [encoder.config.vocab_size for encoder in self.networks.text.modules.values()]
    rows = [
      tokenization.tokenize(folder, prompts, self.context_length, num_embeddings=size)
      for folder, size in zip(folders, sizes, strict=True)
    ]
    return np.stack(rows, axis=1).reshape(len(prompts), *self.networks.text.ids_shape)

  def init_params(self, key: Key) -> dict[str, Params]:
    """Random parameters of all components, as numpy arrays in host memory."""
    return initialization.random_params(key, self.networks.param_shapes())

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

  def with_compute(
    self,
    *,
    dtype: str,
    remat: str,
    param_dtype: str = "float32",
    vae_dtype: str = "float32",
  ) -> "StableDiffusion":
    """This model with a UNet that computes in `dtype`; its parameters stay what they are.

    `remat` says what its blocks keep for their gradient, a name of `rematerialization.REMAT`. On
    devices, weights of the UNet that are not trained are stored in `param_dtype`: in that of the
    computation they take half the memory, and no result changes. Images are decoded in `vae_dtype`;
    the autoencoder of an XL only in float32, unless its config says `force_upcast: false`.
    """
    checks.check_choice("model.vae_dtype", vae_dtype, compute.DTYPES)
    needs_float32 = "text_encoder_2" in self.configs and self.configs["vae"].get(
      "force_upcast", True
    )
    if vae_dtype == "bfloat16" and needs_float32:
      raise ValueError(
        "model.vae_dtype: expected float32, which the autoencoder of this XL asks for "
        "(force_upcast in vae/config.json is not false); got bfloat16"
      )
    compute.check(dtype=dtype, param_dtype=param_dtype, remat=remat)
    networks = dataclasses.replace(
      self.networks,
      unet=self.networks.unet.clone(remat=remat),
      dtype=compute.narrow(dtype),
      vae_dtype=vae_dtype,
    )
    return dataclasses.replace(self, networks=networks, param_dtype=param_dtype)

  def stored_dtypes(self, variables: Params) -> Params:
    """What each frozen array of the UNet is stored in; norms are float32 always."""
    return compute.stored_dtypes(variables, self.param_dtype)

  def with_image_size(self, height: int, width: int) -> "StableDiffusion":
    """This model for images of another size, in pixels; a folder it is saved to keeps the old."""
    networks = self.networks.sized(height, width, self.networks.vae.config.downscale)
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
  networks, second = stable_diffusion_networks.make(configs), folders[1] if two else None
  return StableDiffusion(networks, {}, configs, folders[0], second)


def load(path: str | os.PathLike, **options: Any) -> StableDiffusion:
  """As `open_model`, with all parameters read into memory."""
  model = open_model(path, **options)
  return model.with_params(jax.tree.map(np.asarray, model.params))


def open_model(
  path: str | os.PathLike,
  *,
  tokenizer: str | os.PathLike = "",
  configs: str | os.PathLike = "",
  image_size: tuple[int, int] | None = None,
  decode_batch: int | None = None,
  decode_tile: int | None = None,
  dtype: str = "float32",
  remat: str = "none",
  param_dtype: str = "float32",
  vae_dtype: str = "float32",
  shapes_only: bool = False,
) -> StableDiffusion:
  """Opens a model, whose parameters are `weights.lazy.LazyArray`s until they are placed.

  Args:
    path: "shapes" (the embedded model), a folder in the diffusers layout, a hub id, or a single
      .safetensors file under the original names.
    tokenizer: folder or hub id of a tokenizer, instead of the model's own; a single file has none.
      For XL, of a model that has both.
    configs: folder or hub id of a model whose configurations, and tokenizers, are those of a single
      file; by default they are the published ones of its kind.
    image_size: `(H, W)` in pixels; by default what the model was trained on.
    decode_batch: images are decoded at most this many at a time; by default all of a batch.
    decode_tile: larger latents are decoded in tiles with this side; by default whole.
    dtype, remat, param_dtype, vae_dtype: see `StableDiffusion.with_compute`.
    shapes_only: parameters are shapes, by the configs; weights are neither downloaded nor read.
  """
  found = hub.find_model(path, weights=not shapes_only)
  if found.is_file():
    model = _open_single_file(found, tokenizer, configs)
  else:
    model = _open_folder(found, tokenizer, configs, shapes_only)
  model = model.with_compute(
    dtype=dtype, remat=remat, param_dtype=param_dtype, vae_dtype=vae_dtype
  )
  model = model if image_size is None else model.with_image_size(*image_size)
  lean = dataclasses.replace(model.networks, decode_batch=decode_batch, decode_tile=decode_tile)
  return dataclasses.replace(model, networks=lean)


def _open_folder(
  folder: pathlib.Path,
  tokenizer: str | os.PathLike,
  configs: str | os.PathLike,
  shapes_only: bool,
) -> StableDiffusion:
  if configs:
    raise ValueError(f"configs: expected none with the folder {folder}, which has its own")
  model = _build(folders.read(folder, weights=not shapes_only), folder, tokenizer or folder)
  if shapes_only:
    return model.with_params(model.networks.param_shapes())
  return model.with_params(
    {
      name: safetensors_io.open_component(
        folder / name, shapes, others=name.startswith("text_encoder")
      )
      for name, shapes in model.networks.param_shapes().items()
    }
  )


def _open_single_file(
  file: pathlib.Path, tokenizer: str | os.PathLike, configs: str | os.PathLike
) -> StableDiffusion:
  checkpoint = single_file.open_checkpoint(file)
  named = folders.read(hub.find_folder(configs), weights=False) if configs else None
  if not (tokenizer or configs):
    raise ValueError(
      f"{file} holds no tokenizer\nset config.model.tokenizer (--tokenizer) to a folder with "
      f"vocab.json and merges.txt or to a hub id, such as openai/clip-vit-large-patch14 for 1.x; "
      f"for XL, to a model with both of its tokenizers"
    )
  model = _build(checkpoint.identify(named), file, tokenizer or configs)
  return model.with_params(
    {name: checkpoint.component(name, s) for name, s in model.networks.param_shapes().items()}
  )


def _build(
  found: identity.Identity, path: pathlib.Path, tokenizer: str | os.PathLike
) -> StableDiffusion:
  """The bundle of an identified model; says what was assumed and corrected."""
  identity.tell(path, found.notes)
  two = "text_encoder_2" in found.configs
  configs: dict[str, Any] = found.configs
  tokenizers = _tokenizers(tokenizer, two)
  try:
    model = build(**configs, **tokenizers)
  except ValueError as error:  # networks do not know whose configs they are of
    raise ValueError(f"{path}: {error}") from error
  return dataclasses.replace(model, notes=found.notes)


def _tokenizers(where: str | os.PathLike, two: bool) -> dict[str, Any]:
  """The folders of one tokenizer, or of the two of a model's folder, as `build` takes them."""
  if not two:
    return {"tokenizer_folder": hub.find_tokenizer(where)}
  # The second has another padding token, which the network sees, so that one cannot stand for both.
  folder = hub.find_folder(where)
  return {
    "tokenizer_folder": folder / "tokenizer",
    "tokenizer_2_folder": folder / "tokenizer_2",
  }


def as_model(bundle: StableDiffusion) -> Model:
  """The bundle as every family of models is seen from above."""
  others = {name: tree for name, tree in bundle.params.items() if name != "unet"}
  scheduler = bundle.scheduler_config

  def write(params: Mapping[str, Params], folder: str | os.PathLike) -> None:
    named = {name: tree for name, tree in params.items() if name != "denoiser"}
    save(bundle.with_params({**named, "unet": params["denoiser"]}), folder)

  in_float32 = dataclasses.replace(bundle.networks, dtype=None)
  exact = None if bundle.networks.dtype is None else in_float32.denoise
  text_encoders = [name for name in _WEIGHTS if name.startswith("text") and name in bundle.configs]
  return Model(
    params={**others, **({"denoiser": bundle.params["unet"]} if "unet" in bundle.params else {})},
    tokenize=lambda records: bundle.tokenize(tokenization.texts(records)),
    empty=bundle.tokenize([""]),
    condition=bundle.encode_text,
    denoise=bundle.denoise,
    encode=lambda params, images, key: bundle.networks.encode_samples(params["vae"], images, key),
    decode=lambda params, x_0: bundle.decode(params["vae"], x_0),
    describe=lambda record: record["prompt"],
    latent_shape=bundle.latent_shape,
    sample_shape=(*bundle.image_size, 3),
    prediction_type=schedulers.network_prediction_type(scheduler),
    levels=schedulers.training_table(scheduler),
    make_process=functools.partial(transitions.make_process, scheduler),
    modality=IMAGES,
    guidance={"name": guidance.DEFAULT, "scale": 5.0},
    files=ModelFiles(write, {"denoiser": "unet", **{name: name for name in text_encoders}}),
    dtype=bundle.networks.dtype,
    exact=exact,
    stored_dtypes=bundle.stored_dtypes,
    corrections=tuple(f"{note.component}: {note.what}" for note in bundle.notes),
  )


def save(model: StableDiffusion, folder: str | os.PathLike) -> None:
  """Writes the folder that `load` and diffusers read; configs as corrected, tokenizers as found."""
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
