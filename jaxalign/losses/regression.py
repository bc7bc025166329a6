"""Losses that regress predictions on finished samples, weighted or contrasted by their rewards."""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, check_same_shape, expand_to


def weighted_error_loss(
  error: Array,  # [B], of denoising
  weight: Array,  # [B]
) -> Array:  # [B]
  """`weight * error`: reward-weighted likelihood, whose weights are at least 0 and of mean 1.

  Lee et al. 2023 (arXiv:2302.12192) eq. 3, and RWR in Black et al. 2023 (arXiv:2305.13301) eq. 6.
  With weights of 1 it is the loss of diffusion training.
  """
  check_same_shape(error=error, weight=weight)
  return jax.lax.stop_gradient(weight) * error


def nft_loss(
  x_0: Array,  # [B, *D], the finished sample
  x_0_theta: Array,  # [B, *D], as the policy predicts it from a noised x_0
  x_0_old: Array,  # [B, *D], as the policy that sampled predicts it
  optimality: Array,  # [B], in [0, 1]
  *,
  mix: float,
) -> Array:  # [B]
  """DiffusionNFT: a positive and a negative policy regressed on one sample (arXiv:2509.16117).

    x_+  = mix x_0_theta + (1 - mix) x_0_old
    x_-  = (1 + mix) x_0_old - mix x_0_theta
    loss = (r |x_+ - x_0|^2 / w_+ + (1 - r) |x_- - x_0|^2 / w_-) / mix

  Eq. 9 there, written in x_0: velocities and noises are affine in it. r is `optimality`, |.|^2 a
  mean over latents, and w the mean absolute error, without a gradient and at least 1e-5, as in
  the official code, whose beta is `mix`. At x_0_theta = x_0_old the two policies are one, and the
  gradient has the sign of 1 - 2 r.
  """
  check_same_shape(x_0=x_0, x_0_theta=x_0_theta, x_0_old=x_0_old)
  x_0_old = jax.lax.stop_gradient(x_0_old)
  difference = mix * (x_0_theta - x_0_old)
  of_latents = tuple(range(1, x_0.ndim))

  def self_normalized(prediction):
    error = prediction - x_0
    scale = jax.lax.stop_gradient(jnp.mean(jnp.abs(error), axis=of_latents))
    scaled = jnp.square(error) / expand_to(jnp.maximum(scale, 1e-5), error)
    return jnp.mean(scaled, axis=of_latents)

  positive, negative = (self_normalized(x_0_old + sign * difference) for sign in (1.0, -1.0))
  r = jax.lax.stop_gradient(optimality)
  return (r * positive + (1.0 - r) * negative) / mix
