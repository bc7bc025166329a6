"""Preference losses on the denoising error of stored pairs (Diffusion-DPO and its relatives).

A finished sample has no tractable likelihood. Its denoising error at a random noise level stands in
for it, at the same level and with the same noise for both samples of a pair and for policy and
reference (Wallace et al. 2023, arXiv:2311.12908, section 4). Loss, log-ratio and time weight are
three independent parts: any loss on log-ratios makes a method here.
"""

import functools
from collections.abc import Callable

import jax

from jaxalign import losses
from jaxalign.diffusion import log_ratios
from jaxalign.methods.base import Method, Pairs, Parts, for_both, unpair, winner_and_loser
from jaxalign.types import Array

# loss(log_ratio_w [B], log_ratio_l [B]) -> [B]
PreferenceLoss = Callable[[Array, Array], Array]


def make_dpo(parts: Parts, *, beta: float, time_weight: str) -> Method:
  """Diffusion-DPO (eq. 14). With time_weight "half", beta is that of the published code: 2000 to
  5000 for Stable Diffusion at 512 pixels.
  """
  return make(parts, functools.partial(losses.dpo_loss, beta=beta), time_weight=time_weight)


def make_ipo(parts: Parts, *, tau: float, time_weight: str) -> Method:
  """IPO (arXiv:2310.12036 eq. 17) on denoising errors. The target, 1 / (2 tau), is on the scale
  of the log-ratio that `time_weight` chooses.
  """
  return make(parts, functools.partial(losses.ipo_loss, tau=tau), time_weight=time_weight)


def make(parts: Parts, preference_loss: PreferenceLoss, *, time_weight: str) -> Method:
  """A method from any loss on log-ratios.

  Args:
    parts: the model. Only the network without guidance is used.
    preference_loss: `(log_ratio_w, log_ratio_l) -> [B]`.
    time_weight: "half" (the published convention) or "elbo" (nats, with a larger variance).
  """
  weights = {"half": log_ratios.half, "elbo": log_ratios.make_elbo(parts.levels.num_steps)}
  if time_weight not in weights:
    raise ValueError(
      f"config.method.time_weight: expected one of {', '.join(weights)}; got {time_weight!r}"
    )

  def loss(params, frozen, batch: Pairs, key):
    key_level, key_eps = jax.random.split(key)
    num_pairs = len(batch.weight)
    level = jax.random.randint(key_level, (num_pairs,), 0, parts.levels.num_steps)
    eps = jax.random.normal(key_eps, (num_pairs, *batch.x_0.shape[2:]))
    log_ratio = log_ratios.denoising_log_ratio(
      params,
      frozen["reference"],
      parts.conditional_fn,
      parts.levels[for_both(level)],
      parts.prediction_type,
      unpair(batch.x_0),
      for_both(eps),
      for_both(batch.cond),
      weights[time_weight],
    )
    log_ratio_w, log_ratio_l = winner_and_loser(log_ratio)
    values = preference_metrics(log_ratio_w, log_ratio_l)
    return batch.weight * preference_loss(log_ratio_w, log_ratio_l), values

  return Method(loss, data="pairs")


def preference_metrics(log_ratio_w: Array, log_ratio_l: Array) -> dict[str, Array]:
  """What is logged of the log-ratios of pairs, each `[B]`."""
  return {
    "preference/accuracy": losses.implicit_accuracy(log_ratio_w, log_ratio_l),
    "preference/margin": log_ratio_w - log_ratio_l,
    "preference/log_ratio_w": log_ratio_w,
    "preference/log_ratio_l": log_ratio_l,
  }
