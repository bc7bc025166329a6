"""Preference losses on the denoising error of stored pairs (Diffusion-DPO and its relatives).

A finished sample has no tractable likelihood. Its denoising error at a random noise level stands in
for it, at the same level and with the same noise for both samples of a pair and for policy and
reference (Wallace et al. 2023, arXiv:2311.12908, section 4). Loss, log-ratio and time weight are
three independent parts: any loss on log-ratios makes a method here.
"""

from collections.abc import Callable

import jax

from jaxalign import losses
from jaxalign.data import examples
from jaxalign.diffusion import forward, log_ratios
from jaxalign.methods.base import Method, Stored
from jaxalign.methods.batches import (
  Finished,
  for_both,
  preference_metrics,
  unpair,
  winner_and_loser,
)
from jaxalign.pipeline import Pipeline
from jaxalign.types import Array

# loss(log_ratio_w [B], log_ratio_l [B], p [B]) -> [B], p the probability that w is preferred
PreferenceLoss = Callable[[Array, Array, Array], Array]


def make_dpo(pipeline: Pipeline, *, beta: float, time_weight: str, num_draws: int) -> Method:
  """Diffusion-DPO (eq. 14); `time_weight` and `num_draws` as in `make`.

  With time_weight "half", beta is that of the published code: 2000 to 5000 for Stable Diffusion at
  512 pixels.
  """
  return make(
    pipeline,
    lambda w, l, p: losses.dpo_loss(w, l, beta=beta, p=p),
    time_weight=time_weight,
    num_draws=num_draws,
  )


def make_ipo(pipeline: Pipeline, *, tau: float, time_weight: str, num_draws: int) -> Method:
  """IPO (arXiv:2310.12036 eq. 17) on denoising errors; the others as in `make`.

  The target, 1 / (2 tau) for a plain label, is on the scale of the log-ratio that `time_weight`
  chooses.
  """
  return make(
    pipeline,
    lambda w, l, p: losses.ipo_loss(w, l, tau=tau, p=p),
    time_weight=time_weight,
    num_draws=num_draws,
  )


def make(
  pipeline: Pipeline, preference_loss: PreferenceLoss, *, time_weight: str, num_draws: int
) -> Method:
  """A method from any loss on log-ratios.

  Args:
    pipeline: the model. Only the network without guidance is used.
    preference_loss: `(log_ratio_w, log_ratio_l, p) -> [B]`. Any loss L on plain labels has a soft
      one, its mean p L(w, l) + (1 - p) L(l, w). A loss that leaves `p` unused must not see ties:
      `make(...)._replace(data=Stored(examples.choices))` refuses them.
    time_weight: "half" (the published convention) or "elbo" (nats, with a larger variance).
    num_draws: noise levels, spread evenly over the range, and noises that the log-ratio of a pair
      is averaged over; 1 in all published code. The loss of a noisy log-ratio is above that of its
      mean, and is least at smaller log-ratios: fewer draws learn less from the same pairs.
  """
  weight = log_ratios.make_time_weight(time_weight, pipeline.levels.num_steps)
  if num_draws < 1:
    raise ValueError(f"config.method.num_draws: expected at least 1, got {num_draws}")

  def loss(variables, frozen, batch: Finished, key):
    p = batch.labels["p"]
    # The same draws for both samples of a pair.
    row, eps = forward.draw(
      key, pipeline.levels, len(p), batch.x_0.shape[2:], num_draws=num_draws
    )
    x_0, cond = jax.tree.map(
      lambda leaf: leaf.repeat(num_draws, axis=0), (batch.x_0, batch.cond)
    )
    log_ratio = log_ratios.denoising_log_ratio(
      variables,
      frozen["reference"],
      pipeline.conditional.denoise_fn,
      for_both(row),
      pipeline.prediction_type,
      unpair(x_0),
      for_both(eps),
      for_both(cond),
      weight,
    )
    log_ratio_w, log_ratio_l = (
      one.reshape(len(p), num_draws).mean(axis=1) for one in winner_and_loser(log_ratio)
    )
    values = preference_metrics(log_ratio_w, log_ratio_l, p)
    return preference_loss(log_ratio_w, log_ratio_l, p), values

  return Method(loss, Stored(examples.pairs))
