"""A whole model in one safetensors file, under the names of its original publication."""

import os
import re
from collections.abc import Iterable
from typing import NamedTuple

from jaxalign import checks
from jaxalign.models.identity import markers
from jaxalign.models.identity.identity import Configs, Identity
from jaxalign.models.weights import names, original, published, safetensors_io, tensor_files
from jaxalign.types import Params


class Part(NamedTuple):
  """A component of a checkpoint: the beginning of its tensors' names, and what follows."""

  prefix: str
  names: original.Names


_UNET = Part("model.diffusion_model.", original.unet)
_VAE = Part("first_stage_model.", original.vae)
# Text encoders tell the kinds apart.
KINDS: dict[str, dict[str, Part]] = {
  "xl": {
    "unet": _UNET,
    "vae": _VAE,
    "text_encoder": Part("conditioner.embedders.0.transformer.", original.clip),
    "text_encoder_2": Part("conditioner.embedders.1.model.", original.open_clip),
  },
  "2.x": {
    "unet": _UNET,
    "vae": _VAE,
    "text_encoder": Part("cond_stage_model.model.", original.open_clip),
  },
  "1.x": {
    "unet": _UNET,
    "vae": _VAE,
    "text_encoder": Part("cond_stage_model.transformer.", original.clip),
  },
}

# Tensors of a component that are no weights of it: constants, what only training used, and what
# diffusers leaves out of open_clip's text encoder.
_NO_WEIGHTS = re.compile(
  r"(.*\.)?position_ids|logit_scale|attn_mask|text_projection|loss\..*|model_ema\..*"
)
_RESBLOCK = re.compile(r"transformer\.resblocks\.(\d+)\..*")


class Checkpoint(NamedTuple):
  """An opened file.

  kind: "1.x", "2.x" or "xl".
  file: its tensors, under their original names.
  said: what the file says of itself.
  """

  kind: str
  file: tensor_files.TensorFile
  said: markers.Said

  def identify(self, named: Identity | None = None) -> Identity:
    """What model this is: by the configs that the user named, or else by the published ones.

    Whether a 2.x of which nothing tells predicts noise or velocity cannot be seen. It is taken for
    2.1, which predicts the velocity, as diffusers takes such a file.
    """
    if named is not None:
      return markers.compare(self.file.path, self.kind, self.said, named)
    return markers.configure(self.file.path, self.kind, self.said, published.CONFIGS[self.kind])

  @property
  def configs(self) -> Configs:
    """Of each component and of the scheduler, where the user names none."""
    return self.identify().configs

  def component(self, name: str, expected: Params) -> dict:
    """The parameters of a component, like `expected`, as `LazyArray`s.

    Raises ValueError for tensors that are missing, unexpected or of another shape.
    """
    part = KINDS[self.kind][name]
    stored = {
      tensor.removeprefix(part.prefix): array
      for tensor, array in self.file.tensors.items()
      if tensor.startswith(part.prefix)
    }
    shapes = safetensors_io.torch_shapes(expected)
    if part.names is original.clip:
      stored = names.canonical(str(self.file.path), stored, shapes)
    sources = part.names(shapes)
    found = original.renamed(sources, stored, shapes)
    used = {source.name for source in sources.values()}
    extra = {tensor for tensor in stored if not _is_no_weight(tensor, used)} - used
    found |= {part.prefix + tensor: stored[tensor] for tensor in extra}
    what = (
      f"{self.file.path} (Stable Diffusion {self.kind}): its {name} does not fit the configuration"
    )
    return safetensors_io.to_tree(what, found, expected)


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
  """Opens a file; ValueError if it is no whole model of a kind that is supported here."""
  file = tensor_files.open_file(path)
  for kind, parts in KINDS.items():
    if all(_has(file.tensors, part.prefix) for part in parts.values()):
      return Checkpoint(kind, file, markers.read(file, kind))
  other = markers.other_kind(file)
  if other:
    raise ValueError(
      f"{file.path}: expected a whole Stable Diffusion 1.x, 2.x or XL, found {other}\n"
      "this kind of model is not read from a single file"
    )
  found = sorted({tensor.split(".")[0] for tensor in file.tensors})
  raise ValueError(
    f"{file.path}: expected a whole Stable Diffusion 1.x, 2.x or XL (UNet, autoencoder and text "
    f"encoders, under their original names), found tensors of: {checks.first(found)}\n"
    f"adapters are given with --lora; a single component needs the folder of its model"
  )


def _has(tensors: Iterable[str], prefix: str) -> bool:
  return any(tensor.startswith(prefix) for tensor in tensors)


def _is_no_weight(tensor: str, used: set[str]) -> bool:
  """Whether a tensor may be left out: a constant, or of the layer after the last that is used."""
  block = _RESBLOCK.fullmatch(tensor)
  if block:
    here, before = (f"transformer.resblocks.{int(block[1]) - i}.ln_1.weight" for i in (0, 1))
    return here not in used and before in used
  return bool(_NO_WEIGHTS.fullmatch(tensor))
