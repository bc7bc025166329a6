"""Guidance as a wrapper: denoise_fn -> denoise_fn."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.types import Array, DenoiseFn, Params


class Guided(NamedTuple):
  """The `cond` of a guided network: two trees of one structure.

  Leaves of `cond` are `[B, ...]`; leaves of `uncond` are `[B, ...]` or `[1, ...]`.
  """

  cond: Any
  uncond: Any


def classifier_free(denoise_fn: DenoiseFn, scale: float) -> DenoiseFn:
  """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598, eq. 6).

    prediction = uncond + scale * (cond - uncond)

  `scale` is what diffusers calls guidance_scale, i.e. 1 + w of the paper: 1 is the conditional
  network, and then only that is evaluated. Otherwise both branches are one batch of 2B, in which
  the two rows of an example are neighbours, so that a sharded batch stays where it is. Gradients
  flow through both branches. The wrapped function takes a `Guided` as its `cond`.
  """

  def conditional(params: Params, x_t: Array, t: Array, cond: Guided) -> Array:
    return denoise_fn(params, x_t, t, cond.cond)

  def guided(params: Params, x_t: Array, t: Array, cond: Guided) -> Array:
    uncond_prediction, cond_prediction = _branches(
      denoise_fn, params, x_t, t, [cond.uncond, cond.cond]
    )
    return uncond_prediction + scale * (cond_prediction - uncond_prediction)

  return conditional if scale == 1 else guided


def text_and_image(denoise_fn: DenoiseFn, scale: float, image_scale: float) -> DenoiseFn:
  """Guidance by a text and an image, each with its own scale (arXiv:2211.09800, eq. 3).

    prediction = neither + image_scale * (image - neither) + scale * (both - image)

  For networks whose `cond` holds an `image` (InstructPix2Pix), which is zeros in `uncond`.
  The scales are what diffusers calls guidance_scale and image_guidance_scale. One batch of 3B.
  """

  def guided(params: Params, x_t: Array, t: Array, cond: Guided) -> Array:
    with_image = {**cond.uncond, "image": cond.cond["image"]}
    neither, image, both = _branches(
      denoise_fn, params, x_t, t, [cond.uncond, with_image, cond.cond]
    )
    return neither + image_scale * (image - neither) + scale * (both - image)

  return guided


def _branches(
  denoise_fn: DenoiseFn, params: Params, x_t: Array, t: Array, conds: list[Any]
) -> list[Array]:
  """The prediction under each of some `cond`, the last of which has all B rows, in one batch."""
  count = len(conds)
  joined = jax.tree.map(_interleave, *conds)
  x_t, t = jnp.repeat(x_t, count, axis=0), jnp.repeat(t, count, axis=0)
  predictions = denoise_fn(params, x_t, t, joined)
  predictions = predictions.reshape(-1, count, *predictions.shape[1:])
  return [predictions[:, i] for i in range(count)]


def _interleave(*branches: Array) -> Array:  # K of [B or 1, ...], the last [B, ...] -> [K B, ...]
  shape = branches[-1].shape
  stacked = jnp.stack([jnp.broadcast_to(branch, shape) for branch in branches], axis=1)
  return stacked.reshape(-1, *shape[1:])
