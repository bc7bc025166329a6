"""Decoding in less memory, as wrappers: decode_fn -> decode_fn.

The activations of an autoencoder's decoder at full resolution are the peak of sampling: at 1024 x
1024 one image takes gigabytes. A decode_fn is `(params, latents [B, h, w, C]) -> [B, H, W, 3]`.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Params

DecodeFn = Callable[[Params, Array], Array]
_OVERLAP = 0.25  # of a tile with the next one, along each side


def sliced(decode_fn: DecodeFn, batch_size: int) -> DecodeFn:
  """Decodes at most `batch_size` images at a time, with the same result."""
  if batch_size < 1:
    raise ValueError(f"decode_batch: expected at least 1 image, got {batch_size}")

  def decode(params: Params, latents: Array) -> Array:
    return jax.lax.map(lambda z: decode_fn(params, z[None])[0], latents, batch_size=batch_size)

  return decode


def tiled(decode_fn: DecodeFn, tile: int, downscale: int) -> DecodeFn:
  """Decodes overlapping tiles one after another and blends them where they overlap.

  Images of at most a tile are decoded whole. For larger ones the result is near that of
  `decode_fn` but not equal: what it normalises and attends over is a tile, not the image. The
  tiles and their weights are those of diffusers' `AutoencoderKL.enable_tiling`.

  Args:
    decode_fn: decodes latents of any height and width.
    tile: side of a tile in latent pixels, a multiple of 4.
    downscale: image pixels per latent pixel.
  """
  if tile < 4 or tile % 4:
    raise ValueError(f"decode_tile: expected a positive multiple of 4 latent pixels, got {tile}")
  stride = tile - int(tile * _OVERLAP)
  blend = int(tile * downscale * _OVERLAP)
  kept = tile * downscale - blend

  def decode(params: Params, latents: Array) -> Array:
    height, width = latents.shape[1:3]
    if max(height, width) <= tile:
      return decode_fn(params, latents)
    rows, columns = (range(0, size, stride) for size in (height, width))
    tiles = {
      (i, j): latents[:, i : i + tile, j : j + tile] for i, j in itertools.product(rows, columns)
    }
    tiles = _map(lambda z: decode_fn(params, z), tiles)
    for i, j in tiles:  # each is blended with neighbours that have been blended already
      if i:
        tiles[i, j] = _blended(tiles[i - stride, j], tiles[i, j], blend, axis=1)
      if j:
        tiles[i, j] = _blended(tiles[i, j - stride], tiles[i, j], blend, axis=2)
    return jnp.concatenate(
      [jnp.concatenate([tiles[i, j][:, :kept, :kept] for j in columns], axis=2) for i in rows],
      axis=1,
    )

  return decode


def _map(
  function: Callable[[Array], Array], tiles: dict[tuple[int, int], Array]
) -> dict[tuple[int, int], Array]:
  """The function of every tile, one at a time, compiled once for each of their few shapes."""
  result = dict(tiles)
  for shape in dict.fromkeys(z.shape for z in tiles.values()):
    places = [place for place, z in tiles.items() if z.shape == shape]
    decoded = jax.lax.map(function, jnp.stack([tiles[place] for place in places]))
    result.update(zip(places, decoded, strict=True))
  return result


def _blended(before: Array, after: Array, extent: int, *, axis: int) -> Array:
  """`after`, whose first pixels along `axis` turn from the last ones of `before` into its own."""
  extent = min(before.shape[axis], after.shape[axis], extent)
  shape = [1] * after.ndim
  shape[axis] = extent
  weight = (jnp.arange(extent) / extent).reshape(shape)
  first, rest = jnp.split(after, [extent], axis=axis)
  last = jax.lax.slice_in_dim(before, before.shape[axis] - extent, None, axis=axis)
  return jnp.concatenate([(1.0 - weight) * last + weight * first, rest], axis=axis)
