"""Policy-gradient losses on log-probabilities of denoising steps, and their diagnostics.

`log_prob` is whatever reduction over latent dimensions the caller chose. It decides what a clip
range means: DDPO takes the mean, and its 1e-4 is meaningful only for that.
"""

import jax
import jax.numpy as jnp

from jaxalign.types import Array, check_same_shape


def reinforce_loss(
  log_prob: Array,  # [B]
  advantages: Array,  # [B]
) -> Array:  # [B]
  """Score-function loss, one value per example.

    loss = -A * log_prob

  Williams 1992; the DDPO-SF estimator of Black et al. 2023 (arXiv:2305.13301). Right
  for one update per batch of rollouts only: a second update is off-policy and needs the ratio.

  Gradient flows through `log_prob` only.
  """
  check_same_shape(log_prob=log_prob, advantages=advantages)
  return -jax.lax.stop_gradient(advantages) * log_prob


def clipped_pg_loss(
  log_prob: Array,  # [B]
  old_log_prob: Array,  # [B]
  advantages: Array,  # [B]
  *,
  clip_range: float,
) -> Array:  # [B]
  """Clipped surrogate loss, one value per example; c is `clip_range`.

    ratio = exp(log_prob - old_log_prob)
    loss  = -min(ratio * A, clip(ratio, 1 - c, 1 + c) * A)

  Schulman et al. 2017 (arXiv:1707.06347) eq. 7; per denoising step in Black et al. 2023
  (arXiv:2305.13301), DDPO-IS. The gradient is zero where moving on would only go further from the
  policy that sampled: A > 0 and ratio > 1 + c, or A < 0 and ratio < 1 - c. On the other side of
  the interval it is not clipped. At ratio 1 it equals the gradient of `reinforce_loss`.

  Gradient flows through `log_prob` only.
  """
  check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
  advantages = jax.lax.stop_gradient(advantages)
  ratio = importance_ratio(log_prob, old_log_prob)
  clipped_ratio = jnp.clip(ratio, 1.0 - clip_range, 1.0 + clip_range)
  return -jnp.minimum(ratio * advantages, clipped_ratio * advantages)


def importance_ratio(
  log_prob: Array,  # [B]
  old_log_prob: Array,  # [B]
) -> Array:  # [B]
  """`exp(log_prob - old_log_prob)`: the policy now over the policy that sampled.

  Exactly 1 at the first update on fresh rollouts. Infinite in float32 beyond a log-ratio of 88,
  where the gradient of `clipped_pg_loss` is NaN. Gradient flows through `log_prob` only.
  """
  check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
  return jnp.exp(log_prob - jax.lax.stop_gradient(old_log_prob))


def clip_fraction(
  log_prob: Array,  # [B]
  old_log_prob: Array,  # [B]
  *,
  clip_range: float,
) -> Array:  # [B], 0.0 or 1.0
  """1 where the ratio is outside `[1 - clip_range, 1 + clip_range]`, else 0; no gradient.

  The mean is the usual "clip fraction". It does not look at the advantage, so it is an upper bound
  on the share of examples whose gradient `clipped_pg_loss` removes.
  """
  ratio = importance_ratio(log_prob, old_log_prob)
  outside = (ratio < 1.0 - clip_range) | (ratio > 1.0 + clip_range)
  return outside.astype(ratio.dtype)


def approx_kl_k2(
  log_prob: Array,  # [B]
  old_log_prob: Array,  # [B]
) -> Array:  # [B], >= 0
  """Estimates `KL(old || new)` per example, from samples of the old policy; no gradient.

    k2 = (log_prob - old_log_prob)^2 / 2

  Schulman 2020, "Approximating KL divergence". Biased at third order, but free of cancellation:
  at the log-ratios of 1e-4 that DDPO clips at, `ratio - 1 - log(ratio)` has few digits left in
  float32. With log-probabilities averaged over latent dimensions it is not the KL in nats.
  """
  check_same_shape(log_prob=log_prob, old_log_prob=old_log_prob)
  return jax.lax.stop_gradient(0.5 * jnp.square(log_prob - old_log_prob))
