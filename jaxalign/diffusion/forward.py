"""The forward process in losses: noise levels and noises drawn for finished samples, and errors.

Every loss on finished samples starts here, so that all of them draw alike.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.diffusion import predictions, schedules
from jaxalign.diffusion.kernel import mean_over_latents
from jaxalign.diffusion.schedules import StepTable
from jaxalign.types import Array, DenoiseFn, Key, Params, at_least_float32


def draw(
  key: Key,
  levels: StepTable,
  num_examples: int,
  latent_shape: tuple[int, ...],
  *,
  num_draws: int = 1,
) -> tuple[StepTable, Array]:  # fields [B n], [B n, *D]
  """Noise levels and noises, `num_draws` of each example one after another.

  The levels of an example are spread evenly over the rows of `levels` from a random offset, so that
  each is uniform over all rows.
  """
  key_level, key_eps = jax.random.split(key)
  offset = jax.random.uniform(key_level, (num_examples, 1))
  share = (jnp.arange(num_draws) + offset) / num_draws
  last = levels.num_steps - 1
  level = jnp.minimum((share * levels.num_steps).astype(jnp.int32), last).reshape(-1)
  return levels[level], jax.random.normal(key_eps, (len(level), *latent_shape))


def predict(
  denoise_fn: DenoiseFn, variables: Params, x_t: Array, row: StepTable, cond: Any
) -> Array:  # [B, *D]
  """The network's prediction in float32."""
  return at_least_float32(denoise_fn(variables, x_t, row.t, cond))


def denoising_error(
  denoise_fn: DenoiseFn,
  variables: Params,
  row: StepTable,  # fields [B]: the noise level of each example
  prediction_type: str,
  x_0: Array,  # [B, *D]
  eps: Array,  # [B, *D]
  cond: Any,
) -> Array:  # [B]
  """The loss of diffusion training: the squared error of the prediction, a mean over latents.

  Ho et al. 2020 (arXiv:2006.11239) eq. 14 where noise is predicted, Lipman et al. 2023
  (arXiv:2210.02747) eq. 23 where it is velocity.
  """
  x_t = schedules.add_noise(x_0, eps, row.alpha_t, row.sigma_t)
  target = predictions.target(x_0, eps, row.alpha_t, row.sigma_t, prediction_type)
  return mean_over_latents(jnp.square(predict(denoise_fn, variables, x_t, row, cond) - target))
