"""Denoising diffusion policy optimisation (Black et al. 2023, arXiv:2305.13301).

Denoising is a Markov decision process: the state is (condition, t, x_t), the action x_s, its
probability the Gaussian of the sampler's step, and the only reward comes with the finished sample.
Log-probabilities are means over the D latent dimensions, so the ratio is the D-th root of the true
one: a clip range of 1e-4 allows a log-ratio of 1.6 nats at D = 16384, and of 0.05 at D = 512.

With `kl_weight` the objective is E[r] - kl_weight KL(theta || ref), the KL that of whole
trajectories in nats. Its gradient is exact: the score function of the KL, which is taken off the
reward, plus the gradient of each step's own KL, here divided by D like everything else. That holds
where the advantage only subtracts a baseline (leave_one_out); one that divides by a standard
deviation makes the reward's part as much larger.

The importance ratio is 1 by construction in the first update after a rollout; docs/exactness.md
says why, and what it is in later ones.
"""

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import kernel as kernel_lib
from jaxalign.diffusion import log_ratios
from jaxalign.labels import advantages
from jaxalign.methods.base import Method, Rollouts
from jaxalign.methods.batches import Steps
from jaxalign.pipeline import Pipeline
from jaxalign.types import Array


def make_importance_sampling(
  pipeline: Pipeline, *, clip_range: float, kl_weight: float, advantage: advantages.Estimator
) -> Method:
  """DDPO-IS: the clipped surrogate on single steps (section 4.3), for several updates a rollout."""

  def loss(variables, frozen, batch: Steps, key):
    del key  # no randomness
    log_prob = _log_prob(variables, pipeline, batch)
    old = _old_log_prob(log_prob, batch)
    advantage_of = batch.labels["advantages"]
    surrogate = losses.clipped_pg_loss(log_prob, old, advantage_of, clip_range=clip_range)
    clipped = losses.clip_fraction(log_prob, old, clip_range=clip_range)
    penalty, values = _kl_penalty(variables, frozen, pipeline, batch, kl_weight)
    values |= _diagnostics(log_prob, batch) | {"policy/clip_frac": clipped}
    return surrogate + penalty, values

  return Method(loss, _rollouts(advantage, kl_weight))


def make_score_function(
  pipeline: Pipeline, *, kl_weight: float, advantage: advantages.Estimator
) -> Method:
  """DDPO-SF: REINFORCE on single steps (section 4.3); one update a rollout keeps it on-policy."""

  def loss(variables, frozen, batch: Steps, key):
    del key  # no randomness
    log_prob = _log_prob(variables, pipeline, batch)
    penalty, values = _kl_penalty(variables, frozen, pipeline, batch, kl_weight)
    surrogate = losses.reinforce_loss(log_prob, batch.labels["advantages"])
    return surrogate + penalty, values | _diagnostics(log_prob, batch)

  return Method(loss, _rollouts(advantage, kl_weight)._replace(on_policy=True))


def _rollouts(advantage: advantages.Estimator, kl_weight: float) -> Rollouts:
  """Every step of every sample, with the advantage of its trajectory."""
  if advantage.per_reward and kl_weight:
    raise ValueError(
      "config.method.kl_weight: expected 0 with config.advantage.per_reward, which estimates the "
      f"advantages of rewards alone; got {kl_weight:g}"
    )
  label = advantages.of_every_sample(advantage)
  return Rollouts(label, memory=advantage.init, kl_weight=kl_weight)


def _log_prob(variables, pipeline: Pipeline, batch: Steps) -> Array:
  return pipeline.kernel.log_prob(
    variables, batch.x_t, batch.x_s, batch.row, batch.cond, kernel_lib.mean_over_latents
  )


def _old_log_prob(log_prob: Array, batch: Steps) -> Array:  # [B]
  """Of the policy that sampled. While it is the policy itself, that is this very forward pass.

  The rollout is another program, whose roundings are its own: its value would make the first ratio
  1 but for those.
  """
  return jnp.where(batch.fresh, jax.lax.stop_gradient(log_prob), batch.log_prob)


def _kl_penalty(variables, frozen, pipeline: Pipeline, batch: Steps, kl_weight: float):
  """`(kl_weight KL / D [B], metrics)`; nothing is computed at weight 0."""
  if kl_weight == 0.0:
    return 0.0, {}
  kl = log_ratios.step_kl(
    pipeline.kernel, variables, frozen["reference"], batch.x_t, batch.row, batch.cond
  )
  return kl_weight * kl / batch.x_t[0].size, {"kl/step": kl}


def _diagnostics(log_prob: Array, batch: Steps) -> dict[str, Array]:
  old = _old_log_prob(log_prob, batch)
  return {
    "policy/ratio": losses.importance_ratio(log_prob, old),
    "policy/log_prob_gap": jnp.abs(log_prob - batch.log_prob),
    "policy/approx_kl": losses.approx_kl_k2(log_prob, old),
  }
