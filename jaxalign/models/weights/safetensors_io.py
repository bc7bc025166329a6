"""Reads and writes one component of a model: a folder with `config.json` and a safetensors file.

Arrays are read into host memory as float32 numpy arrays, so that the caller decides on which
devices, and how sharded, they go.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from jaxalign import files
from jaxalign.models.weights import names
from jaxalign.types import Params

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name diffusers looks for
TEXT_WEIGHTS = "model.safetensors"  # the name transformers looks for

_PICKLES = ("*.bin", "*.ckpt", "*.pt", "*.pth")
_NUM_LISTED = 5


def read_component(folder: str | os.PathLike, expected: Params) -> dict:
  """Reads the weights of one component, whatever precision they are stored in, as float32.

  Args:
    folder: holds `diffusion_pytorch_model.safetensors` or `model.safetensors`, or else the
      `.fp16.safetensors` variant of one.
    expected: the tree to fill; leaves are anything with a shape.

  Returns:
    A nested dict like `expected`, of float32 numpy arrays.
  """
  file = find_weights(folder)
  paths = traverse_util.flatten_dict(expected)
  path_of = {names.torch_name(path): path for path in paths}
  shape_of = {name: names.torch_shape(path, paths[path].shape) for name, path in path_of.items()}
  with _open(file) as stored:
    stored_as = _stored_names(stored.keys(), shape_of)
    found = {name: tuple(stored.get_slice(key).get_shape()) for name, key in stored_as.items()}
    _check_shapes(file, shape_of, found)
    tree = {
      path: _float32(names.from_torch(path, stored.get_tensor(stored_as[name])))
      for name, path in path_of.items()
    }
  return traverse_util.unflatten_dict(tree)


def write_component(
  folder: str | os.PathLike, tree: Params, config: Mapping[str, Any], filename: str = WEIGHTS
) -> None:
  """Writes `config.json` and the float32 weights; what was there stays whole until replaced."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tensors = {
    names.torch_name(path): _float32(names.to_torch(path, np.asarray(array)))
    for path, array in traverse_util.flatten_dict(tree).items()
  }
  with files.replacing(folder / filename) as temporary:
    # transformers refuses a file whose metadata do not say which framework's layout it has.
    safetensors.numpy.save_file(tensors, temporary, metadata={"format": "pt"})
  files.write_json(folder / "config.json", config)


def find_weights(folder: str | os.PathLike) -> pathlib.Path:
  """The weight file of a component's folder; ValueError if there is none that can be read."""
  folder = pathlib.Path(folder)
  variants = [name.replace(".safetensors", ".fp16.safetensors") for name in (WEIGHTS, TEXT_WEIGHTS)]
  for name in (WEIGHTS, TEXT_WEIGHTS, *variants):
    if (folder / name).is_file():
      return folder / name
  pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
  if pickles:
    raise ValueError(
      f"expected {WEIGHTS} or {TEXT_WEIGHTS} in {folder}, found only {pickles[0]}, a pickle, which "
      f"can run code when opened.\nConvert it once: load the model with diffusers from a source "
      f"you trust and call save_pretrained(folder, safe_serialization=True)."
    )
  raise ValueError(
    f"no weights: expected {folder / WEIGHTS} (or {TEXT_WEIGHTS}), found "
    f"{'neither' if folder.is_dir() else 'no such folder'}; check the path or download it again"
  )


@contextlib.contextmanager
def _open(file: pathlib.Path) -> Iterator[Any]:
  try:
    with safetensors.safe_open(file, framework="numpy") as stored:
      yield stored
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{file} is cut short or no safetensors file ({error}); download it again"
    ) from None


def _stored_names(keys: list[str], expected: Mapping[str, Any]) -> dict[str, str]:
  """Canonical name -> name in the file; tensors that fit nothing keep their own name."""
  canonical = {key: names.canonical_name(key, expected) for key in keys}
  return {name: key for key, name in canonical.items() if name is not None}


def _check_shapes(file: pathlib.Path, expected: dict[str, tuple], found: dict[str, tuple]) -> None:
  missing = sorted(expected.keys() - found.keys())
  unexpected = sorted(found.keys() - expected.keys())
  misshapen = [
    f"{name} {found[name]} instead of {expected[name]}"
    for name in sorted(expected.keys() & found.keys())
    if expected[name] != found[name]
  ]
  kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
  problems = [f"{len(which)} {kind}: {_first(which)}" for kind, which in kinds.items() if which]
  if problems:
    raise ValueError(
      f"{file} does not fit its config.json ({len(expected)} tensors expected, {len(found)} found)."
      f"\n{'; '.join(problems)}.\nCheck that both files come from the same model."
    )


def _first(entries: list[str]) -> str:
  more = len(entries) - _NUM_LISTED
  return ", ".join(entries[:_NUM_LISTED]) + (f", and {more} more" if more > 0 else "")


def _float32(array: np.ndarray) -> np.ndarray:
  return np.asarray(array, np.float32, order="C")  # np.ascontiguousarray gives a scalar an axis
