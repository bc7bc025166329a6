"""Stable Diffusion 3 and 3.5: a rectified flow by an MMDiT, told prompts by two CLIPs and a T5.

Esser et al. 2024, arXiv:2403.03206. On disk it is the folder that diffusers'
StableDiffusion3Pipeline reads and writes.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, streams
from jaxalign.diffusion import schedulers, transitions
from jaxalign.modalities.image import IMAGES
from jaxalign.models import tokenization
from jaxalign.models.families import autoencoding, compute, parts_folder
from jaxalign.models.identity import classes, identity
from jaxalign.models.identity.parts import TOKENIZER, Kind, Part, read
from jaxalign.models.model import Model, ModelFiles
from jaxalign.models.networks import sd3_conditioning, sd3_transformer, vae
from jaxalign.models.weights import hub
from jaxalign.types import Array, Params, Record, at_least_float32

_CLIP = ("CLIPTextModelWithProjection", "CLIPTextModel")
_CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
KIND = Kind(
  "a Stable Diffusion 3",
  classes.SD3_PIPELINES,
  {
    "transformer": Part(("SD3Transformer2DModel",), "sd3_transformer"),
    "vae": Part(("AutoencoderKL",), "vae"),
    "text_encoder": Part(_CLIP, "text_encoder", "transformers"),
    "text_encoder_2": Part(_CLIP, "text_encoder", "transformers"),
    "text_encoder_3": Part(("T5EncoderModel",), "t5", "transformers", optional=True),
    "tokenizer": Part(_CLIP_TOKENIZER, TOKENIZER, "transformers"),
    "tokenizer_2": Part(_CLIP_TOKENIZER, TOKENIZER, "transformers"),
    "tokenizer_3": Part(
      ("T5TokenizerFast", "T5Tokenizer"), TOKENIZER, "transformers", optional=True
    ),
    "scheduler": Part(("FlowMatchEulerDiscreteScheduler",), "scheduler"),
  },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks(autoencoding.Autoencoding):
  """The networks as pure functions. Holds no arrays, so a jitted closure captures none.

  dtype: what the transformer computes in, by name; None is that of `x_t`.
  """

  transformer: sd3_transformer.SD3Transformer2DModel
  text: sd3_conditioning.SD3TextEncoders
  dtype: str | None = None

  def denoise(self, variables: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> Array:
    """The velocity, `[B, h, w, C]`, in float32 whatever it is computed in; `t` is 1000 sigma."""
    x_t = jnp.asarray(x_t, self.dtype)
    prediction: Any = self.transformer.apply(variables, x_t, t, cond["text"], cond["pooled"])
    return at_least_float32(prediction)

  def param_shapes(self) -> dict[str, Params]:
    """The parameter tree of each component, with shapes in place of arrays."""
    key, config = streams.key_shape(), self.transformer.config
    ids = jnp.zeros((1, self.text.text_encoder.config.max_position_embeddings), jnp.int32)
    shapes = {name: jax.eval_shape(net.init, key, ids) for name, net in self.text.modules.items()}
    x_t, text = jnp.zeros((1, *self.latent_shape)), jnp.zeros((1, 1, config.joint_attention_dim))
    pooled = jnp.zeros((1, config.pooled_projection_dim))
    init = self.transformer.init
    shapes["transformer"] = jax.eval_shape(init, key, x_t, jnp.zeros(1), text, pooled)
    images = jnp.zeros((1, *self.image_size, self.vae.config.in_channels))
    shapes["vae"] = jax.eval_shape(self.vae.init, key, images)
    return {name: variables["params"] for name, variables in shapes.items()}


def open_model(
  path: str | os.PathLike,
  *,
  image_size: tuple[int, int] | None = None,
  text_length: int = 256,
  decode_batch: int | None = None,
  decode_tile: int | None = None,
  dtype: str = "float32",
  remat: str = "none",
  param_dtype: str = "float32",
  vae_dtype: str = "float32",
  shapes_only: bool = False,
) -> Model:
  """Opens a Stable Diffusion 3 or 3.5, whose parameters are lazy until they are placed.

  Args:
    path: a folder in the diffusers layout, or a hub id. The T5 may be missing from it.
    image_size: `(H, W)` in pixels; by default what the model was trained on.
    text_length: tokens that the T5 reads, diffusers' `max_sequence_length`. Padding is attended to,
      so that another length gives another image.
    decode_batch, decode_tile: see `stable_diffusion.open_model`.
    dtype, remat, param_dtype: see `stable_diffusion.StableDiffusion.with_compute`.
    vae_dtype: what images are decoded in, "float32" or "bfloat16".
    shapes_only: parameters are shapes, by the configs; weights are neither downloaded nor read.

  Raises:
    ValueError: components, fields or weights that do not fit, an image size that patches do not
      divide, or options that do not go together.
  """
  compute.check(dtype=dtype, param_dtype=param_dtype, remat=remat)
  checks.check_choice("model.vae_dtype", vae_dtype, compute.DTYPES)
  checks.check_range("model.text_length", text_length, 1, checks.MOST)
  folder = hub.find_model(path, weights=not shapes_only)
  found = read(folder, KIND, weights=not shapes_only)
  identity.tell(folder, found.notes)
  try:
    networks = make(found.configs, text_length)
    if image_size is not None:
      patch = networks.transformer.config.patch_size
      networks = networks.sized(*image_size, patch * networks.vae.config.downscale)
  except ValueError as error:  # networks do not know whose configs they are of
    raise ValueError(f"{folder}: {error}") from error
  networks = dataclasses.replace(
    networks,
    transformer=networks.transformer.clone(remat=remat),
    decode_batch=decode_batch,
    decode_tile=decode_tile,
    dtype=compute.narrow(dtype),
    vae_dtype=vae_dtype,
  )
  shapes = networks.param_shapes()
  params = shapes if shapes_only else parts_folder.open_params(folder, shapes)
  return as_model(networks, params, found, folder, param_dtype)


def make(configs: Mapping[str, Mapping[str, Any]], text_length: int = 256) -> Networks:
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
  )


def as_model(
  networks: Networks,
  params: Mapping[str, Params],
  found: identity.Identity,
  folder: str | os.PathLike,
  param_dtype: str = "float32",
) -> Model:
  """The networks and their parameters as every family of models is seen from above.

  Args:
    networks: holds no arrays.
    params: by component, as diffusers names them.
    found: the configs.
    folder: holds the tokenizers.
    param_dtype: what frozen weights of the transformer are stored in on devices.
  """
  scheduler, height_width = found.configs["scheduler"], networks.latent_shape[:2]
  tokens_of_image = int(np.prod(height_width)) // networks.transformer.config.patch_size**2
  tokenize = functools.partial(tokens, networks.text, folder)
  exact = None if networks.dtype is None else dataclasses.replace(networks, dtype=None).denoise
  return Model(
    params={parts_folder.here(name): tree for name, tree in params.items()},
    tokenize=tokenize,
    empty=tokenize([{"prompt": ""}]),
    condition=networks.text.encode,
    denoise=networks.denoise,
    encode=lambda params, images, key: networks.encode_samples(params["vae"], images, key),
    decode=lambda params, x_0: networks.decode(params["vae"], x_0),
    describe=lambda record: record["prompt"],
    latent_shape=networks.latent_shape,
    sample_shape=(*networks.image_size, 3),
    prediction_type=schedulers.network_prediction_type(scheduler),
    levels=schedulers.training_table(scheduler),
    make_process=functools.partial(
      transitions.make_process, scheduler, image_seq_len=tokens_of_image
    ),
    modality=IMAGES,
    files=ModelFiles(
      functools.partial(parts_folder.save, KIND, found.configs, folder),
      {parts_folder.here(name): name for name in params if name != "vae"},
    ),
    dtype=networks.dtype,
    exact=exact,
    stored_dtypes=functools.partial(compute.stored_dtypes, param_dtype=param_dtype),
    corrections=tuple(f"{note.component}: {note.what}" for note in found.notes),
  )


def tokens(
  text: sd3_conditioning.SD3TextEncoders,
  folder: str | os.PathLike,
  records: Sequence[Record],
) -> dict[str, np.ndarray]:
  """The token ids of prompts by each text encoder, as `SD3TextEncoders.encode` takes them."""
  folder, prompts = pathlib.Path(folder), tokenization.texts(records)
  clips = [text.text_encoder.config, text.text_encoder_2.config]
  of_clip = [
    tokenization.tokenize(
      folder / name, prompts, config.max_position_embeddings, num_embeddings=config.vocab_size
    )
    for name, config in zip(("tokenizer", "tokenizer_2"), clips, strict=True)
  ]
  found = {"clip": np.stack(of_clip, axis=1)}
  if text.text_encoder_3 is not None:
    found["t5"] = tokenization.tokenize(
      folder / "tokenizer_3",
      prompts,
      text.t5_length,
      num_embeddings=text.text_encoder_3.config.vocab_size,
      kind="T5",
    )
  return found
