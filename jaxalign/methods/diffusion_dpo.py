"""Preference losses on the denoising error of stored pairs (Diffusion-DPO and its relatives).

A finished sample has no tractable likelihood. Its denoising error at a random noise level stands in
for it, at the same level and with the same noise for both samples of a pair and for policy and
reference (Wallace et al. 2023, arXiv:2311.12908, section 4). Loss, log-ratio and time weight are
three independent parts: any loss on log-ratios makes a method here.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import log_ratios
from jaxalign.methods.base import Method, Pairs, for_both, unpair, winner_and_loser
from jaxalign.pipeline import Pipeline
from jaxalign.types import Array

# loss(log_ratio_w [B], log_ratio_l [B], p [B]) -> [B], p the probability that w is preferred
PreferenceLoss = Callable[[Array, Array, Array], Array]


def make_dpo(pipeline: Pipeline, *, beta: float, **estimator) -> Method:
  """Diffusion-DPO (eq. 14); `estimator` as in `make`.

  With time_weight "half", beta is that of the published code: 2000 to 5000 for Stable Diffusion at
  512 pixels.
  """
  return make(pipeline, lambda w, l, p: losses.dpo_loss(w, l, beta=beta, p=p), **estimator)


def make_ipo(pipeline: Pipeline, *, tau: float, **estimator) -> Method:
  """IPO (arXiv:2310.12036 eq. 17) on denoising errors; `estimator` as in `make`.

  The target, 1 / (2 tau) for a plain label, is on the scale of the log-ratio that `time_weight`
  chooses.
  """
  return make(pipeline, lambda w, l, p: losses.ipo_loss(w, l, tau=tau, p=p), **estimator)


def make(
  pipeline: Pipeline, preference_loss: PreferenceLoss, *, time_weight: str, num_draws: int
) -> Method:
  """A method from any loss on log-ratios.

  Args:
    pipeline: the model. Only the network without guidance is used.
    preference_loss: `(log_ratio_w, log_ratio_l, p) -> [B]`. Any loss L on plain labels has a soft
      one, its mean p L(w, l) + (1 - p) L(l, w). A loss that leaves `p` unused must not see ties:
      `make(...)._replace(soft_labels=False)` says so.
    time_weight: "half" (the published convention) or "elbo" (nats, with a larger variance).
    num_draws: noise levels, spread evenly over the range, and noises that the log-ratio of a pair
      is averaged over; 1 in all published code. The loss of a noisy log-ratio is above that of its
      mean, and is least at smaller log-ratios: fewer draws learn less from the same pairs.
  """
  weights = {"half": log_ratios.half, "elbo": log_ratios.make_elbo(pipeline.levels.num_steps)}
  if time_weight not in weights:
    raise ValueError(
      f"config.method.time_weight: expected one of {', '.join(weights)}; got {time_weight!r}"
    )
  if num_draws < 1:
    raise ValueError(f"config.method.num_draws: expected at least 1, got {num_draws}")

  def loss(params, frozen, batch: Pairs, key):
    key_level, key_eps = jax.random.split(key)
    num_pairs, num_levels = len(batch.p), pipeline.levels.num_steps
    # A draw is a row of its own: [B, n] of them, for both samples of a pair the same.
    offset = jax.random.uniform(key_level, (num_pairs, 1))
    share = (jnp.arange(num_draws) + offset) / num_draws
    level = jnp.minimum((share * num_levels).astype(jnp.int32), num_levels - 1).reshape(-1)
    eps = jax.random.normal(key_eps, (len(level), *batch.x_0.shape[2:]))
    x_0, cond = jax.tree.map(
      lambda leaf: leaf.repeat(num_draws, axis=0), (batch.x_0, batch.cond)
    )
    log_ratio = log_ratios.denoising_log_ratio(
      params,
      frozen["reference"],
      pipeline.conditional.denoise_fn,
      pipeline.levels[for_both(level)],
      pipeline.prediction_type,
      unpair(x_0),
      for_both(eps),
      for_both(cond),
      weights[time_weight],
    )
    log_ratio_w, log_ratio_l = (
      one.reshape(num_pairs, num_draws).mean(axis=1) for one in winner_and_loser(log_ratio)
    )
    values = preference_metrics(log_ratio_w, log_ratio_l, batch.p)
    return preference_loss(log_ratio_w, log_ratio_l, batch.p), values

  return Method(loss, data="pairs", soft_labels=True)


def preference_metrics(log_ratio_w: Array, log_ratio_l: Array, p: Array) -> dict[str, Array]:
  """What is logged of the log-ratios of pairs, each `[B]`; `p` counts in the accuracy alone."""
  return {
    "preference/accuracy": losses.implicit_accuracy(log_ratio_w, log_ratio_l, p=p),
    "preference/margin": log_ratio_w - log_ratio_l,
    "preference/log_ratio_w": log_ratio_w,
    "preference/log_ratio_l": log_ratio_l,
  }
