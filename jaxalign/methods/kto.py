"""Diffusion-KTO: samples that are good or bad by themselves, no pairs (arXiv:2404.04465).

The log-ratio to the reference is that of Diffusion-DPO, a denoising error at a random noise level,
drawn for each sample apart.
"""

import jax
import jax.numpy as jnp

from jaxalign import losses
from jaxalign.data import examples
from jaxalign.diffusion import forward, log_ratios
from jaxalign.methods.base import Method, Stored
from jaxalign.methods.batches import Finished
from jaxalign.pipeline import Pipeline


def make(
  pipeline: Pipeline, *, beta: float, time_weight: str, weight_good: float, weight_bad: float
) -> Method:
  """Diffusion-KTO with the utility of KTO (section 4 there; `losses.kto_loss`).

  Args:
    pipeline: the model. Only the network without guidance is used.
    beta: of log-ratios; with time_weight "half" twice that of the published code, 1000, which does
      not halve.
    time_weight: "half" or "elbo", see `log_ratios`.
    weight_good, weight_bad: what samples of the two kinds count. With n of each, weight_good times
      n_good over weight_bad times n_bad is recommended to be 1 to 4/3 (arXiv:2402.01306, eq. 9).
  """
  weight = log_ratios.make_time_weight(time_weight, pipeline.levels.num_steps)

  def loss(variables, frozen, batch: Finished, key):
    good = batch.labels["good"]
    row, eps = forward.draw(key, pipeline.levels, len(good), batch.x_0.shape[1:])
    log_ratio = log_ratios.denoising_log_ratio(
      variables,
      frozen["reference"],
      pipeline.conditional.denoise_fn,
      row,
      pipeline.prediction_type,
      batch.x_0,
      eps,
      batch.cond,
      weight,
    )
    # As published: of the batch itself, which is one gradient slice of all devices. KTO proper
    # pairs each condition with another's sample, for a third pass through both networks.
    z = jnp.maximum(0.0, jnp.mean(log_ratio))
    weights = {"weight_good": weight_good, "weight_bad": weight_bad}
    value = losses.kto_loss(log_ratio, good, z, beta=beta, **weights)
    right = jax.lax.stop_gradient(jnp.sign(log_ratio - z) * (2.0 * good - 1.0))
    return value, {
      "preference/accuracy": 0.5 + 0.5 * right,
      "preference/log_ratio": log_ratio,
      "preference/reference_point": jnp.full_like(log_ratio, z),
      "preference/good": good,
    }

  return Method(loss, Stored(examples.thumbs))
