"""Tensors by name in safetensors files: one file, or several that an index lists.

Only headers are read here; the tensors are `LazyArray`s in the layout of the file.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import safetensors

from jaxalign import files
from jaxalign.models.weights import lazy

WEIGHTS = "diffusion_pytorch_model.safetensors"  # the name diffusers looks for
TEXT_WEIGHTS = "model.safetensors"  # the name transformers looks for
# Of an adapter: the name diffusers looks for, and PEFT's, whose configuration lies beside it.
LORA_WEIGHTS, PEFT_WEIGHTS = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
INDEX_SUFFIX = ".safetensors.index.json"

# Full precision first; the others are converted when read.
_VARIANTS = ("", ".fp16", ".bf16")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


class TensorFile(NamedTuple):
  """The header of a safetensors file.

  Attributes:
    path: of the file.
    tensors: by name.
    metadata: text by name, {} if there is none.
  """

  path: pathlib.Path
  tensors: dict[str, lazy.LazyArray]
  metadata: dict[str, str]


def open_file(path: str | os.PathLike) -> TensorFile:
  """Reads the header; ValueError for a file that is cut short or something else."""
  path = pathlib.Path(path)
  if path.suffix in PICKLES:
    raise pickle_error(os.fspath(path))
  if not path.is_file():
    raise ValueError(f"expected the weights {path}, found no such file")
  opened_as = _identity(path)

  def array(name, shape):
    return lazy.LazyArray(
      shape, lambda index: _read(path, opened_as, name, index), f"{path}: {name}"
    )

  try:
    with safetensors.safe_open(path, framework="numpy") as stored:
      tensor_names = stored.keys()
      shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in tensor_names}
      metadata = stored.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is cut short or no safetensors file ({error}); download it again"
    ) from None
  return TensorFile(path, {name: array(name, shapes[name]) for name in shapes}, metadata)


def _read(path: pathlib.Path, opened_as: tuple, name: str, index: lazy.Index) -> np.ndarray:
  if _identity(path) != opened_as:
    raise ValueError(f"{path} has changed since it was opened; start again")
  # Opened for every read: pages of a mapping that stays count as this process's memory, and after
  # the last tensor that would be the whole file once more.
  with safetensors.safe_open(path, framework="numpy") as stored:
    return stored.get_slice(name)[index] if index else stored.get_tensor(name)


def _identity(path: pathlib.Path) -> tuple[int, ...]:
  status = path.stat()
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_folder(folder: str | os.PathLike) -> TensorFile:
  """All tensors of a component's folder, from its file or from the shards that its index lists."""
  path = find_weights(folder)
  return _open_shards(path) if path.suffix == ".json" else open_file(path)


def find_weights(folder: str | os.PathLike) -> pathlib.Path:
  """The weight file of a component's folder, or the index of several; ValueError for neither."""
  folder = pathlib.Path(folder)
  for variant in _VARIANTS:
    for name in (WEIGHTS, TEXT_WEIGHTS):
      stem = name.removesuffix(".safetensors")
      for file in (f"{stem}{variant}.safetensors", _index_name(stem, variant)):
        if (folder / file).is_file():
          return folder / file
  pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
  if pickles:
    raise pickle_error(f"expected {WEIGHTS} or {TEXT_WEIGHTS} in {folder}, found only {pickles[0]}")
  raise ValueError(
    f"no weights: expected {folder / WEIGHTS} (or {TEXT_WEIGHTS}), found "
    f"{'neither' if folder.is_dir() else 'no such folder'}; check the path or download it again"
  )


def _index_name(stem: str, variant: str) -> str:
  return f"{stem}.safetensors.index{variant}.json"


def _open_shards(index: pathlib.Path) -> TensorFile:
  weight_map = files.read_json(index).get("weight_map")
  if (
    not isinstance(weight_map, Mapping)
    or not weight_map
    or not all(isinstance(name, str) for name in weight_map.values())
  ):
    raise ValueError(f"{index}: expected a 'weight_map' from tensors to files, found none")
  shards = {}
  for name in sorted(set(weight_map.values())):
    if not (index.parent / name).is_file():
      count = sum(shard == name for shard in weight_map.values())
      raise ValueError(
        f"{index} lists {name} for {count} tensors, found no such file beside it; download it again"
      )
    shards[name] = open_file(index.parent / name)
  tensors = {}
  for tensor, name in weight_map.items():
    if tensor not in shards[name].tensors:
      raise ValueError(f"{index}: expected {tensor} in {name}, found none; download both again")
    tensors[tensor] = shards[name].tensors[tensor]
  return TensorFile(index, tensors, {})


def pickle_error(found: str) -> ValueError:
  """What to say of a pickle that was `found`."""
  return ValueError(
    f"{found}, a pickle, which can run code when opened.\nConvert it once: load the model with "
    f"diffusers from a source you trust and call save_pretrained(folder, safe_serialization=True)."
  )
