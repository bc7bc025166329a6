"""A flow transformer in one safetensors file, under the names of its original publication.

Files of FLUX hold the transformer alone, those of SD3.5 the autoencoder too, and others the text
encoders as well. What is not in the file is that of a folder in the diffusers layout.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxalign import checks
from jaxalign.models.identity import identity
from jaxalign.models.identity.identity import Note
from jaxalign.models.weights import (
  lazy,
  names,
  original,
  original_flow,
  original_flux,
  original_sd3,
  safetensors_io,
  tensor_files,
)
from jaxalign.types import Params

Tensors = Mapping[str, lazy.LazyArray]
# `(where, tensors of the component, shapes of ours) -> tensors under our names`.
Read = Callable[[str, Tensors, original_flow.Shapes], Tensors]

TRANSFORMER = "transformer"


class Part(NamedTuple):
  """A component that a file may hold: the beginning of its tensors' names, and what they are."""

  prefix: str
  read: Read


class Kind(NamedTuple):
  """A kind of file.

  tells: a tensor of the transformer that no other kind has.
  names: of the transformer's tensors.
  config: the transformer's config by the shapes of its tensors.
  others: the components that a file may hold beside it.
  """

  tells: str
  names: original_flow.Names
  config: Callable[[Tensors], dict[str, Any]]
  others: Mapping[str, Part]


def _autoencoder(where: str, tensors: Tensors, shapes: original_flow.Shapes) -> Tensors:
  del where
  sources = original.vae(shapes)
  used = {source.name for source in sources.values()}
  others = {name: array for name, array in tensors.items() if name not in used}
  return original.renamed(sources, tensors, shapes) | others


def _text_encoder(where: str, tensors: Tensors, shapes: original_flow.Shapes) -> Tensors:
  """A text encoder has the names of transformers; a CLIP without a projection has the identity."""
  found = names.canonical(where, tensors, shapes)
  if _PROJECTION in shapes and _PROJECTION not in found:
    shape = shapes[_PROJECTION]
    found[_PROJECTION] = lazy.LazyArray(
      shape, lambda index: np.eye(*shape, dtype=np.float32)[index], f"{where}: {_PROJECTION}"
    )
  return found


_PROJECTION = "text_projection.weight"
_CLIP_L = Part("text_encoders.clip_l.transformer.", _text_encoder)
_CLIP_G = Part("text_encoders.clip_g.transformer.", _text_encoder)
_T5 = Part("text_encoders.t5xxl.transformer.", _text_encoder)
KINDS = {
  "sd3": Kind(
    "joint_blocks.0.x_block.attn.qkv.weight",
    original_sd3.sd3,
    original_sd3.sd3_config,
    {
      "vae": Part("first_stage_model.", _autoencoder),
      "text_encoder": _CLIP_L,
      "text_encoder_2": _CLIP_G,
      "text_encoder_3": _T5,
    },
  ),
  "flux1": Kind(
    "vector_in.in_layer.weight",
    original_flux.flux1,
    original_flux.flux1_config,
    {"vae": Part("vae.", _autoencoder), "text_encoder": _CLIP_L, "text_encoder_2": _T5},
  ),
  "flux2": Kind(
    "single_stream_modulation.lin.weight", original_flux.flux2, original_flux.flux2_config, {}
  ),
}
# Fields that no tensor's shape tells: they are those of the folder.
_NOT_TOLD = ("_class_name", "sample_size", "axes_dims_rope", "rope_theta", "eps")
_NO_WEIGHTS = re.compile(r"(.*\.)?logit_scale|model_ema\..*")  # that sampling reads


class FlowFile(NamedTuple):
  """An opened file; its `kind` is a name in `KINDS`."""

  kind: str
  file: tensor_files.TensorFile

  def components(self) -> list[str]:
    """Of which there are tensors."""
    parts = KINDS[self.kind].others.items()
    return [TRANSFORMER, *(name for name, part in parts if self._stored(part.prefix))]

  def configure(
    self, config: Mapping[str, Any], defaults: Mapping[str, Any]
  ) -> tuple[dict[str, Any], list[Note]]:
    """The transformer's config of a folder, but for what the file's shapes say; and that in words.

    `defaults` are of fields that the config does not have.
    Raises ValueError for a transformer of another kind.
    """
    try:
      told = KINDS[self.kind].config(self.file.tensors)
    except ValueError as error:
      raise ValueError(f"{self.file.path}: {error}") from None
    if told.get("out_channels", 0) is None:  # as many as there are in_channels
      del told["out_channels"]
    before = {name: _listed({**defaults, **config}.get(name)) for name in told}
    others = {name: value for name, value in told.items() if before[name] != _listed(value)}
    others = {name: value for name, value in others.items() if name not in _NOT_TOLD}
    words = identity.changes({name: before[name] for name in others}, others)
    notes = [Note("transformer", f"{word} by the file's tensors") for word in words]
    unread = self._unread()
    notes += [Note("file", f"not read: {checks.first(unread)}")] if unread else []
    return {**config, **others}, notes

  def component(self, name: str, expected: Params) -> dict:
    """The parameters of a component that the file holds, like `expected`, as `LazyArray`s.

    Raises ValueError for tensors that are missing, unexpected or of another shape.
    """
    where, shapes = str(self.file.path), safetensors_io.torch_shapes(expected)
    if name == TRANSFORMER:
      found = original_flow.renamed(KINDS[self.kind].names, self._transformer(), shapes)
    else:
      part = KINDS[self.kind].others[name]
      found = part.read(where, self._stored(part.prefix), shapes)
    what = f"{where}: its {name} does not fit the configuration"
    return safetensors_io.to_tree(what, found, expected)

  def _stored(self, prefix: str) -> dict[str, lazy.LazyArray]:
    tensors = self.file.tensors.items()
    return {n.removeprefix(prefix): array for n, array in tensors if n.startswith(prefix)}

  def _transformer(self) -> dict[str, lazy.LazyArray]:
    """What is no other component's; with the transformer's prefix where the file has that."""
    others = tuple(part.prefix for part in KINDS[self.kind].others.values())
    return {n: array for n, array in self.file.tensors.items() if not n.startswith(others)}

  def _unread(self) -> list[str]:
    """The beginnings of names, in a file with prefixes, that belong to no component of ours."""
    own = self._transformer()
    if not any(name.startswith(original_flow.PREFIX) for name in own):
      return []
    found = (name for name in own if not name.startswith(original_flow.PREFIX))
    return sorted({name.split(".")[0] for name in found if not _NO_WEIGHTS.fullmatch(name)})


def _listed(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value


def open_file(path: str | os.PathLike) -> FlowFile:
  """Opens a file of a kind that is known; ValueError for another, or for quantised weights."""
  file = tensor_files.open_file(path)
  kind = _kind(file.tensors)
  if not kind:
    raise ValueError(f"{path}: expected a flow transformer under its original names")
  tensor_files.check_unscaled(file)
  return FlowFile(kind, file)


def find_kind(path: str | os.PathLike) -> str:
  """The kind of a file, by its header; "" for one of none of them."""
  return _kind(tensor_files.open_file(pathlib.Path(path)).tensors)


def _kind(tensors: Iterable[str]) -> str:
  own = {name.removeprefix(original_flow.PREFIX) for name in tensors}
  return next((name for name, kind in KINDS.items() if kind.tells in own), "")
