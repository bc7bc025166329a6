"""Guidance as a wrapper: denoise_fn -> denoise_fn.

By name, `GUIDANCE[name](denoise_fn, **kwargs)`; a name with a colon, "package.module:function", is
a user's own: a function of the same signature.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.checks import check_call, find_function
from jaxalign.types import Array, DenoiseFn, Params

DEFAULT = "classifier_free"  # of configs that name none


class Guided(NamedTuple):
  """The `cond` of a guided network: two trees of one structure.

  Leaves of `cond` are `[B, ...]`; leaves of `uncond` are `[B, ...]` or `[1, ...]`. `uncond` is None
  where a model has no empty condition.
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


GUIDANCE: dict[str, Callable[..., DenoiseFn]] = {DEFAULT: classifier_free}


def make(denoise_fn: DenoiseFn, *, name: str = DEFAULT, **kwargs: Any) -> DenoiseFn:
  """The network under the guidance called `name`, the section `guidance` of a config.

  Args:
    denoise_fn: takes the half of a `Guided` that it is asked about as its `cond`.
    name: an entry of `GUIDANCE`, or a user's "package.module:function".
    **kwargs: the guidance's own.

  Returns:
    What takes a `Guided` as its `cond`.

  Raises:
    ValueError: a name that nothing has, arguments that it does not take, or a function that returns
      something else.
  """
  what = "config.guidance.name"
  factory = find_function(what, name, GUIDANCE, unknown=f"{what}: unknown guidance {name!r}")
  check_call(f"config.guidance {name!r}", factory, denoise_fn, **kwargs)
  guided = factory(denoise_fn, **kwargs)
  if not callable(guided):
    raise ValueError(
      f"config.guidance.name: expected {name!r} to return a function "
      f"(params, x_t, t, cond) -> prediction, got {type(guided).__name__}"
    )
  return guided


def count_branches(*, name: str = DEFAULT, scale: float = 1.0, **kwargs: Any) -> int | None:
  """How many predictions of the network make a guided one; None for a user's own guidance."""
  del kwargs
  if name != DEFAULT:
    return None
  return 1 if scale == 1 else 2


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
