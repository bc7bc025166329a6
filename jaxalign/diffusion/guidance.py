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
    pairs = jax.tree.map(_interleave, cond.uncond, cond.cond)
    both = denoise_fn(params, jnp.repeat(x_t, 2, axis=0), jnp.repeat(t, 2, axis=0), pairs)
    both = both.reshape(x_t.shape[0], 2, *both.shape[1:])
    uncond_prediction, cond_prediction = both[:, 0], both[:, 1]
    return uncond_prediction + scale * (cond_prediction - uncond_prediction)

  return conditional if scale == 1 else guided


def _interleave(uncond: Array, cond: Array) -> Array:  # [B or 1, ...], [B, ...] -> [2B, ...]
  uncond = jnp.broadcast_to(uncond, cond.shape)
  return jnp.stack([uncond, cond], axis=1).reshape(2 * cond.shape[0], *cond.shape[1:])
