"""DiffusionNFT: policy improvement on the forward process, without likelihoods (arXiv:2509.16117).

An old copy of the policy samples, by any sampler. Its rewards become optimality probabilities, and
the policy is regressed on noised samples as the positive part of the old one, against its negative.
"""

import jax.numpy as jnp

from jaxalign import losses
from jaxalign.diffusion import forward, predictions, schedules
from jaxalign.diffusion.kernel import mean_over_latents
from jaxalign.labels import advantages
from jaxalign.methods.base import Method, Rollouts
from jaxalign.methods.batches import Finished
from jaxalign.pipeline import Pipeline


def make(
  pipeline: Pipeline,
  *,
  advantage: advantages.Estimator,
  mix: float,
  advantage_limit: float,
  reference_weight: float,
  decay_rate: float,
  decay_max: float,
) -> Method:
  """DiffusionNFT (algorithm 1).

  Args:
    pipeline: the model. Only the network without guidance is trained.
    advantage: in the paper of groups, with the standard deviation of the batch.
    mix: how much of the policy the positive and the negative one hold; beta of the paper, 0.1 to 1.
    advantage_limit: at this advantage a sample is optimal, at minus this its contrary, 5 in the
      published code; as there, the loss counts as often.
    reference_weight: of the squared difference to the reference's prediction, 1e-4.
    decay_rate, decay_max: after iteration n the old policy keeps min(decay_rate n, decay_max) of
      itself and takes the rest from the trained one: 0.001 and 0.5.
  """

  def loss(variables, frozen, batch: Finished, key):
    advantage_of = batch.labels["advantages"]
    r = 0.5 + 0.5 * jnp.clip(advantage_of / advantage_limit, -1.0, 1.0)
    x_0 = batch.x_0
    row, eps = forward.draw(key, pipeline.levels, len(r), x_0.shape[1:])
    x_t = schedules.add_noise(x_0, eps, row.alpha_t, row.sigma_t)

    def predict(variables):
      return forward.predict(pipeline.conditional.denoise_fn, variables, x_t, row, batch.cond)

    def to_x_0(prediction):
      kind = pipeline.prediction_type
      return predictions.to_x_0_and_eps(prediction, x_t, row.alpha_t, row.sigma_t, kind)[0]

    prediction, old = predict(variables), predict(frozen["old"])
    contrast = losses.nft_loss(x_0, to_x_0(prediction), to_x_0(old), r, mix=mix)
    drift = mean_over_latents(jnp.square(prediction - predict(frozen["reference"])))
    return advantage_limit * contrast + reference_weight * drift, {
      "nft/contrast": mean_over_latents(jnp.square(prediction - old)),
      "nft/optimality": r,
      "reference/drift": drift,
    }

  label = advantages.of_every_sample(advantage)
  data = Rollouts(label, by="sample", memory=advantage.init, sampled_by="old")
  copies = {"old": lambda iteration: min(decay_rate * iteration, decay_max)}
  return Method(loss, data, copies=copies)
