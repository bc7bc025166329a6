"""Diagonal Gaussians, elementwise and in float32.

Nothing is reduced here. Whether the latent dimensions are averaged or summed changes what a clip
range or a beta means, so the caller writes the reduction. Nothing is detached either: a
policy-gradient loss passes `jax.lax.stop_gradient(x)`, a reparameterised one does not.
"""

import math

import jax
import jax.numpy as jnp

from jaxalign.types import Array, Key, at_least_float32

_HALF_LOG_TWO_PI = 0.5 * math.log(2.0 * math.pi)


def sample(key: Key, mean: Array, std: Array) -> Array:
  """mean + std z with z ~ N(0, I); float32, the shape of `mean`; `std` broadcasts against it."""
  mean = at_least_float32(mean)
  return mean + std * jax.random.normal(key, mean.shape, mean.dtype)


def log_prob(x: Array, mean: Array, std: Array) -> Array:
  """log N(x; mean, std^2) in nats per element, the shape of `x`.

    -(x - mean)^2 / (2 std^2) - log std - log(2 pi) / 2

  `std` broadcasts against `x` and must be positive.
  """
  x, mean = at_least_float32(x), at_least_float32(mean)
  return -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - _HALF_LOG_TWO_PI


def kl(mean_1: Array, mean_2: Array, std: Array) -> Array:
  """KL(N(mean_1, std^2) || N(mean_2, std^2)) in nats per element, the shape of `mean_1`.

    (mean_1 - mean_2)^2 / (2 std^2)

  `std` broadcasts against the means and must be positive.
  """
  mean_1, mean_2 = at_least_float32(mean_1), at_least_float32(mean_2)
  return 0.5 * jnp.square((mean_1 - mean_2) / std)
