"""The mechanical rule between a tree's path and the name of the same tensor in PyTorch.

  ("down_blocks_0", "resnets_1", "conv1", "kernel")  <->  "down_blocks.0.resnets.1.conv1.weight"

A list index is joined to the name of its list. The layout is decided by the tree: a leaf `kernel`
of rank 2 is `[in, out]` here and `[out, in]` on disk, of rank 4 `[k, k, in, out]` here and
`[out, in, k, k]` on disk; every other leaf is stored as it is.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import TypeVar

import numpy as np

from jaxalign.models.weights import lazy

_Array = TypeVar("_Array", np.ndarray, lazy.LazyArray)

# What is a list in PyTorch. "linear_1" or "norm_2", say, are ordinary names, so an underscore and a
# digit alone do not tell.
_LISTS = frozenset(
  {
    "adaLN_modulation",
    "attentions",
    "block",
    "cap_embedder",
    "context_refiner",
    "down_blocks",
    "downsamplers",
    "img_mod",
    "layer",
    "layers",
    "mlp",
    "net",
    "noise_refiner",
    "resample",
    "resnets",
    "single_transformer_blocks",
    "to_out",
    "transformer_blocks",
    "txt_mod",
    "up_blocks",
    "upsamplers",
  }
)

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight"}

# The first autoencoders of Stable Diffusion were published with these names in their attention.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_ATTENTION_NAME = re.compile(r"(.*attentions\.\d+\.)(query|key|value|proj_attn)(\.\w+)")

# What wrappers put into names: torch.compile, FullyShardedDataParallel and checkpointed activations
# before any module, DistributedDataParallel and DeepSpeed before all.
_WRAPPERS = re.compile(
  r"(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]|(?:^|(?<=\.))module\."
)

_TEXT_PREFIX = "text_model."
# Of a T5, whose encoder and decoder share a table, files hold it under one name or under both.
_TIED = {"encoder.embed_tokens.weight": "shared.weight"}
# Constants that older transformers stored with the weights, and a count of training steps.
_BUFFERS = ("position_ids", "num_batches_tracked")


def torch_name(path: Sequence[str]) -> str:
  """The PyTorch name of the leaf at `path`."""
  *modules, leaf = path
  return ".".join([*(_module_name(module) for module in modules), _LEAVES.get(leaf, leaf)])


def _module_name(module: str) -> str:
  base, _, index = module.rpartition("_")
  return f"{base}.{index}" if base in _LISTS and index.isdigit() else module


def canonical_name(name: str, expected: Collection[str]) -> str | None:
  """The entry of `expected` that the tensor stored as `name` stands for.

  Returns None for a buffer, which is no weight, and `name` itself when nothing expected fits.
  """
  for spelling in (name, unwrapped(name)):
    found = _known_name(spelling, expected)
    if found is None or found in expected:
      return found
  return name


def canonical(
  where: str, tensors: Mapping[str, _Array], expected: Collection[str]
) -> dict[str, _Array]:
  """The tensors of a file by `canonical_name`, without buffers.

  Raises ValueError, which starts with `where`, if two stand for one.
  """
  stored: dict[str, str] = {}
  for name in tensors:
    new = canonical_name(name, expected)
    if new is None or (new != name and new == _TIED.get(name) and new in tensors):
      continue
    if new in stored:
      raise ValueError(f"{where}: expected each weight once, found {stored[new]} and {name}")
    stored[new] = name
  return {new: tensors[name] for new, name in stored.items()}


def unwrapped(name: str) -> str:
  """The name of a tensor, or the beginning of one, without what wrappers of modules put into it."""
  return _WRAPPERS.sub("", name)


def _known_name(name: str, expected: Collection[str]) -> str | None:
  if name.rpartition(".")[2] in _BUFFERS:
    return None
  if name in expected:
    return name
  if _TIED.get(name) in expected:
    return _TIED[name]
  # transformers 5 writes text encoders without the prefix that published files have.
  if _TEXT_PREFIX + name in expected:
    return _TEXT_PREFIX + name
  old = _OLD_ATTENTION_NAME.fullmatch(name)
  if old:
    renamed = old[1] + _OLD_ATTENTION[old[2]] + old[3]
    return renamed if renamed in expected else name
  return name


def torch_shape(path: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
  """The shape on disk of the leaf at `path`, whose shape here is `shape`."""
  if path[-1] != "kernel":
    return tuple(shape)
  *window, features_in, features_out = shape
  return (features_out, features_in, *window)


def to_torch(path: Sequence[str], array: np.ndarray) -> np.ndarray:
  """The leaf at `path` in the layout on disk."""
  if path[-1] != "kernel":
    return array
  return np.moveaxis(array, (-1, -2), (0, 1))


def from_torch(path: Sequence[str], array: _Array) -> _Array:
  """The inverse of `to_torch`, of an array in memory or in a file."""
  if path[-1] != "kernel":
    return array
  return array.transpose((*range(2, array.ndim), 1, 0))
