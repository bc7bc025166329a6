"""Reward-weighted regression (RWR): denoising losses weighted by rewards (arXiv:2305.13301).

No likelihood and no reference: the policy is fitted to its own samples, the good ones more.
"""

import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import forward
from jaxalign.labels import weights as weights_lib
from jaxalign.labels.base import Labels
from jaxalign.methods.base import Method, Rollouts, refresh_every
from jaxalign.methods.batches import Finished
from jaxalign.pipeline import Pipeline


def make_exponential(pipeline: Pipeline, *, gamma: float, refresh: int) -> Method:
  """RWR (section 4.2 there): weights `softmax(gamma * reward)` over an iteration; see `make`.

  Fitted to samples of the reference, the optimum is the reference tilted by exp(gamma * reward),
  which is that of KL-regularised alignment at beta = 1 / gamma. Each refresh tilts once more.
  """
  return make(
    pipeline, lambda *scored: weights_lib.exponential_weights(*scored, gamma=gamma), refresh
  )


def make_sparse(pipeline: Pipeline, *, share: float, refresh: int) -> Method:
  """RWR with sparse weights: the best `share` of an iteration's samples, and no others."""
  if not 0.0 < share <= 1.0:
    raise ValueError(f"config.method.share: expected above 0, up to 1, got {share}")
  return make(pipeline, lambda *scored: weights_lib.sparse_weights(*scored, share=share), refresh)


def make(pipeline: Pipeline, weigh, refresh: int) -> Method:
  """A method from any `weigh(rewards [B], valid [B]) -> weights [B]`, of mean 1 over valid ones.

  Args:
    pipeline: the model. Only the network without guidance is trained.
    weigh: over all samples of an iteration.
    refresh: iterations after which the policy that samples becomes the one that is trained; 1
      samples from the policy itself, 0 from the reference for ever.
  """

  def label(memory, scores, key):
    del key  # nothing is random
    weight = weigh(jnp.ravel(jnp.asarray(scores.total)), jnp.ravel(jnp.asarray(scores.valid)))
    # How many samples of equal weight would say as much.
    effective = jnp.square(weight.sum()) / jnp.maximum(jnp.square(weight).sum(), 1e-30)
    metrics = {"weight/max": weight.max(), "weight/effective": effective}
    samples = jnp.arange(weight.size, dtype=jnp.int32)
    return memory, Labels(samples, {"weight": weight}, metrics)

  def loss(variables, frozen, batch: Finished, key):
    del frozen
    weight = batch.labels["weight"]
    row, eps = forward.draw(key, pipeline.levels, len(weight), batch.x_0.shape[1:])
    denoise_fn, prediction_type = pipeline.conditional.denoise_fn, pipeline.prediction_type
    error = forward.denoising_error(
      denoise_fn, variables, row, prediction_type, batch.x_0, eps, batch.cond
    )
    return losses.weighted_error_loss(error, weight), {"denoising/error": error}

  data = Rollouts(label, by="sample", sampled_by="old")
  return Method(loss, data, copies={"old": refresh_every(refresh)})
