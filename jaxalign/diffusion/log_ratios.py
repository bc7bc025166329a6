"""Estimates of log p_theta(x) - log p_ref(x), the one input of every preference loss.

Two estimators: the denoising error of a noised sample, and the exact Gaussian of a sampled step.
Policy and reference see the same inputs; the gradient reaches the policy alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.checks import check_choice
from jaxalign.diffusion import gaussian, predictions, schedules
from jaxalign.diffusion.kernel import Kernel, ReduceFn, for_all, mean_over_latents
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Moments
from jaxalign.types import Array, DenoiseFn, Params, at_least_float32

# weight(step, x_0, prediction_type) -> scalar or [B], what a mean squared error of the network's
# prediction counts in the log-ratio at the noise levels `step`.
TimeWeight = Callable[[StepTable, Array, str], Array | float]


def denoising_log_ratio(
  params: Params,
  reference: Params,
  denoise_fn: DenoiseFn,
  step: StepTable,  # fields [B]: the noise level of each example
  prediction_type: str,
  x_0: Array,  # [B, *D]
  eps: Array,  # [B, *D]
  cond: Any,
  weight: TimeWeight,
) -> Array:  # [B]
  """Minus a weight times the policy's denoising error above the reference's, at one noise level.

    log_ratio = -weight(step) (e_theta - e_ref)

  e is the mean over latents of the squared error of the prediction, at the same x_t for both
  (Wallace et al. 2023, arXiv:2311.12908, eq. 14).
  """
  x_t = schedules.add_noise(x_0, eps, step.alpha_t, step.sigma_t)
  target = predictions.target(x_0, eps, step.alpha_t, step.sigma_t, prediction_type)
  prediction = at_least_float32(denoise_fn(params, x_t, step.t, cond))
  other = jax.lax.stop_gradient(at_least_float32(denoise_fn(reference, x_t, step.t, cond)))
  # As a product: the difference of two mean squares near 1 would have lost the digits that a beta
  # of 5000 asks for.
  excess = (prediction - other) * ((prediction - target) + (other - target))
  return -weight(step, x_0, prediction_type) * mean_over_latents(excess)


def make_time_weight(name: str, num_levels: int) -> TimeWeight:
  """The weight called "half" or "elbo"; ValueError for another name."""
  check_choice("config.method.time_weight", name, ("half", "elbo"))
  return half if name == "half" else make_elbo(num_levels)


def half(step: StepTable, x_0: Array, prediction_type: str) -> float:
  """0.5 at every level: the convention of Diffusion-DPO, whose beta is 2000 to 5000.

  No noise level and no dimension enters: a beta tuned at one image size is weaker at a larger one
  by the ratio of their latent dimensions.
  """
  del step, x_0, prediction_type
  return 0.5


def make_elbo(num_levels: int) -> TimeWeight:
  """The weight that makes the average over uniformly drawn levels a bound's difference in nats.

    log_ratio = -T / 2 (SNR_s - SNR_t) (|x_0 - x_0_theta|^2 - |x_0 - x_0_ref|^2)

  Kingma et al. 2021 (arXiv:2107.00630) eq. 13, with T = `num_levels` and the squared norm summed
  over latents. The level nearest to the data, from which no noise is left, has no finite weight and
  counts 0. Its variance over levels is far larger than that of `half`.
  """

  def weight(step, x_0, prediction_type):
    dimensions = x_0[0].size
    snr_t = jnp.square(step.alpha_t / step.sigma_t)
    last = step.sigma_s == 0
    snr_s = jnp.square(step.alpha_s / jnp.where(last, 1.0, step.sigma_s))
    change = jnp.where(last, 0.0, snr_s - snr_t)
    return 0.5 * num_levels * dimensions * change * _x_0_per_error(step, prediction_type)

  return weight


def _x_0_per_error(step: StepTable, prediction_type: str) -> Array | float:
  """|x_0 - x_0_theta|^2 for a squared error of 1 in the prediction."""
  zeros, ones = jnp.zeros_like(step.sigma_t), jnp.ones_like(step.sigma_t)
  x_0, _ = predictions.to_x_0_and_eps(ones, zeros, step.alpha_t, step.sigma_t, prediction_type)
  return jnp.square(x_0)


def step_log_ratio(
  kernel: Kernel,
  variables: Params,
  reference: Params,
  x_t: Array,  # [B, *D]
  x_s: Array,  # [B, *D]
  row: StepTable,  # fields [B]
  cond: Any,
  reduce_fn: ReduceFn,
) -> Array:  # [B]
  """log p_theta(x_s | x_t) - log p_ref(x_s | x_t) of one sampled step, exact.

  Their sum over the steps of a trajectory is its log-ratio, when `reduce_fn` sums.
  """
  step = (x_t, x_s, row, cond, reduce_fn)
  return kernel.log_prob(variables, *step) - jax.lax.stop_gradient(
    kernel.log_prob(reference, *step)
  )


def trajectory_kl(
  kernel: Kernel,
  variables: Params,
  reference: Params,
  table: StepTable,
  x: Array,  # [S + 1, B, *D], sampled with `variables`
  cond: Any,
) -> Array:  # [S, B]
  """KL(theta || ref) of every step of sampled trajectories, in nats: summed over latents, exact.

  The sum over steps estimates the trajectory KL, which bounds that of the samples from above.
  Deterministic steps count 0: where policy and reference differ there, the KL is infinite.
  """

  def body(_, step):
    row, x_t = step
    return None, step_kl(kernel, variables, reference, x_t, for_all(row, len(x_t)), cond)

  return jax.lax.scan(body, None, (jax.tree.map(jnp.asarray, table), x[:-1]))[1]


def step_kl(
  kernel: Kernel,
  variables: Params,
  reference: Params,
  x_t: Array,  # [B, *D]
  row: StepTable,  # fields [B]
  cond: Any,
) -> Array:  # [B]
  """KL(theta || ref) of the step from x_t in nats, summed over latents; 0 where std = 0."""
  from_policy = kernel.moments(variables, x_t, row, cond)
  from_reference = kernel.moments(reference, x_t, row, cond)
  return kl_of_moments(from_policy, from_reference)


def kl_of_moments(policy: Moments, reference: Moments) -> Array:  # [B]
  """`step_kl` from the two distributions, which share their std."""
  (mean, std), (reference_mean, _) = policy, reference
  stochastic = std > 0
  elementwise = gaussian.kl(mean, reference_mean, jnp.where(stochastic, std, 1.0))
  return jnp.sum(jnp.where(stochastic, elementwise, 0.0), axis=tuple(range(1, mean.ndim)))
