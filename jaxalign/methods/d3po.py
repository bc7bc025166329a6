"""D3PO: direct preference optimisation of every step of sampled trajectories (arXiv:2311.13231).

Two chains from one initial noise; of each pair of steps the log-ratios to the reference are exact
Gaussians, clipped (eq. 12 and official code), and go into DPO's loss. As in DDPO, log-probabilities
are means over latent dimensions, for which the published beta of 0.1 and clip range are tuned.
"""

import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import kernel as kernel_lib
from jaxalign.diffusion import log_ratios
from jaxalign.labels.pairs import best_and_worst
from jaxalign.methods.base import Method, Rollouts
from jaxalign.methods.batches import (
  Steps,
  for_both,
  preference_metrics,
  unpair,
  winner_and_loser,
)
from jaxalign.pipeline import Pipeline


def make(pipeline: Pipeline, *, beta: float, clip_range: float) -> Method:
  """D3PO; `clip_range` in (0, 1) bounds each step's probability ratio to the reference."""

  def loss(variables, frozen, batch: Steps, key):
    del key  # nothing is random: the steps were sampled before
    log_ratio = log_ratios.step_log_ratio(
      pipeline.kernel,
      variables,
      frozen["reference"],
      unpair(batch.x_t),
      unpair(batch.x_s),
      for_both(batch.row),
      batch.cond._replace(cond=for_both(batch.cond.cond)),
      kernel_lib.mean_over_latents,
    )
    clipped = losses.clip_log_ratio(log_ratio, clip_range=clip_range)
    log_ratio_w, log_ratio_l = winner_and_loser(clipped)
    p = jnp.ones_like(log_ratio_w)  # rewards order a pair, and a tie has weight 0
    values = preference_metrics(*winner_and_loser(log_ratio), p)
    is_clipped = (clipped != log_ratio).astype(clipped.dtype)
    values["preference/clip_frac"] = is_clipped.reshape(-1, 2).mean(axis=1)
    loss = losses.dpo_loss(log_ratio_w, log_ratio_l, beta=beta, p=p)
    return batch.labels["weight"] * loss, values

  return Method(loss, Rollouts(best_and_worst, shared_noise=True))
