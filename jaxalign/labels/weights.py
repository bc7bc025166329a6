"""Weights of finished samples, for reward-weighted likelihood: how much each is learned from.

The mean weight is 1, so that the loss is on the scale of the plain one whatever the rewards are.
"""

import jax
import jax.numpy as jnp

from jaxalign.types import Array


def exponential_weights(rewards: Array, *, gamma: float) -> Array:  # [B] -> [B]
  """`softmax(gamma * rewards) * B`: reward-weighted regression (RWR; arXiv:2305.13301, section 5).

  Weighted by it, samples of p are samples of p(x) exp(gamma r(x)) / Z: the optimum of
  KL-regularised alignment at beta = 1 / gamma. The official code calls gamma a temperature.
  """
  rewards = jnp.asarray(rewards)
  return jax.lax.stop_gradient(jax.nn.softmax(gamma * rewards) * rewards.size)


def sparse_weights(rewards: Array, *, share: float) -> Array:  # [B] -> [B]
  """`1 / s` for rewards of at least the (1 - share) quantile, else 0: RWR with sparse weights.

  s is the share of rewards that are: `share`, and more where several are equal to the quantile.
  (arXiv:2305.13301, appendix; its official code keeps the best 10 %.)
  """
  rewards = jnp.asarray(rewards)
  kept = (rewards >= jnp.quantile(rewards, 1.0 - share)).astype(jnp.float32)
  return jax.lax.stop_gradient(kept / jnp.mean(kept))
