"""Guidance as a wrapper: denoise_fn -> denoise_fn.

By name, `GUIDANCE[name](denoise_fn, **kwargs)`; a name with a colon, "package.module:function", is
a user's own: a function of the same signature. Which one is meant where a config names none, and
at which scale where it has none, is the model's to say: `scale` is the number of its own pipeline.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.checks import check_call, find_function
from jaxalign.types import Array, DenoiseFn, Params

DEFAULT = "classifier_free"  # of models that name none


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

  return _two_branches(denoise_fn, scale, lambda guided, cond: guided)


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


def classifier_free_w(denoise_fn: DenoiseFn, scale: float) -> DenoiseFn:
  """Classifier-free guidance by the paper's own scale, as Z-Image's (arXiv:2207.12598, eq. 6).

    prediction = cond + scale * (cond - uncond)

  That is `classifier_free` with `scale + 1`: 0 is the conditional network.
  """
  return classifier_free(denoise_fn, scale + 1.0)


def norm_keeping(denoise_fn: DenoiseFn, scale: float) -> DenoiseFn:
  """Classifier-free guidance that keeps the norm of each token, as Qwen-Image's.

    prediction = guided * |cond| / |guided|

  Norms are over the squares of 2 x 2 pixels with all their channels that are the network's tokens.
  """

  def rescaled(guided: Array, cond: Array) -> Array:
    return guided * (_token_norms(cond) / _token_norms(guided))

  return _two_branches(denoise_fn, scale, rescaled)


def embedded(denoise_fn: DenoiseFn, scale: float, true_scale: float = 1.0) -> DenoiseFn:
  """Distilled guidance: the network is told the scale, as FLUX.1-dev and FLUX.2-dev are.

  One evaluation a step (Meng et al. 2023, arXiv:2210.03142, section 3.1). With another `true_scale`
  than 1 (diffusers' `true_cfg_scale`) classifier-free guidance by that scale on top. ValueError for
  a scale of 1.
  """
  if scale == 1:
    raise ValueError(
      "config.guidance.scale: expected the scale that this distilled network is told, such as 3.5, "
      "got 1, which means no guidance elsewhere and is another model here"
    )
  return classifier_free(told(denoise_fn, name="embedded", scale=scale), true_scale)


GUIDANCE: dict[str, Callable[..., DenoiseFn]] = {
  DEFAULT: classifier_free,
  "classifier_free_w": classifier_free_w,
  "norm_keeping": norm_keeping,
  "embedded": embedded,
}


def told(denoise_fn: DenoiseFn, *, name: str, scale: Any = None, **kwargs: Any) -> DenoiseFn:
  """The network without guidance: where the scale is embedded it is told that, also here.

  A distilled network that is told another scale than it is sampled with is another model.
  """
  del kwargs
  if name != "embedded":
    return denoise_fn

  def told_fn(params: Params, x_t: Array, t: Array, cond: Any) -> Array:
    # One for each: of a single row a CPU may take products in another order of sums, in the rollout
    # and not in the update.
    told_scale = jnp.full(x_t.shape[0], scale, jnp.float32)
    return denoise_fn(params, x_t, t, {**cond, "guidance": told_scale})

  return told_fn


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


def settled(section: Mapping[str, Any], of_model: Mapping[str, Any]) -> dict[str, Any]:
  """The section `guidance` of a config, with the model's own name and scale where it has none.

  The model's scale is not that of another guidance, which a section may name.
  """
  if section.get("name", of_model["name"]) != of_model["name"]:
    return dict(section)
  return {**of_model, **section}


def count_branches(*, name: str = DEFAULT, scale: float = 1.0, **kwargs: Any) -> int | None:
  """How many predictions of the network make a guided one; None for a user's own guidance."""
  if name == "embedded":
    return 1 if kwargs.get("true_scale", 1.0) == 1 else 2
  if name not in GUIDANCE:
    return None
  return 1 if scale == (0.0 if name == "classifier_free_w" else 1.0) else 2


def _two_branches(
  denoise_fn: DenoiseFn, scale: float, finish: Callable[[Array, Array], Array]
) -> DenoiseFn:
  """Classifier-free guidance; `finish` is given its prediction and the conditional one."""

  def conditional(params: Params, x_t: Array, t: Array, cond: Guided) -> Array:
    return denoise_fn(params, x_t, t, cond.cond)

  def guided(params: Params, x_t: Array, t: Array, cond: Guided) -> Array:
    without, with_cond = _branches(denoise_fn, params, x_t, t, [cond.uncond, cond.cond])
    return finish(without + scale * (with_cond - without), with_cond)

  return conditional if scale == 1 else guided


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


def _token_norms(x: Array) -> Array:  # [B, H, W, C] -> [B, H, W, 1], equal over 2 x 2 pixels
  rows, columns = x.shape[1] // 2, x.shape[2] // 2
  squares = jnp.square(x.reshape(x.shape[0], rows, 2, columns, 2, x.shape[3]))
  norms = jnp.sqrt(jnp.sum(squares, axis=(2, 4, 5)))
  return jnp.repeat(jnp.repeat(norms, 2, axis=1), 2, axis=2)[..., None]


def _interleave(*branches: Array) -> Array:  # K of [B or 1, ...], the last [B, ...] -> [K B, ...]
  shape = branches[-1].shape
  stacked = jnp.stack([jnp.broadcast_to(branch, shape) for branch in branches], axis=1)
  return stacked.reshape(-1, *shape[1:])
