"""Rematerialisation (gradient checkpointing): what a block keeps for its gradient, by name."""

from typing import Any

import flax.linen as nn
import jax


def _is_convolution(primitive, *_, **__) -> bool:
  return primitive is jax.lax.conv_general_dilated_p


# What a residual or transformer block keeps for its gradient, by name; the rest of the block is
# computed again. None is everything. Products with a batch of their own, which "dots" leaves out,
# are those of attention: its logits are what memory has least room for.
_policies = jax.checkpoint_policies
REMAT: dict[str, Any] = {
  "none": None,
  "dots": _policies.save_from_both_policies(
    _policies.dots_with_no_batch_dims_saveable, _is_convolution
  ),
  "full": _policies.nothing_saveable,
}


def rematerialized(block: Any, remat: str) -> Any:
  """The class of a block that keeps what `remat`, a name of `REMAT`, says."""
  return block if remat == "none" else nn.remat(block, policy=REMAT[remat])
