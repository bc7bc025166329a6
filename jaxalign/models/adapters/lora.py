"""Low-rank adapters as a tree of their own, beside the parameters they adapt.

A layer computes `x @ kernel + (x @ a) @ b`; `a` and `b` lie in the variable collection "lora" at
the path of the layer (`layers.Dense`, `layers.Conv`):

  apply({"params": params, "lora": lora.scaled(adapter, alpha / rank)}, ...)

Only the adapter is trained, so the base network is also the reference, at no memory cost.
Source: Hu et al. 2021, arXiv:2106.09685, equation 3.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Key, Params

# The four projections of every attention of a UNet, what diffusers' own LoRA recipes train.
ATTENTION = r"(to_q|to_k|to_v|to_out_0)$"


def init(key: Key, params: Params, *, rank: int, targets: str) -> dict:
  """A fresh adapter, which changes nothing yet: `a` is random and `b` is zero.

  `a` is uniform in `+-1 / sqrt(fan_in)` (Kaiming uniform with slope sqrt(5), what PEFT uses).
  The key of a layer depends on its path alone: another target leaves the other adapters as they
  are.

  Args:
    key: folded with each path.
    params: the base network, `[D_in, D_out]` or `[k, k, C_in, C_out]` kernels; arrays or shapes.
    rank: r, of every adapted layer.
    targets: regular expression, searched for in the slash-joined path of each layer, for example
      `ATTENTION`, or `down_blocks_0/.*attn2/to_k$`.

  Returns:
    Nested dict with `a [D_in, r]`, `b [r, D_out]` at a linear layer and `a [k, k, C_in, r]`,
    `b [r, C_out]` at a convolution, float32.
  """
  if rank < 1:
    raise ValueError(f"expected a LoRA rank of at least 1, got {rank}")
  matching = match(["/".join(path) for path, _ in adaptable_layers(params)], targets)
  adapter: dict[str, Any] = {}
  for path, layer in adaptable_layers(params):
    if "/".join(path) in matching:
      node = adapter
      for part in path:
        node = node.setdefault(part, {})
      node.update(_fresh(_layer_key(key, path), layer["kernel"].shape, rank))
  return adapter


def match(paths: Sequence[str], targets: str) -> set[str]:
  """The paths in which the regular expression `targets` is found; ValueError if there are none."""
  try:
    pattern = re.compile(targets)
  except re.error as error:
    raise ValueError(f"LoRA targets {targets!r} are no regular expression: {error}") from error
  found = {path for path in paths if pattern.search(path)}
  if not found:
    few = ", ".join(paths[:: max(1, len(paths) // 4)][:4])
    raise ValueError(f"LoRA targets {targets!r} match none of {len(paths)} layers, such as: {few}")
  return found


def scaled(lora: Params, scale: float | Array) -> dict:
  """The adapter at another strength: every `b` times `scale`.

  Train with `scale = alpha / rank`; sample with any strength, 0 being the base network.
  """
  return _map_adapters(lora, lambda leaf: {"a": leaf["a"], "b": leaf["b"] * scale})


def merge(params: Params, lora: Params) -> dict:
  """Parameters with the adapter folded in, `kernel + a @ b`, for export and fast sampling.

  Not for training: the gradient through it forms the full kernel's.
  Leaves that have no adapter are shared with `params`.
  """
  merged = dict(params)
  if _is_adapter(lora):
    if "kernel" not in params:
      raise ValueError(f"expected a layer with a kernel under the adapter, found {sorted(params)}")
    kernel = params["kernel"]
    merged["kernel"] = (kernel + lora["a"] @ lora["b"]).astype(kernel.dtype)
    return merged
  for name, node in lora.items():
    if name not in params:
      few = ", ".join(sorted(params)[:4])
      raise ValueError(f"the adapter has {name!r}, which the parameters lack; found: {few}")
    merged[name] = merge(params[name], node)
  return merged


def adaptable_layers(
  params: Params, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Params]]:
  """Yields (path, node) of every linear or convolution layer, in the tree's order."""
  if "kernel" in params and not hasattr(params["kernel"], "items"):
    if len(params["kernel"].shape) in (2, 4):
      yield path, params
    return
  for name, node in params.items():
    if hasattr(node, "items"):
      yield from adaptable_layers(node, (*path, name))


def _layer_key(key: Key, path: tuple[str, ...]) -> Key:
  # Python's own hash of a string differs between processes; a checksum does not.
  return jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))


def _fresh(key: Key, kernel_shape: tuple[int, ...], rank: int) -> dict[str, Array]:
  *inputs, features = kernel_shape
  bound = 1 / math.sqrt(math.prod(inputs))
  a = jax.random.uniform(key, (*inputs, rank), minval=-bound, maxval=bound)
  return {"a": a, "b": jnp.zeros((rank, features))}


def _is_adapter(node: Params) -> bool:
  return set(node) == {"a", "b"} and not hasattr(node["a"], "items")


def _map_adapters(lora: Params, function: Callable[[Params], dict]) -> dict:
  if _is_adapter(lora):
    return function(lora)
  return {name: _map_adapters(node, function) for name, node in lora.items()}
