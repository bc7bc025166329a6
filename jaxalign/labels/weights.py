"""Weights of finished samples, for reward-weighted likelihood: how much each is learned from.

The mean weight is 1, so that the loss is on the scale of the plain one whatever the rewards are.
Samples without a verdict, `valid [B]` False, have the weight 0 and count in no mean.
"""

import jax
import jax.numpy as jnp

from jaxalign.types import Array


def exponential_weights(
  rewards: Array,  # [B]
  valid: Array | None = None,  # [B] bool; all by default
  *,
  gamma: float,
) -> Array:  # [B]
  """`softmax(gamma * rewards) * B`: reward-weighted regression (RWR; arXiv:2305.13301, section 5).

  Weighted by it, samples of p are samples of p(x) exp(gamma r(x)) / Z: the optimum of
  KL-regularised alignment at beta = 1 / gamma. The official code calls gamma a temperature.
  """
  rewards, valid = _known(rewards, valid)
  share = jax.nn.softmax(jnp.where(valid, gamma * rewards, -jnp.inf))
  return jax.lax.stop_gradient(jnp.where(valid, share * jnp.sum(valid), 0.0))


def sparse_weights(
  rewards: Array,  # [B]
  valid: Array | None = None,  # [B] bool; all by default
  *,
  share: float,
) -> Array:  # [B]
  """`1 / s` for rewards of at least the (1 - share) quantile, else 0: RWR with sparse weights.

  s is the share of rewards that are: `share`, and more where several are equal to the quantile.
  (arXiv:2305.13301, appendix; its official code keeps the best 10 %.)
  """
  rewards, valid = _known(rewards, valid)
  least = jnp.nanquantile(jnp.where(valid, rewards, jnp.nan), 1.0 - share)
  kept = (valid & (rewards >= least)).astype(jnp.float32)
  mean = jnp.sum(kept) / jnp.maximum(jnp.sum(valid), 1)
  return jax.lax.stop_gradient(jnp.where(valid, kept / mean, 0.0))


def _known(rewards: Array, valid: Array | None) -> tuple[jax.Array, jax.Array]:
  rewards = jnp.asarray(rewards)
  return rewards, jnp.ones(rewards.shape, bool) if valid is None else jnp.asarray(valid)
