"""Packing: maps of latents, squares of pixels to one with all their channels, and maps as tokens.

Transformers of latents take each square, mostly 2 x 2, as one token. FLUX and Qwen-Image do this
outside of the network, so that what it sees, and what it predicts, is a packed map.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.types import Array

# The order of a packed pixel's channels, the slowest first, as axes of [B, H, dy, W, dx, C]: FLUX
# and Qwen-Image have the first; SD3, PixArt, Sana, Wan and Z-Image have the second. The wrong one
# gives a plausible picture, scrambled.
_AXES = {"c_dy_dx": (0, 1, 3, 5, 2, 4), "dy_dx_c": (0, 1, 3, 2, 4, 5)}


def pack(x: Array, order: str, patch: int = 2) -> Array:
  """Packs a map: `[B, H, W, C]` to `[B, H / p, W / p, p * p * C]`; numpy stays numpy.

  Args:
    x: sides are multiples of p.
    order: of the channels, "c_dy_dx" or "dy_dx_c", slowest first.
    patch: p.
  """
  axes = _axes(order)
  batch, height, width, channels = x.shape
  if height % patch or width % patch:
    raise ValueError(
      f"pack: expected latents with sides that are multiples of {patch}, got {height} x {width}"
    )
  rows, columns = height // patch, width // patch
  squares = x.reshape(batch, rows, patch, columns, patch, channels)
  return squares.transpose(axes).reshape(batch, rows, columns, patch**2 * channels)


def unpack(x: Array, order: str, patch: int = 2) -> Array:
  """The inverse of `pack`: `[B, h, w, p * p * C]` to `[B, p * h, p * w, C]`."""
  axes = _axes(order)
  batch, rows, columns, packed = x.shape
  if packed % patch**2:
    raise ValueError(f"unpack: expected channels in multiples of {patch**2}, got {packed}")
  sizes = (batch, rows, patch, columns, patch, packed // patch**2)
  squares = x.reshape([sizes[axis] for axis in axes])
  squares = squares.transpose([axes.index(axis) for axis in range(len(axes))])
  return squares.reshape(batch, rows * patch, columns * patch, -1)


def _axes(order: str) -> tuple[int, ...]:
  checks.check_choice("packing: order", order, _AXES)
  return _AXES[order]


def tokens(maps: Sequence[Array]) -> Array:
  """Pixels of maps `[B, h, w, C]`, row by row, one map after the other: `[B, T, C]`."""
  return jnp.concatenate([x.reshape(x.shape[0], -1, x.shape[-1]) for x in maps], axis=1)


def positions(index: int, size: Sequence[int]) -> np.ndarray:
  """Positions for `rope` of the tokens of map number `index`: (index, row, column), `[T, 3]`."""
  rows, columns = np.indices(tuple(size)).reshape(2, -1)
  return np.stack([np.full_like(rows, index), rows, columns], axis=-1)
