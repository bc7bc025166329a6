"""RAFT: the policy is fitted to the best of its own samples (Dong et al. 2023, arXiv:2304.06767).

Best-of-n as a teacher: what the best of several chains shows, one chain learns. The others cost
their sampling and no gradient.
"""

import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import forward
from jaxalign.labels.base import Labels
from jaxalign.methods.base import Method, Rollouts, refresh_every
from jaxalign.methods.batches import Finished
from jaxalign.pipeline import Pipeline


def make(pipeline: Pipeline, *, keep: int, refresh: int) -> Method:
  """RAFT (algorithm 1): the loss of diffusion training on the best samples of each record.

  Args:
    pipeline: the model. Only the network without guidance is trained.
    keep: samples of each record that are trained on, fewer than the group has.
    refresh: iterations after which the policy that samples becomes the one that is trained; 0 draws
      from the reference for ever.

  Raises:
    ValueError: a `keep` below 1; and once groups are known, one that leaves no sample out.
  """
  if keep < 1:
    raise ValueError(f"config.method.keep: expected at least 1, got {keep}")

  def label(memory, scores, key):
    del key  # nothing is random
    # Without a verdict a sample is the last choice, and where it must be taken it counts nothing.
    total = jnp.where(scores.valid, scores.total, -jnp.inf)
    P, K = total.shape
    if keep >= K:
      raise ValueError(
        f"config.method.keep: expected fewer than config.batch.group_size = {K}, got {keep}"
      )
    best = jnp.argsort(-total, axis=1, stable=True)[:, :keep]  # [P, keep]
    samples = (best + K * jnp.arange(P)[:, None]).reshape(-1).astype(jnp.int32)
    kept = jnp.take_along_axis(total, best, axis=1).reshape(-1)
    known = jnp.isfinite(kept)
    weight = known * (known.size / jnp.maximum(1, known.sum()))
    metrics = {"reward/kept": jnp.mean(kept, where=known)}
    return memory, Labels(samples, {"weight": weight}, metrics)

  def loss(variables, frozen, batch: Finished, key):
    del frozen
    row, eps = forward.draw(key, pipeline.levels, len(batch.x_0), batch.x_0.shape[1:])
    denoise_fn, prediction_type = pipeline.conditional.denoise_fn, pipeline.prediction_type
    error = forward.denoising_error(
      denoise_fn, variables, row, prediction_type, batch.x_0, eps, batch.cond
    )
    return losses.weighted_error_loss(error, batch.labels["weight"]), {"denoising/error": error}

  data = Rollouts(label, by="sample", sampled_by="old")
  return Method(loss, data, copies={"old": refresh_every(refresh)})
