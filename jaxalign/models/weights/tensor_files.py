"""Tensors by name in safetensors files: one file, or several that an index lists.

Only headers are read here; the tensors are `LazyArray`s in the layout of the file.
"""

import json
import os
import pathlib
import re
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from jaxalign import checks, files
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

# What safetensors calls the types that numpy has, and those that ml_dtypes adds to them.
_NUMPY_TYPES = (
  *("F64", "F32", "F16", "BF16", "BOOL"),
  *("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"),
)
_FLOAT8: dict[str, Any] = {
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
  "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
}
# Tensors beside quantised weights, without which these are wrong by a factor.
_SCALES = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|comfy_quant)")


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
  """Reads the header; ValueError for a file that is cut short, of an unknown type, or no such."""
  path = pathlib.Path(path)
  if path.suffix in PICKLES:
    raise pickle_error(os.fspath(path))
  if not path.is_file():
    raise ValueError(f"expected the weights {path}, found no such file")
  opened_as = _identity(path)

  def array(name, shape):
    where = f"{path}: {name}"
    if types[name] in _FLOAT8:
      stored = Float8(_FLOAT8[types[name]], shape, offsets[name])
      return lazy.LazyArray(
        shape, lambda index: _read_float8(path, opened_as, stored, index), where
      )
    return lazy.LazyArray(shape, lambda index: _read(path, opened_as, name, index), where)

  try:
    with safetensors.safe_open(path, framework="numpy") as stored:
      tensor_names = stored.keys()
      shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in tensor_names}
      types = {name: stored.get_slice(name).get_dtype() for name in tensor_names}
      metadata = stored.metadata() or {}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is cut short or no safetensors file ({error}); download it again"
    ) from None
  unknown = next((name for name in types if types[name] not in (*_NUMPY_TYPES, *_FLOAT8)), None)
  if unknown is not None:
    raise ValueError(
      f"{path}: expected weights in float32, half precision or float8, found "
      f"{checks.cut(unknown, 100)} in {types[unknown]}\ntake another variant of the file"
    )
  offsets = _offsets(path) if not _FLOAT8.keys().isdisjoint(types.values()) else {}
  return TensorFile(path, {name: array(name, shapes[name]) for name in shapes}, metadata)


class Float8(NamedTuple):
  """Where a tensor of float8 lies in its file, which safetensors does not read into numpy."""

  dtype: Any
  shape: tuple[int, ...]
  offset: int


def _offsets(path: pathlib.Path) -> dict[str, int]:
  """Where each tensor begins, in bytes; the header itself has been found to be right before."""
  with path.open("rb") as stored:
    length = int.from_bytes(stored.read(8), "little")
    header = json.loads(stored.read(length))
  header.pop("__metadata__", None)
  return {name: 8 + length + entry["data_offsets"][0] for name, entry in header.items()}


def _read_float8(
  path: pathlib.Path, opened_as: tuple, stored: Float8, index: lazy.Index
) -> np.ndarray:
  """The part at an index, exactly, in float32; of the file no more than that part is read."""
  _check_unchanged(path, opened_as)
  if 0 in stored.shape:
    return np.zeros(stored.shape, np.float32)[index]
  bytes_ = np.memmap(path, np.uint8, "r", stored.offset, stored.shape or (1,))
  part = np.array(bytes_[index] if index else bytes_.reshape(stored.shape))
  return part.view(stored.dtype).astype(np.float32)


def check_unscaled(file: TensorFile) -> None:
  """Raises ValueError for quantised weights, which have their scales beside them."""
  scale = next((name for name in file.tensors if _SCALES.fullmatch(name)), None)
  if scale is not None:
    raise ValueError(
      f"{file.path}: expected weights as they are computed with, found {checks.cut(scale, 100)}, a "
      "scale or mark of quantised ones\ntake the file in float32, half precision or plain float8"
    )


def _read(path: pathlib.Path, opened_as: tuple, name: str, index: lazy.Index) -> np.ndarray:
  _check_unchanged(path, opened_as)
  # Opened for every read: pages of a mapping that stays count as this process's memory, and after
  # the last tensor that would be the whole file once more.
  with safetensors.safe_open(path, framework="numpy") as stored:
    return stored.get_slice(name)[index] if index else stored.get_tensor(name)


def _check_unchanged(path: pathlib.Path, opened_as: tuple) -> None:
  if _identity(path) != opened_as:
    raise ValueError(f"{path} has changed since it was opened; start again")


def _identity(path: pathlib.Path) -> tuple[int, ...]:
  status = path.stat()
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def open_folder(folder: str | os.PathLike) -> TensorFile:
  """All tensors of a component's folder, from its file or from the shards that its index lists."""
  path = find_weights(folder)
  return _open_shards(path) if path.suffix == ".json" else open_file(path)


def find_weights(folder: str | os.PathLike) -> pathlib.Path:
  """The weight file of a component's folder, or the index of several.

  Of a variant other than half precision only if it is the only one there. Raises ValueError for
  neither, or several.
  """
  folder = pathlib.Path(folder)
  found = _find_known(folder)
  if found is not None:
    return found
  others = _other_variants(folder)
  if len(others) == 1:
    return next(iter(others.values()))
  if others:
    raise ValueError(
      f"{folder}: expected {WEIGHTS} or one variant of it, found {checks.first(sorted(others))}\n"
      "keep one of them, or give one the plain name"
    )
  pickles = sorted(file.name for file in folder.glob("*") if file.suffix in PICKLES)
  if pickles:
    raise pickle_error(f"expected {WEIGHTS} or {TEXT_WEIGHTS} in {folder}, found only {pickles[0]}")
  raise ValueError(
    f"no weights: expected {folder / WEIGHTS} (or {TEXT_WEIGHTS}), found "
    f"{'neither' if folder.is_dir() else 'no such folder'}; check the path or download it again"
  )


def copy_component(source: str | os.PathLike, target: str | os.PathLike) -> None:
  """Copies the config and the weights of a component, these under the names of no variant.

  What lies there is replaced file by file; copying a folder onto itself does nothing.
  Raises ValueError if there are no weights.
  """
  source, target = pathlib.Path(source), pathlib.Path(target)
  path = find_weights(source)
  target.mkdir(parents=True, exist_ok=True)
  if source.resolve() == target.resolve():
    return
  stem = next(name for name in (WEIGHTS, TEXT_WEIGHTS) if path.name.startswith(name.split(".")[0]))
  copies = {"config.json": "config.json"}
  if path.suffix == ".json":
    copies |= {name: name for name in sorted(set(files.read_json(path)["weight_map"].values()))}
    copies[path.name] = f"{stem.removesuffix('.safetensors')}{INDEX_SUFFIX}"
  else:
    copies[path.name] = stem
  for name, plain in copies.items():
    with files.replacing(target / plain) as temporary:
      shutil.copyfile(source / name, temporary)


def find_other_variant(folder: str | os.PathLike) -> str:
  """The name of the variant that `find_weights` takes for want of others; "" for the usual ones."""
  folder = pathlib.Path(folder)
  others = {} if _find_known(folder) else _other_variants(folder)
  return next(iter(others)) if len(others) == 1 else ""


def _find_known(folder: pathlib.Path) -> pathlib.Path | None:
  for variant in _VARIANTS:
    for name in (WEIGHTS, TEXT_WEIGHTS):
      stem = name.removesuffix(".safetensors")
      for file in (f"{stem}{variant}.safetensors", f"{stem}.safetensors.index{variant}.json"):
        if (folder / file).is_file():
          return folder / file
  return None


def _other_variants(folder: pathlib.Path) -> dict[str, pathlib.Path]:
  """Files, or indexes of several, by the name of their variant."""
  found = {}
  for name in (WEIGHTS, TEXT_WEIGHTS):
    stem = re.escape(name.removesuffix(".safetensors"))
    single = re.compile(rf"{stem}\.(\w+)\.safetensors|{stem}\.safetensors\.index\.(\w+)\.json")
    for file in sorted(folder.glob("*")):
      match = single.fullmatch(file.name)
      if match:
        found[match[1] or match[2]] = file
  return found


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
