"""Adapter files: the one that diffusers' `load_lora_weights` reads, written and read, others read.

On disk a layer of rank r has `A [r, D_in]` and `B [D_out, r]`, a convolution `A [r, C_in, k, k]`
and `B [C_out, r, 1, 1]`, and is applied as `alpha / r * B @ A`.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util

from jaxalign import files
from jaxalign.models.adapters import lora
from jaxalign.models.weights import lora_names, names, safetensors_io, tensor_files
from jaxalign.types import Params

FILENAME = "pytorch_lora_weights.safetensors"  # the name diffusers looks for
_PEFT_FILENAME, _PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_METADATA = "lora_adapter_metadata"  # diffusers' key, in the file's header


class LoRAFile(NamedTuple):
  """The adapters in a file.

  adapters: `{component: tree}` as `lora.init` makes them, numpy arrays.
  scales: `{component: {path: alpha / r}}` of every adapted layer.
  unused: the names of tensors that belong to no layer of the model.
  """

  adapters: dict[str, dict]
  scales: dict[str, dict[lora_names.Path, float]]
  unused: list[str]

  def at_strength(self, strength: float) -> dict[str, dict]:
    """`{component: tree}`, to be applied as it is: `b` holds `strength * alpha / r`."""
    applied = {}
    for component, adapter in self.adapters.items():
      leaves = traverse_util.flatten_dict(adapter)
      for layer, scale in self.scales[component].items():
        leaves[(*layer, "b")] = leaves[(*layer, "b")] * np.float32(strength * scale)
      applied[component] = traverse_util.unflatten_dict(leaves)
    return applied


def write(folder: str | os.PathLike, adapter: Params) -> pathlib.Path:
  """Writes a UNet's adapter, scale and all, as the file that diffusers reads, and returns its path.

  `adapter` is what is added to the network as it is, `b` being `alpha / r` times what was trained.
  Without an alpha in the file every reader applies it as it is, too; many know of no other place
  for one.
  """
  leaves = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(adapter).items()}
  tensors = {}
  for (*layer, part), array in leaves.items():
    module = lora_names.module_of_component("unet", layer)
    if part == "a":
      tensors[f"{module}.lora_A.weight"] = names.to_torch(("kernel",), array)
    else:
      window = leaves[(*layer, "a")].ndim - 2
      tensors[f"{module}.lora_B.weight"] = array.T.reshape(array.shape[::-1] + (1,) * window)
  path = pathlib.Path(folder) / FILENAME
  safetensors_io.write_tensors(path, tensors)
  return path


def read(path: str | os.PathLike, params: Mapping[str, Params]) -> LoRAFile:
  """Reads the adapters of a file, whoever wrote it.

  Args:
    path: the file, or a folder that holds it.
    params: `{component: parameters}` of the networks to adapt, arrays or shapes.

  Raises:
    ValueError: no such file, another kind of adapter, no layer that it fits, or wrong shapes.
  """
  file = tensor_files.open_file(_find(pathlib.Path(path)))
  kind = lora_names.other_kind(file.tensors)
  if kind:
    raise ValueError(f"{file.path} holds {kind} adapters; only plain LoRA can be applied")
  layers = {component: dict(lora.adaptable_layers(tree)) for component, tree in params.items()}
  parts, unused = _sort(file, layers)
  if not parts:
    few = safetensors_io.first(sorted(file.tensors)) or "none"
    raise ValueError(
      f"{file.path} fits no layer of this model ({', '.join(params)})\nits tensors: {few}"
    )
  adapters: dict[str, dict] = {component: {} for component, _ in parts}
  scales: dict[str, dict] = {component: {} for component, _ in parts}
  configurations = _configurations(file)
  for (component, layer), found in parts.items():
    name = lora_names.module_of_component(component, layer)
    kernel_shape = layers[component][layer]["kernel"].shape
    leaf = _to_leaf(f"{file.path}: {name}", kernel_shape, found)
    rank = leaf["b"].shape[0]
    if "alpha" in found:
      alpha = found["alpha"].item()
    else:
      alpha = _alpha(configurations.get(component, {}), lora_names.module_name(layer), rank)
    adapters[component] |= {(*layer, part): array for part, array in leaf.items()}
    scales[component][layer] = alpha / rank
  trees = {name: traverse_util.unflatten_dict(leaves) for name, leaves in adapters.items()}
  return LoRAFile(trees, scales, unused)


def _find(path: pathlib.Path) -> pathlib.Path:
  """The adapter file that `path` is or holds."""
  path = path.expanduser()
  if not path.is_dir():
    return path
  for name in (FILENAME, _PEFT_FILENAME):
    if (path / name).is_file():
      return path / name
  found = sorted(path.glob("*.safetensors"))
  if len(found) != 1:
    pickles = [file for file in sorted(path.iterdir()) if file.suffix in tensor_files.PICKLES]
    if pickles and not found:
      raise tensor_files.pickle_error(os.fspath(pickles[0]))
    listed = f"{len(found)} .safetensors files" if found else "no .safetensors file"
    raise ValueError(f"expected {path / FILENAME}, found {listed} in the folder")
  return found[0]


def _sort(
  file: tensor_files.TensorFile, layers: Mapping[str, Mapping[lora_names.Path, Params]]
) -> tuple[dict[tuple[str, lora_names.Path], dict[str, np.ndarray]], list[str]]:
  """The parts of each layer by (component, path), and the names that belong to no layer."""
  known = {name: lora_names.layer_paths(name, paths) for name, paths in layers.items()}
  parts: dict[tuple[str, lora_names.Path], dict[str, np.ndarray]] = {}
  unused = []
  for name, array in file.tensors.items():
    entry = lora_names.parse(name)
    layer = known.get(entry.component, {}).get(entry.layer) if entry else None
    if entry is None or layer is None:
      unused.append(name)
    else:
      parts.setdefault((entry.component, layer), {})[entry.part] = np.asarray(array)
  return parts, unused


def _to_leaf(
  where: str, kernel_shape: tuple[int, ...], found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """`{"a": [..., r], "b": [r, D_out]}` of one layer, from the two tensors of a file."""
  if not {"a", "b"} <= found.keys():
    raise ValueError(f"{where} has only one of its two matrices; the file is incomplete")
  rank = len(found["a"])
  out, *inputs = names.torch_shape(("kernel",), kernel_shape)
  expected = {"a": (rank, *inputs), "b": (out, rank)}
  for part, shape in expected.items():
    if _without_units(found[part].shape) != _without_units(shape):
      raise ValueError(
        f"{where} does not fit the layer: expected matrices {expected['a']} and {expected['b']}, "
        f"found {found['a'].shape} and {found['b'].shape}; is it for another model?"
      )
  a = names.from_torch(("kernel",), found["a"].reshape(expected["a"]))
  return {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(found["b"].reshape(out, rank).T)}


def _without_units(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape without trailing ones: 1 x 1 convolutions are stored as matrices and vice versa."""
  while shape and shape[-1] == 1:
    shape = shape[:-1]
  return shape


def _configurations(file: tensor_files.TensorFile) -> dict[str, dict[str, Any]]:
  """PEFT's configuration of each component's adapter, of those that came with the file."""
  if _METADATA in file.metadata:
    try:
      entries = dict(json.loads(file.metadata[_METADATA]))
    except (ValueError, TypeError):
      raise ValueError(f"{file.path}: its {_METADATA} is no JSON object; save it again") from None
    found: dict[str, dict[str, Any]] = {}
    for name, value in entries.items():
      component, _, field = name.partition(".")
      found.setdefault(component, {})[field] = value
    return found
  if file.path.name == _PEFT_FILENAME and (file.path.parent / _PEFT_CONFIG).is_file():
    return {"unet": files.read_json(file.path.parent / _PEFT_CONFIG)}
  return {}


def _alpha(config: Mapping[str, Any], module: str, rank: int) -> float:
  """The alpha that PEFT would give a layer; the rank, for a scale of 1, if nothing else is said."""
  alpha = config.get("lora_alpha", rank)
  for pattern, value in (config.get("alpha_pattern") or {}).items():
    if re.fullmatch(rf"(.*\.)?({pattern})", module):  # the first that fits, by PEFT's own rule
      alpha = value
      break
  return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
