"""Adapter files: the one that diffusers' `load_lora_weights` reads, written and read, others read.

On disk a layer of rank r has `A [r, D_in]` and `B [D_out, r]`, a convolution `A [r, C_in, k, k]`
and `B [C_out, r, 1, 1]`, and is applied as `alpha / r * B @ A`.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from flax import traverse_util

from jaxalign import checks
from jaxalign.models.adapters import lora
from jaxalign.models.weights import (
  lora_match,
  lora_names,
  lora_scales,
  names,
  safetensors_io,
  tensor_files,
)
from jaxalign.types import Params

FILENAME = tensor_files.LORA_WEIGHTS


class LoRAFile(NamedTuple):
  """The adapters in a file.

  adapters: `{component: tree}` as `lora.init` makes them, numpy arrays.
  scales: `{component: {path: alpha / r}}` of every adapted layer.
  unused: the names of tensors that belong to no layer of the model.
  alphas: what says the alphas, and of how many layers.
  """

  adapters: dict[str, dict]
  scales: dict[str, dict[lora_names.Path, float]]
  unused: list[str]
  alphas: dict[str, int]

  def in_words(self) -> str:
    """How many layers of which networks are adapted, and by whose alpha: one line."""
    layers = ", ".join(f"{len(scales)} layers of {name}" for name, scales in self.scales.items())
    if len(self.alphas) == 1:
      return f"{layers}; {next(iter(self.alphas))}"
    return f"{layers}; {', '.join(f'{said} ({count})' for said, count in self.alphas.items())}"

  def at_strength(self, strength: float) -> dict[str, dict]:
    """`{component: tree}`, to be applied as it is: `b` holds `strength * alpha / r`.

    Raises ValueError, naming the layer, where that is too large for float32.
    """
    applied = {}
    for component, adapter in self.adapters.items():
      leaves = traverse_util.flatten_dict(adapter)
      for layer, scale in self.scales[component].items():
        with np.errstate(over="ignore"):
          leaves[(*layer, "b")] = leaves[(*layer, "b")] * np.float32(strength * scale)
        what = f"{lora_names.module_of_component(component, layer)} times {strength * scale:g}"
        checks.check_finite(what, leaves[(*layer, "b")], "apply the adapter at a smaller strength")
      applied[component] = traverse_util.unflatten_dict(leaves)
    return applied


def write(folder: str | os.PathLike, component: str, adapter: Params) -> pathlib.Path:
  """Writes a network's adapter, scale and all, as the file that diffusers reads; returns its path.

  Args:
    folder: holds the file.
    component: what diffusers calls the network, such as "unet".
    adapter: what is added to the network as it is, `b` being `alpha / r` times what was trained.
      Without an alpha in the file every reader applies it as it is, too; many know of no other
      place for one.
  """
  leaves = {path: np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(adapter).items()}
  tensors = {}
  for (*layer, part), array in leaves.items():
    module = lora_names.module_of_component(component, layer)
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
    ValueError: no such file, another kind of adapter, no layer that it fits, wrong shapes, or a
      number that is not finite.
  """
  file = tensor_files.open_file(_find(pathlib.Path(path)))
  where = str(file.path)
  other = lora_names.other_kind(file.tensors)
  if other:
    raise lora_match.refusal(where, f"{other[0]} ({other[1]})")
  match = lora_match.match(where, file.tensors, params)
  layers = {component: dict(lora.adaptable_layers(tree)) for component, tree in params.items()}
  said = lora_scales.configurations(file)
  components = dict.fromkeys(component for component, _ in match.parts)
  adapters: dict[str, dict] = {component: {} for component in components}
  scales: dict[str, dict] = {component: {} for component in components}
  alphas: dict[str, int] = {}
  for (component, layer), found in match.parts.items():
    name = lora_names.module_of_component(component, layer)
    arrays = {part: np.asarray(file.tensors[tensor]) for part, tensor in found.items()}
    leaf = _to_leaf(f"{where}: {name}", layers[component][layer]["kernel"].shape, arrays)
    rank = leaf["b"].shape[0]
    if "alpha" in arrays:
      alpha, source = _single(f"{where}: {found['alpha']}", arrays["alpha"]), "alpha by its tensors"
    else:
      alpha, source = lora_scales.alpha(said.get(component, said.get("")), layer, rank)
    alphas[source] = alphas.get(source, 0) + 1
    adapters[component] |= {(*layer, part): array for part, array in leaf.items()}
    scales[component][layer] = alpha / rank
  trees = {name: traverse_util.unflatten_dict(leaves) for name, leaves in adapters.items()}
  return LoRAFile(trees, scales, match.unused, alphas)


def _find(path: pathlib.Path) -> pathlib.Path:
  """The adapter file that `path` is or holds."""
  path = path.expanduser()
  if not path.is_dir():
    return path
  for name in (FILENAME, tensor_files.PEFT_WEIGHTS):
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


def _to_leaf(
  where: str, kernel_shape: tuple[int, ...], found: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
  """`{"a": [..., r], "b": [r, D_out]}` of one layer, from the two tensors of a file."""
  if not {"a", "b"} <= found.keys():
    raise ValueError(f"{where} has only one of its two matrices; the file is incomplete")
  rank = found["a"].shape[0] if found["a"].ndim else 0
  if not rank:
    raise ValueError(f"{where}: expected a rank of at least 1, found shape {found['a'].shape}")
  out, *inputs = names.torch_shape(("kernel",), kernel_shape)
  expected = {"a": (rank, *inputs), "b": (out, rank)}
  for part, shape in expected.items():
    if lora_match.without_units(found[part].shape) != lora_match.without_units(shape):
      raise ValueError(
        f"{where} does not fit the layer: expected matrices {expected['a']} and {expected['b']}, "
        f"found {found['a'].shape} and {found['b'].shape}; is it for another model?"
      )
  a = names.from_torch(("kernel",), found["a"].reshape(expected["a"]))
  return {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(found["b"].reshape(out, rank).T)}


def _single(where: str, alpha: np.ndarray) -> float:
  if alpha.size != 1:
    raise ValueError(f"{where}: expected one number, found shape {alpha.shape}")
  return float(alpha.item())
