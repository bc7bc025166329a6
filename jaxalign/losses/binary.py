"""Losses on samples that are good or bad by themselves: thumbs up, thumbs down."""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, check_same_shape


def kto_loss(
  log_ratio: Array,  # [B]
  good: Array,  # [B], 1 or 0
  reference_point: Array,  # []
  *,
  beta: float,
  weight_good: float,
  weight_bad: float,
) -> Array:  # [B]
  """Kahneman-Tversky optimisation on log-ratios, one value per sample.

    h    = sigmoid(y beta (log_ratio - z)),      y = 1 of good samples, -1 of bad ones
    loss = weight_y (1 - h)

  Ethayarajh et al. 2024 (arXiv:2402.01306) eq. 8; for diffusion Li et al. 2024 (arXiv:2404.04465).
  `reference_point` is z, an estimate of the KL from the reference, without a gradient. At the
  reference (log_ratio = z = 0) the loss is half the weight, and its slope is largest.
  """
  check_same_shape(log_ratio=log_ratio, good=good)
  y = 2.0 * jax.lax.stop_gradient(good) - 1.0
  z = jax.lax.stop_gradient(reference_point)
  weight = jnp.where(good > 0, weight_good, weight_bad)
  return weight * jax.nn.sigmoid(-y * beta * (log_ratio - z))
