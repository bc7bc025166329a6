"""Texts encoded once: a model whose text encoders run when texts are tokenized, and are then freed.

Text encoders are frozen, and of the largest models as large as the denoiser. What they make of a
prompt is kept on the host, in bfloat16, so that training has their memory, and programs that sample
do not run them again.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jaxalign.models.model import Model, Tokens
from jaxalign.types import Params, Record, at_least_float32

_OTHERS = ("denoiser", "vae")  # components that are no text encoder
_AT_ONCE = 8  # texts


def once(model: Model) -> Model:
  """The same model, whose tokens are what its denoiser is told.

  The encoders have no part in `params`; they are placed in bfloat16 on the first device of this
  host while there are texts that were not encoded before. Equal tokens are encoded once. Of a model
  whose parameters are shapes, what the denoiser is told is zeros.
  """
  encoders = {name: tree for name, tree in model.params.items() if name not in _OTHERS}
  encoded = _Encoded(model.condition, encoders)

  def tokenize(records: Sequence[Record]) -> Tokens:
    return encoded(model.tokenize(records))

  def condition(params: Mapping[str, Params], tokens: Tokens) -> Any:
    del params
    return jax.tree.map(_widened, tokens)

  def save(params, folder):
    model.files.save({**encoders, **params}, folder)

  adapted = {name: of for name, of in model.files.adapted.items() if name not in encoders}
  return model._replace(
    params={name: tree for name, tree in model.params.items() if name in _OTHERS},
    tokenize=tokenize,
    empty=None if model.empty is None else encoded(model.empty),
    condition=condition,
    files=model.files._replace(save=save, adapted=adapted),
  )


class _Encoded:
  """Tokens `[B, ...]` to what the denoiser is told of them, numpy `[B, ...]`, from a cache."""

  def __init__(self, condition: Callable[..., Any], encoders: Mapping[str, Params]):
    self._encoders = encoders
    self._encode = jax.jit(narrow(condition))
    self._known: dict[bytes, Any] = {}

  def __call__(self, tokens: Tokens) -> Any:
    rows = [jax.tree.map(lambda leaf, i=i: leaf[i], tokens) for i in range(_count(tokens))]
    keys = [_key(row) for row in rows]
    new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
    if new:
      self._known |= dict(zip(new, self._encode_all(list(new.values())), strict=True))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(self._known[key] for key in keys))

  def _encode_all(self, rows: list[Tokens]) -> list[Any]:
    """What the denoiser is told of each; the last batch is filled up, so that one program does."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(self._encoders)):
      return [self._zeros(rows[0])] * len(rows)
    placed = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf), jnp.bfloat16), self._encoders)
    found = []
    for start in range(0, len(rows), _AT_ONCE):
      part = rows[start : start + _AT_ONCE]
      filled = part + part[-1:] * (_AT_ONCE - len(part))
      batch = jax.tree.map(lambda *leaves: np.stack(leaves), *filled)
      told = jax.tree.map(np.asarray, self._encode(placed, batch))
      found += [jax.tree.map(lambda leaf, i=i: leaf[i], told) for i in range(len(part))]
    return found

  def _zeros(self, row: Tokens) -> Any:
    batch = jax.tree.map(lambda leaf: leaf[None], row)
    told = jax.eval_shape(self._encode, self._encoders, batch)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape[1:], leaf.dtype), told)


def narrow(condition: Callable[..., Any]) -> Callable[..., Any]:
  """`condition` with its floating results in bfloat16."""
  return lambda params, tokens: jax.tree.map(_narrowed, condition(params, tokens))


def _count(tokens: Tokens) -> int:
  return len(jax.tree.leaves(tokens)[0])


def _key(row: Tokens) -> bytes:
  digest = hashlib.sha256()
  for leaf in jax.tree.leaves(row):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.digest()


def _narrowed(leaf: Any) -> Any:
  return leaf.astype(ml_dtypes.bfloat16) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _widened(leaf: Any) -> Any:
  return at_least_float32(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else jnp.asarray(leaf)
