"""Rotary position embeddings (RoPE): positions as angles by which queries and keys are turned.

Su et al. 2021, arXiv:2104.09864, section 3.2. Image transformers give each token a position on
several axes, each with its own share of a head's channels, and turn adjacent channels together;
language models have one axis and turn channel i with channel i + D / 2.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.types import Array

Table = tuple[np.ndarray, np.ndarray]  # cosines and sines, float32 [N, D / 2] each


def table(ids: np.ndarray, axes: Sequence[int], theta: float) -> Table:
  """Cosines and sines of each token's angles, `position * theta ** (-2 i / axis)`.

  Made on the host in float64: in float32 the angles of large positions have lost digits, and
  another device's sines would be others.

  Args:
    ids: `[N, len(axes)]` positions.
    axes: channels of a head that turn by each position, even; they add up to D.
    theta: the base of the frequencies.
  """
  angles = [
    np.asarray(ids[:, k : k + 1], np.float64) * theta ** (-np.arange(0, width, 2) / width)
    for k, width in enumerate(axes)
  ]
  all_angles = np.concatenate(angles, axis=-1)
  return np.cos(all_angles).astype(np.float32), np.sin(all_angles).astype(np.float32)


def check_axes(field: str, axes: Sequence[int], count: int, width: int) -> None:
  """Raises ValueError, naming the field, unless `axes` are `count` even numbers, `width` in all."""
  odd = [entry for entry in axes if entry < 2 or entry % 2]
  if odd or len(axes) != count or sum(axes) != width:
    raise ValueError(
      f"transformer config: expected {field} to be {count} even numbers that add up to {width}, "
      f"the channels of a head, found {checks.shown(axes)}"
    )


def rotate_pairs(x: Array, turn: tuple[Array, Array]) -> jax.Array:
  """Turns channels (0, 1), (2, 3), ... of `x` `[B, N, H, D]`; in float32, returned as `x` is.

  Args:
    turn: cosines and sines, `[N, D / 2]` or, where examples differ, `[B, N, D / 2]`.
  """
  pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
  cos, sin = _for_heads(turn)
  first, second = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)


def rotate_halves(x: Array, turn: tuple[Array, Array]) -> jax.Array:
  """Turns channels i and i + D / 2 of `x` `[B, N, H, D]`; otherwise as `rotate_pairs`."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = _for_heads(turn)
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _for_heads(turn: tuple[Array, Array]) -> list[jax.Array]:  # [.., N, D / 2] -> [.., N, 1, D / 2]
  return [jnp.asarray(part)[..., None, :] for part in turn]
