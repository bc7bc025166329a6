"""Losses as pure functions: `[B]` arrays in, one `[B]` array out. Needs jax and nothing else."""

from jaxalign.losses.policy_gradient import (
  approx_kl_k2,
  clip_fraction,
  clipped_pg_loss,
  importance_ratio,
  reinforce_loss,
)

__all__ = [
  "approx_kl_k2",
  "clip_fraction",
  "clipped_pg_loss",
  "importance_ratio",
  "reinforce_loss",
]
