"""Losses of a differentiable reward."""

import jax

from jaxalign.types import Array


def reward_loss(
  reward: Array,  # [B]
  *,
  target: float | None,
) -> Array:  # [B]
  """Minus the reward, or with a target its shortfall.

    loss = -r                   DRaFT (arXiv:2309.17400)
    loss = relu(target - r)     ReFL (arXiv:2304.05977): no gradient once the target is reached
  """
  return -reward if target is None else jax.nn.relu(target - reward)
