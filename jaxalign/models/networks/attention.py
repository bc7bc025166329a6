"""Implementations of scaled dot-product attention; `layers.attention` chooses among them.

All take query `[B, T, H, D]`, key and value `[B, N, H, D]` and return `[B, T, H, D]`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.distributed import placement
from jaxalign.types import Array

# Logits that are held at once: on a CPU 10 MiB, in float32, near its caches; elsewhere 256 MiB.
LOGITS_IN_CACHE = 5 * 2**19
MAX_LOGITS = 2**26
# Keys from which a CPU sums the weights within the product with the values, see `_attend`.
MANY_KEYS = 512


def plain(query: Array, key: Array, value: Array, mask: Array | None = None) -> jax.Array:
  """All heads at once, by XLA; `mask` as in `layers.attention`."""
  return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")


def cudnn(query: Array, key: Array, value: Array, mask: Array | None = None) -> jax.Array:
  """The fused kernel, which keeps no logits in memory; for what `cudnn_takes`.

  JAX refuses the gradient for odd lengths, which texts of 77 tokens have (and, to be safe, rollout
  and update are the same function), so both lengths are made even by a row that nothing attends to.
  A mask of keys alone becomes their number, or it would be read as one of T x N.
  """
  (B, T), N = query.shape[:2], key.shape[1]
  odd = T % 2 or N % 2
  count = None
  if mask is not None and mask.shape[2] == 1:
    key, value, count = attended_first(key, value, mask)
    mask = None
  elif odd and mask is None:
    count = jnp.full(B, N, jnp.int32)
  if odd:
    query, key, value = (_pad_axis(x, 1, x.shape[1] % 2) for x in (query, key, value))
    if mask is not None:
      mask = jnp.broadcast_to(mask, (*mask.shape[:2], T, N))
      mask = _pad_axis(_pad_axis(mask, 2, T % 2), 3, N % 2)
  lengths = {}
  if count is not None:
    lengths = {"query_seq_lengths": jnp.full(B, T, jnp.int32), "key_value_seq_lengths": count}
  out = jax.nn.dot_product_attention(
    query, key, value, mask=mask, implementation="cudnn", **lengths
  )
  return out[:, :T] if odd else out


def attended_first(key: Array, value: Array, mask: Array) -> tuple[Array, Array, Array]:
  """Keys and values with those that are attended to in front, and how many these are, `[B]` int32.

  Attention does not depend on their order. `mask` is `[B or 1, 1, 1, N]`.
  """
  mask = jnp.broadcast_to(mask[:, 0, 0], key.shape[:2])
  order = jnp.argsort(~mask, axis=1, stable=True)[:, :, None, None]
  key, value = (jnp.take_along_axis(x, order, axis=1) for x in (key, value))
  return key, value, jnp.sum(mask, axis=1, dtype=jnp.int32)


def _pad_axis(x: Array, axis: int, count: int) -> jax.Array:
  """`count` more zeros, or False, at the end of an axis."""
  return jnp.pad(x, [(0, count if i == axis else 0) for i in range(x.ndim)])


def cudnn_takes(query: jax.Array) -> bool:
  """Whether cuDNN has a kernel, with its gradient, on the GPUs that the program is for.

  It does in bfloat16 and float16, for head sizes that are multiples of 8: up to 256 on Hopper and
  128 on other GPUs since Ampere. So 40, 80 and 160 of Stable Diffusion 1.x, and 64 of 2.x and XL.
  """
  size, (major, _) = query.shape[-1], placement.compute_capability()
  largest = 256 if major == 9 else 128
  return (
    major >= 8
    and query.dtype in (jnp.bfloat16, jnp.float16)
    and size % 8 == 0
    and size <= largest
  )


def on_cpu(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """As many heads of images at a time as keep their logits in the cache, at least two; in float32.

  All heads at once, XLA writes all logits to memory, several times: at 1024 x 1024 that takes five
  times as long. One alone has reductions over columns, which XLA:CPU is slow at.
  """
  (B, T, H, D), N = query.shape, key.shape[1]
  wide = jnp.promote_types(query.dtype, jnp.float32)  # narrower types are not faster here
  at_once = max(2, LOGITS_IN_CACHE // (T * N))

  def some_heads(heads):
    return jax.vmap(one_head)(*heads)

  def one_head(query, key, value):  # [T, D], [N, D], [N, D]
    return _map_rows(lambda rows: _attend(rows, key, value), query, LOGITS_IN_CACHE // at_once // N)

  heads = [x.astype(wide).transpose(0, 2, 1, 3).reshape(B * H, -1, D) for x in (query, key, value)]
  out = _map_rows(some_heads, heads, at_once).astype(query.dtype)
  return out.reshape(B, H, T, D).transpose(0, 2, 1, 3)


@jax.custom_vjp
def _attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Attention of one head, `[T, D], [N, D], [N, D] -> [T, D]`; in reverse mode only.

  It has a gradient of its own because JAX's is made of transposed products and keeps all weights.
  """
  logits = query * query.shape[-1] ** -0.5 @ key.T
  weights = jnp.exp(logits - logits.max(axis=-1, keepdims=True))
  if len(key) < MANY_KEYS:
    out, total = weights @ value, weights.sum(axis=-1, keepdims=True)
  else:  # a column more, and XLA:CPU makes one kernel of all this
    ones = jnp.ones((len(key), 1), value.dtype)
    out = weights @ jnp.concatenate([value, ones], axis=1)
    out, total = out[:, :-1], out[:, -1:]
  return out / total  # T x D divisions, not T x N


def _attend_forward(query, key, value):
  # Nothing else is kept: with the logarithms of the totals to write, the kernel falls into pieces.
  return _attend(query, key, value), (query, key, value)


def _attend_backward(saved, grad):
  """From the weights again, over their columns' sums and all transposed: `[N, T]`."""
  query, key, value = saved
  scale = query.shape[-1] ** -0.5
  query = query * scale
  logits = key @ query.T
  weights = jnp.exp(logits - logits.max(axis=0))
  total = weights.sum(axis=0)
  grad = grad / total[:, None]
  grad_weights = value @ grad.T
  mean = jnp.sum(weights * grad_weights, axis=0) / total
  grad_logits = weights * (grad_weights - mean)
  return scale * _transposed_product(grad_logits, key), grad_logits @ query, weights @ grad


_attend.defvjp(_attend_forward, _attend_backward)


def _transposed_product(x: jax.Array, y: jax.Array) -> jax.Array:
  """`x.T @ y`, which XLA:CPU has no fast product for, so that it must not see what is asked."""
  barrier = jax.lax.optimization_barrier
  return barrier(barrier(y.T) @ x).T


def in_pieces(
  query: jax.Array, key: jax.Array, value: jax.Array, mask: Array | None = None
) -> jax.Array:
  """`plain`, on some of the queries at a time where all would take more than 256 MiB of logits.

  `mask` is one of keys alone, `[B, H, 1, N]`.
  """
  (B, T, H, _), N = query.shape, key.shape[1]
  rows_at_once = MAX_LOGITS // (B * H * N)
  if rows_at_once >= T:
    return plain(query, key, value, mask)

  @jax.checkpoint  # or all logits would be kept for the gradient
  def attend(rows):  # [t, B, H, D]
    return plain(rows.swapaxes(0, 1), key, value, mask).swapaxes(0, 1)

  return _map_rows(attend, query.swapaxes(0, 1), rows_at_once).swapaxes(0, 1)


def _map_rows(function: Callable, x: Any, at_once: int) -> jax.Array:
  """`function(x)`, called on at most `at_once` rows (or 1) of the arrays in `x` at a time."""
  rows, at_once = len(jax.tree.leaves(x)[0]), max(1, at_once)
  if rows <= at_once:
    return function(x)
  pieces = -(-rows // at_once)
  size = -(-rows // pieces)

  def split(x):
    padded = jnp.pad(x, [(0, pieces * size - rows), *[(0, 0)] * (x.ndim - 1)])
    return padded.reshape(pieces, size, *x.shape[1:])

  out = jax.lax.map(function, jax.tree.map(split, x))
  return out.reshape(-1, *out.shape[2:])[:rows]
