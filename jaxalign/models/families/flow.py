"""Flow transformers as models: what their families share. Each says the rest in its own file."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, streams
from jaxalign.diffusion import guidance as guidance_lib
from jaxalign.diffusion import schedulers, transitions
from jaxalign.modalities.image import IMAGES
from jaxalign.models import tokenization
from jaxalign.models.families import autoencoding, compute, parts_folder
from jaxalign.models.identity import fields, identity
from jaxalign.models.identity.parts import LENGTH, TOKENIZER, Kind, Part, read
from jaxalign.models.model import Model, ModelFiles
from jaxalign.models.networks import decoder, language_model
from jaxalign.models.weights import flow_file, hub
from jaxalign.types import Array, Params, at_least_float32

Cond = Mapping[str, Array]  # what a transformer is told of prompts, by name; leaves [B, ...]


class Texts(Protocol):
  """The text encoders of a family, as pure functions. Holds no arrays."""

  @property
  def modules(self) -> Mapping[str, nn.Module]:
    """The networks by the name of their component; each takes token ids `[B, N]`."""

  def tokens(self, folder: str | os.PathLike, prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """What `encode` takes, `[B, ...]`, by the tokenizers in a model's folder; on the host."""

  def encode(self, params: Mapping[str, Params], tokens: Mapping[str, Array]) -> dict[str, Array]:
    """Tokens to what the transformer is told; `params` by component, more of which may be there."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks(autoencoding.Autoencoding):
  """The networks of a model as pure functions. Holds no arrays, so a jitted closure captures none.

  A family is a subclass that has `arguments`, and what else is not as it is here.

  transformer: a flax module with `remat`.
  text: its text encoders.
  grid: what the pipeline says of the noise levels, see `schedulers.from_config`; the number of
    tokens is added.
  guidance: the section of a config that says nothing, see `models.model.Model`.
  guided: whether there is an empty prompt to guide away from.
  dtype: what the transformer computes in, by name; None is that of `x_t`.
  """

  transformer: Any
  text: Texts
  grid: Mapping[str, Any]
  guidance: Mapping[str, Any]
  guided: bool
  dtype: str | None = None

  patch = 2  # latent pixels along each side of a token
  empty_prompt = ""
  encodes_mean = False  # and no sample of what the autoencoder makes of an image

  @property
  def most_tokens(self) -> tuple[int, int] | None:
    """Rows and columns of tokens at most; None: there is no table of positions."""
    return None

  def sized(self, height: int, width: int) -> "Networks":  # type: ignore[override]
    """This value for images of another size; ValueError for one that it has no tokens for."""
    side, most = self.patch * self.vae.config.downscale, self.most_tokens
    if most is not None and (height > side * most[0] or width > side * most[1]):
      raise ValueError(
        f"image size: expected at most {side * most[0]} x {side * most[1]} pixels, as many as the "
        f"transformer has positions for, got {height} x {width}"
      )
    return super().sized(height, width, side)

  def arguments(self, x_t: Array, t: Array, cond: Cond) -> tuple[Any, ...]:
    """What the transformer takes for latents `[B, h, w, C]` at times `[B]`, 1000 sigma."""
    raise NotImplementedError

  def velocity(self, prediction: Array) -> Array:
    """The velocity `noise - x_0` `[B, h, w, C]` of what the transformer returns."""
    return prediction

  def cond_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Of what it is told of one prompt, of any length."""
    raise NotImplementedError

  def denoise(self, variables: Params, x_t: Array, t: Array, cond: Cond) -> Array:
    """The velocity, `[B, h, w, C]`, in float32 whatever it is computed in; `t` is 1000 sigma."""
    x_t = jnp.asarray(x_t, self.dtype)
    prediction: Any = self.transformer.apply(variables, *self.arguments(x_t, t, cond))
    return at_least_float32(self.velocity(prediction))

  def param_shapes(self) -> dict[str, Params]:
    """The parameter tree of each component, with shapes in place of arrays; of any image size."""
    key, ids = streams.key_shape(), jax.ShapeDtypeStruct((1, 1), jnp.int32)
    shapes = {name: jax.eval_shape(net.init, key, ids) for name, net in self.text.modules.items()}
    shapes["transformer"] = jax.eval_shape(
      lambda key, *inputs: self.transformer.init(key, *self.arguments(*inputs)),
      key,
      jax.ShapeDtypeStruct((1, self.patch, self.patch, self.latent_shape[-1]), jnp.float32),
      jax.ShapeDtypeStruct((1,), jnp.float32),
      self.cond_shapes(),
    )
    side = self.patch * self.vae.config.downscale
    images = jax.ShapeDtypeStruct((1, side, side, self.vae.config.in_channels), jnp.float32)
    shapes["vae"] = jax.eval_shape(self.vae.init, key, images)
    return {name: variables["params"] for name, variables in shapes.items()}


def float_shapes(**shapes: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
  """Of float32 arrays by name."""
  return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}


def check_equal(first: tuple[str, Any], second: tuple[str, Any]) -> None:
  """Raises ValueError unless two sizes, each with what it is of, are equal."""
  if first[1] != second[1]:
    raise ValueError(f"expected {first[0]} == {second[0]}, found {first[1]} and {second[1]}")


def guided(scale: float, name: str = guidance_lib.DEFAULT) -> dict[str, Any]:
  """The fields of `Networks` for a model under guidance, and the scale that its makers take."""
  return {"guidance": {"name": name, "scale": scale}, "guided": True}


def distilled(embedded: bool, scale: float) -> dict[str, Any]:
  """The fields of `Networks` for a distilled model: it is told the scale, or has none."""
  if embedded:
    return guided(scale, "embedded")
  return {"guidance": {"name": guidance_lib.DEFAULT, "scale": 1.0}, "guided": False}


SCHEDULER = Part(("FlowMatchEulerDiscreteScheduler",), fields.SCHEDULER)


def told_by(*encoders: str) -> dict[str, Part]:
  """The parts beside transformer and autoencoder of a model that a language model tells prompts.

  `encoders` are the classes that the language model may have.
  """
  known = fields.of(decoder.DecoderConfig, complete=False)
  own = language_model.own_tensors
  return {
    "text_encoder": Part(encoders, known, "transformers", own=own, copied=True),
    "tokenizer": Part(language_model.TOKENIZERS, TOKENIZER, "transformers"),
    "scheduler": SCHEDULER,
  }


class Family(NamedTuple):
  """What a family of flow transformers is.

  kind: its folders.
  make: `(configs, text_length) -> Networks`, of the parsed config.json of each component, and at
    "pipeline" what model_index.json says; ValueError where two of them do not fit each other.
  text_length: tokens that are read of a prompt, as its pipeline does by default.
  """

  kind: Kind
  make: Callable[[Mapping[str, Mapping[str, Any]], int], Networks]
  text_length: int


def open_model(
  family: Family,
  path: str | os.PathLike,
  *,
  configs: str | os.PathLike = "",
  image_size: tuple[int, int] | None = None,
  text_length: int | None = None,
  decode_batch: int | None = None,
  decode_tile: int | None = None,
  dtype: str = "float32",
  remat: str = "none",
  param_dtype: str = "float32",
  vae_dtype: str = "float32",
  shapes_only: bool = False,
) -> Model:
  """Opens a flow transformer, whose parameters are lazy until they are placed.

  Args:
    family: given by the family's own module.
    path: a folder in the diffusers layout, a hub id, or a single .safetensors file under the
      original names.
    configs: folder or hub id of the model that has what a single file has not.
    image_size: `(H, W)` in pixels; by default what the model was trained on.
    text_length: tokens that are read of a prompt, diffusers' `max_sequence_length`; by default as
      many as its pipeline reads. Where padding is attended to another length gives another image.
    decode_batch, decode_tile: see `stable_diffusion.open_model`.
    dtype, remat, param_dtype: see `stable_diffusion.StableDiffusion.with_compute`.
    vae_dtype: what images are decoded in, "float32" or "bfloat16".
    shapes_only: parameters are shapes, by the configs; weights are neither downloaded nor read.

  Raises:
    ValueError: components, fields or weights that do not fit, an image size that tokens do not
      divide, or options that do not go together.
  """
  compute.check(dtype=dtype, param_dtype=param_dtype, remat=remat)
  checks.check_choice("model.vae_dtype", vae_dtype, compute.DTYPES)
  folder, file = _find(family, path, configs, weights=not shapes_only)
  found = read(folder, family.kind, weights=not shapes_only and file is None)
  if file is not None:
    found = _with_file(family, found, file)
  identity.tell(path if file else folder, found.notes)
  networks = _make(family, folder, found, text_length, image_size)
  networks = dataclasses.replace(
    networks,
    transformer=networks.transformer.clone(remat=remat),
    decode_batch=decode_batch,
    decode_tile=decode_tile,
    dtype=compute.narrow(dtype),
    vae_dtype=vae_dtype,
  )
  shapes = networks.param_shapes()
  params = shapes if shapes_only else parts_folder.open_params(
    family.kind, folder, shapes, found.configs, file
  )
  return as_model(family, networks, params, found, folder, param_dtype)


def _find(
  family: Family, path: str | os.PathLike, configs: str | os.PathLike, *, weights: bool
) -> tuple[pathlib.Path, flow_file.FlowFile | None]:
  """The folder of a model, and the file that has some of its components instead."""
  found = hub.find_model(path, weights=weights)
  if not found.is_file():
    if configs:
      raise ValueError(f"configs: expected none with the folder {found}, which has its own")
    return found, None
  file = flow_file.open_file(found)
  if not configs:
    absent = [name for name in family.kind.parts if name not in file.components()]
    raise ValueError(
      f"{found} holds no {checks.first(absent)}\nset config.model.configs (--configs) to a folder "
      f"or hub id of {family.kind.name} that has them"
    )
  return hub.find_model(configs, weights=weights, besides=file.components()), file


def _make(
  family: Family,
  folder: pathlib.Path,
  found: identity.Identity,
  text_length: int | None,
  image_size: tuple[int, int] | None,
) -> Networks:
  """The networks of a folder's configs, for texts and images of these sizes or of its own."""
  if text_length is None:
    text_length = found.configs["pipeline"].get(LENGTH, family.text_length)
  checks.check_range("model.text_length", text_length, 1, checks.MOST)
  try:
    networks = family.make(found.configs, text_length)
    return networks.sized(*(image_size or networks.image_size))
  except ValueError as error:  # networks do not know whose configs they are of
    raise ValueError(f"{folder}: {error}") from error


def _with_file(
  family: Family, found: identity.Identity, file: flow_file.FlowFile
) -> identity.Identity:
  """A folder's configs, but for what the shapes in a file say of its transformer."""
  part = family.kind.parts[flow_file.TRANSFORMER]
  assert part.fields is not None
  config, notes = file.configure(found.configs[flow_file.TRANSFORMER], part.fields.known)
  configs = {**found.configs, flow_file.TRANSFORMER: config}
  return identity.Identity(configs, (*notes, *found.notes))


def as_model(
  family: Family,
  networks: Networks,
  params: Mapping[str, Params],
  found: identity.Identity,
  folder: str | os.PathLike,
  param_dtype: str = "float32",
) -> Model:
  """The networks and their parameters as every family of models is seen from above.

  Args:
    family: of the networks.
    networks: holds no arrays.
    params: by component, as diffusers names them.
    found: the configs.
    folder: holds the tokenizers.
    param_dtype: what frozen weights of the transformer are stored in on devices.
  """
  scheduler, folder = found.configs["scheduler"], pathlib.Path(folder)
  grid = {"image_seq_len": int(np.prod(networks.latent_shape[:2])) // networks.patch**2}

  def tokenize(records):
    return networks.text.tokens(folder, tokenization.texts(records))

  empty = tokenize([{"prompt": networks.empty_prompt}])  # of a tokenizer that is not read: now
  exact = None if networks.dtype is None else dataclasses.replace(networks, dtype=None).denoise
  return Model(
    params={parts_folder.here(name): tree for name, tree in params.items()},
    tokenize=tokenize,
    empty=empty if networks.guided else None,
    condition=networks.text.encode,
    denoise=networks.denoise,
    encode=lambda params, images, key: networks.encode_samples(
      params["vae"], images, None if networks.encodes_mean else key
    ),
    decode=lambda params, x_0: networks.decode(params["vae"], x_0),
    describe=lambda record: record["prompt"],
    latent_shape=networks.latent_shape,
    sample_shape=(*networks.image_size, 3),
    prediction_type=schedulers.network_prediction_type(scheduler),
    levels=schedulers.training_table(scheduler),
    make_process=functools.partial(
      transitions.make_process, scheduler, **{**networks.grid, **grid}
    ),
    modality=IMAGES,
    guidance=networks.guidance,
    files=ModelFiles(
      functools.partial(parts_folder.save, family.kind, found.configs, folder),
      {
        parts_folder.here(name): name
        for name, part in family.kind.parts.items()
        if name in params and name != "vae" and not part.copied
      },
    ),
    dtype=networks.dtype,
    exact=exact,
    stored_dtypes=functools.partial(compute.stored_dtypes, param_dtype=param_dtype),
    corrections=tuple(f"{note.component}: {note.what}" for note in found.notes),
  )
