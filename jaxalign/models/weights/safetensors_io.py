"""Reads and writes one component of a model: a folder with `config.json` and safetensors files.

Arrays are float32, whatever precision they are stored in. They are opened as `LazyArray`s, so that
the caller decides on which devices, and how sharded, they are read; or read as numpy arrays.
"""

import os
import pathlib
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from flax import traverse_util

from jaxalign import checks, files
from jaxalign.models.weights import lazy, names, tensor_files
from jaxalign.types import Params

Tensors = Mapping[str, lazy.LazyArray]  # of a file, by name
OwnTensors = Callable[[Tensors, Collection[str]], Tensors]

WEIGHTS, TEXT_WEIGHTS = tensor_files.WEIGHTS, tensor_files.TEXT_WEIGHTS

_DIVERGED = "nothing is written: the training has diverged; take an earlier checkpoint"


def read_component(folder: str | os.PathLike, expected: Params) -> dict:
  """The weights of one component as numpy arrays, see `open_component`."""
  return jax.tree.map(np.asarray, open_component(folder, expected))


def open_component(
  folder: str | os.PathLike,
  expected: Params,
  *,
  others: bool = False,
  own: OwnTensors | None = None,
) -> dict:
  """Opens the weights of one component, in one file or in several that an index lists.

  Args:
    folder: holds `diffusion_pytorch_model.safetensors` or `model.safetensors`, or its index, or
      else the `.fp16` or `.bf16` variant of one.
    expected: the tree to fill; leaves are anything with a shape.
    others: whether other networks may be in the file (a head, an image encoder); they are left out
      with a warning.
    own: what the file's tensors are here, where they are not ours as they stand; it is given the
      names that are expected too.

  Returns:
    A nested dict like `expected`, of `LazyArray`s.

  Raises:
    ValueError: no such file, quantised weights, or tensors that are missing, unexpected or of
      another shape.
  """
  file = tensor_files.open_folder(folder)
  tensor_files.check_unscaled(file)
  shapes = torch_shapes(expected)
  found = file.tensors if own is None else own(file.tensors, shapes)
  tensors = names.canonical(str(file.path), found, shapes)
  if others:
    tensors = _without_others(file.path, tensors, shapes)
  return to_tree(f"{file.path} does not fit its config.json", tensors, expected)


def _without_others(
  file: pathlib.Path, tensors: Mapping[str, lazy.LazyArray], expected: Collection[str]
) -> dict[str, lazy.LazyArray]:
  """The tensors of modules that the network has at its top, or right below, as some files do."""
  own = {part for name in expected for part in name.split(".")[:2]}
  left_out = [name for name in tensors if name.split(".")[0] not in own]
  if left_out:
    warnings.warn(
      f"{file}: {len(left_out)} tensors of other networks are left out: {checks.first(left_out)}",
      stacklevel=2,
    )
  return {name: array for name, array in tensors.items() if name not in left_out}


def to_tree(misfit: str, tensors: Mapping[str, lazy.LazyArray], expected: Params) -> dict:
  """The tree like `expected` of tensors under their PyTorch names.

  Raises ValueError, beginning with `misfit`, unless names and shapes are those expected.
  """
  check_shapes(misfit, torch_shapes(expected), {n: array.shape for n, array in tensors.items()})
  tree = {
    path: names.from_torch(path, tensors[names.torch_name(path)])
    for path in traverse_util.flatten_dict(expected)
  }
  return traverse_util.unflatten_dict(tree)


def torch_shapes(tree: Params) -> dict[str, tuple[int, ...]]:
  """The shape on disk of every leaf, by PyTorch name."""
  return {
    names.torch_name(path): names.torch_shape(path, leaf.shape)
    for path, leaf in traverse_util.flatten_dict(tree).items()
  }


def write_component(
  folder: str | os.PathLike, tree: Params, config: Mapping[str, Any], filename: str = WEIGHTS
) -> None:
  """Writes `config.json` and the float32 weights; what was there stays whole until replaced."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  write_tensors(folder / filename, to_tensors(tree))
  files.write_json(folder / "config.json", config)


def to_tensors(tree: Params) -> dict[str, np.ndarray]:
  """The tensors of a tree under their PyTorch names and in their layout."""
  return {
    names.torch_name(path): names.to_torch(path, np.asarray(array))
    for path, array in traverse_util.flatten_dict(tree).items()
  }


def write_tensors(file: str | os.PathLike, tensors: Mapping[str, np.ndarray]) -> None:
  """Writes a safetensors file of float32 tensors in place of the one that may be there.

  Raises ValueError, naming the tensor, for a NaN or an inf; nothing is written then.
  """
  contiguous = {
    name: np.asarray(array, np.float32, order="C")  # np.ascontiguousarray gives a scalar an axis
    for name, array in tensors.items()
  }
  for name, array in contiguous.items():
    checks.check_finite(f"{file}: {name}", array, _DIVERGED)
  with files.replacing(file) as temporary:
    # transformers refuses a file whose metadata do not say which framework's layout it has.
    safetensors.numpy.save_file(contiguous, temporary, metadata={"format": "pt"})


def check_shapes(
  misfit: str, expected: Mapping[str, tuple], found: Mapping[str, tuple]
) -> None:
  """Raises ValueError, which lists everything, unless names and shapes are those expected."""
  missing = sorted(expected.keys() - found.keys())
  unexpected = sorted(found.keys() - expected.keys())
  misshapen = [
    f"{name} {found[name]} instead of {expected[name]}"
    for name in sorted(expected.keys() & found.keys())
    if expected[name] != found[name]
  ]
  kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
  problems = [
    f"{len(which)} {kind}: {checks.first(which)}" for kind, which in kinds.items() if which
  ]
  if problems:
    raise ValueError(
      f"{misfit} ({len(expected)} tensors expected, {len(found)} found).\n"
      f"{'; '.join(problems)}.\nCheck that both come from the same model."
    )

