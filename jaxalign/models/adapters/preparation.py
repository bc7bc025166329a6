"""Weights made ready for a loop over the network: cast, and adapters folded in, once before it.

The compiler for GPUs moves nothing out of a loop, so that float32 weights of a network that
computes in bfloat16 would be cast in every step. What is made here is behind a barrier, or it would
be fused into the products again.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Params


def map_layers(function: Callable[[Any], Any], params: Params) -> dict:
  """`params` with `function` of the kernels and biases of layers.

  Norms and embeddings, whose arithmetic is float32 always, stay as they are.
  """
  if _is_layer(params):
    return {name: function(leaf) for name, leaf in params.items()}
  return {
    name: map_layers(function, node) if hasattr(node, "items") else node
    for name, node in params.items()
  }


def cast(params: Params, dtype: Any) -> Params:
  """The parameters with layers in `dtype`; None leaves them what they are."""
  return params if dtype is None else map_layers(lambda leaf: _cast(leaf, dtype), params)


def ready(
  params: Params, lora: Params | None, kernels: Params, dtype: Any, *, merged: bool
) -> dict[str, Any]:
  """The collection "ready" of what is trained, for `layers`; no leaves where nothing is to be made.

  Args:
    params: weights that are trained, or an empty tree.
    lora: adapters, scaled as they are applied, or None.
    kernels: the parameters that the adapters belong to.
    dtype: of the network's computation; None is that of the weights.
    merged: whether layers compute with `kernel + a @ b` (`products.adapted_matmul`). Convolutions
      of more than one pixel keep the side path.
  """
  if lora is not None:
    return _ready_adapters(lora, kernels, dtype, merged)
  return {} if dtype is None else cast(_layers_only(params), dtype)


def _is_layer(node: Params) -> bool:
  return "kernel" in node and not hasattr(node["kernel"], "items")


def _cast(leaf: Array, dtype: Any) -> Array:
  return leaf if leaf.dtype == dtype else _rounded(jnp.asarray(leaf), dtype)


def _rounded(x: jax.Array, dtype: Any) -> jax.Array:
  """`x` in `dtype`, made once, and to the same bits in every program.

  A compiler that may keep excess precision leaves a plain cast out where it computes in float32
  after all, as CPUs do, and it would find that in one program and not in another.
  """
  info = jnp.finfo(dtype)
  x = jax.lax.reduce_precision(x, info.nexp, info.nmant)
  return jax.lax.optimization_barrier(x.astype(dtype))


def _layers_only(params: Params) -> dict:
  if _is_layer(params):
    return dict(params)
  inner = {name: _layers_only(node) for name, node in params.items() if hasattr(node, "items")}
  return {name: node for name, node in inner.items() if node}


def _ready_adapters(lora: Params, kernels: Params, dtype: Any, merged: bool) -> dict:
  if not hasattr(lora.get("a"), "shape"):
    inner = {
      name: _ready_adapters(node, kernels[name], dtype, merged) for name, node in lora.items()
    }
    return {name: node for name, node in inner.items() if node}
  a, b, kernel = lora["a"], lora["b"], kernels["kernel"]
  made = {} if dtype is None else {"a": _cast(a, dtype), "b": _cast(b, dtype)}
  if merged and kernel.ndim == 2:
    made["kernel"] = _rounded(kernel + a @ b, dtype or kernel.dtype)
  return made
