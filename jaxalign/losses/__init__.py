"""Losses as pure functions: `[B]` arrays in, one `[B]` array out. Needs jax and nothing else."""

from jaxalign.losses.binary import kto_loss
from jaxalign.losses.direct import reward_loss
from jaxalign.losses.policy_gradient import (
  approx_kl_k2,
  clip_fraction,
  clipped_pg_loss,
  importance_ratio,
  reinforce_loss,
)
from jaxalign.losses.preference import clip_log_ratio, dpo_loss, implicit_accuracy, ipo_loss
from jaxalign.losses.regression import nft_loss, weighted_error_loss

__all__ = [
  "approx_kl_k2",
  "clip_fraction",
  "clip_log_ratio",
  "clipped_pg_loss",
  "dpo_loss",
  "implicit_accuracy",
  "importance_ratio",
  "ipo_loss",
  "kto_loss",
  "nft_loss",
  "reinforce_loss",
  "reward_loss",
  "weighted_error_loss",
]
