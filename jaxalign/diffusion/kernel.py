"""The kernel of one denoising step: the Gaussian of x_s given x_t, which everything shares.

Rollouts, losses, KLs and back-propagation all ask the same kernel, so the importance ratio of
unchanged parameters is 1. Which step it is, a row of the step table says; rows are data.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.diffusion import gaussian
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Moments
from jaxalign.types import Array, DenoiseFn, Params, at_least_float32

# Reduces elementwise log-probabilities [B, *D] to [B]. It has no default: a clip range tuned for
# the mean over latent dimensions means nothing for the sum.
ReduceFn = Callable[[Array], Array]


class Kernel(NamedTuple):
  """A network and the transition that makes a Gaussian of its prediction.

  denoise_fn: guidance included; see `types.DenoiseFn`.
  transition: `(x_t, prediction, row) -> (mean, std)`, one of `transitions`.
  """

  denoise_fn: DenoiseFn
  transition: Callable[[Array, Array, StepTable], Moments]

  def moments(self, variables: Params, x_t: Array, row: StepTable, cond: Any) -> Moments:
    """Mean `[B, *D]` and std `[B, 1, ...]` of x_s given x_t, in float32; `row` has fields `[B]`."""
    prediction = at_least_float32(self.denoise_fn(variables, x_t, row.t, cond))
    return self.transition(x_t, prediction, row)

  def log_prob(
    self,
    variables: Params,
    x_t: Array,  # [B, *D]
    x_s: Array,  # [B, *D]
    row: StepTable,  # fields [B]
    cond: Any,
    reduce_fn: ReduceFn,
  ) -> Array:  # [B]
    """Log-probability of the step x_t -> x_s, differentiable in `variables`."""
    mean, std = self.moments(variables, x_t, row, cond)
    return reduce_fn(transition_log_prob(x_s, mean, std))


def transition_log_prob(x_s: Array, mean: Array, std: Array) -> Array:  # [B, *D]
  """Elementwise log-probability of a step, with x_s held constant and 0 where std = 0.

  A deterministic step has no density; 0 gives it a ratio of exactly 1 and no gradient, so it drops
  out of every sum over steps. The gradient reaches `mean` only: through x_s it would cancel the
  policy gradient.
  """
  stochastic = std > 0
  value = gaussian.log_prob(jax.lax.stop_gradient(x_s), mean, jnp.where(stochastic, std, 1.0))
  return jnp.where(stochastic, value, 0.0)


def mean_over_latents(elementwise: Array) -> Array:  # [B, *D] -> [B]
  """The reduction of the policy-gradient family; its clip ranges are tuned for it."""
  return jnp.mean(elementwise, axis=tuple(range(1, elementwise.ndim)))


def for_all(row: StepTable, count: int) -> StepTable:
  """A row of scalars for each of `count` examples, fields `[count]`."""
  return jax.tree.map(lambda field: jnp.full((count,), field), row)
