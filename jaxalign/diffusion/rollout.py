"""Sampling trajectories, and scoring their steps again under other parameters.

Both go through `step_distribution`, so the importance ratio of unchanged parameters is 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.diffusion import gaussian
from jaxalign.diffusion.transitions import Moments, Process
from jaxalign.types import Array, DenoiseFn, Key, Params, at_least_float32

# Reduces elementwise log-probabilities [B, *D] to [B]. It has no default: a clip range tuned for
# the mean over latent dimensions means nothing for the sum.
ReduceFn = Callable[[Array], Array]


def mean_over_latents(elementwise: Array) -> Array:  # [B, *D] -> [B]
  """The reduction of the policy-gradient family; its clip ranges are tuned for it."""
  return jnp.mean(elementwise, axis=tuple(range(1, elementwise.ndim)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
  """A batch of sampled trajectories.

  Step i goes from `x[i]` to `x[i + 1]`.
  """

  x: Array  # [S + 1, B, *D] float32; x[0] is the initial noise, x[S] the clean sample
  log_prob: Array  # [S, B], nats, reduced by the caller's reduce_fn; 0 at deterministic steps

  @property
  def x_0(self) -> Array:  # [B, *D]
    return self.x[-1]


def step_distribution(
  params: Params,
  denoise_fn: DenoiseFn,
  process: Process,
  x_t: Array,  # [B, *D]
  i: Array,  # [B] int32, the step of each example
  cond: Any,
) -> Moments:
  """Mean `[B, *D]` and std `[B, 1, ...]` of x_s given x_t: the policy at step i, in float32."""
  step = process.table[i]
  prediction = at_least_float32(denoise_fn(params, x_t, step.t, cond))
  return process.transition(x_t, prediction, step)


def transition_log_prob(x_s: Array, mean: Array, std: Array) -> Array:  # [B, *D]
  """Elementwise log-probability of a step, with x_s held constant and 0 where std = 0.

  A deterministic step has no density; 0 gives it a ratio of exactly 1 and no gradient, so it drops
  out of every sum over steps. The gradient reaches `mean` only: through x_s it would cancel the
  policy gradient.
  """
  stochastic = std > 0
  value = gaussian.log_prob(jax.lax.stop_gradient(x_s), mean, jnp.where(stochastic, std, 1.0))
  return jnp.where(stochastic, value, 0.0)


def step_log_prob(
  params: Params,
  denoise_fn: DenoiseFn,
  process: Process,
  x_t: Array,  # [B, *D]
  x_s: Array,  # [B, *D]
  i: Array,  # [B] int32
  cond: Any,
  reduce_fn: ReduceFn,
) -> Array:  # [B]
  """Log-probability of the step x_t -> x_s under `params`, differentiable in `params`."""
  mean, std = step_distribution(params, denoise_fn, process, x_t, i, cond)
  return reduce_fn(transition_log_prob(x_s, mean, std))


def rollout(
  key: Key,
  params: Params,
  denoise_fn: DenoiseFn,
  process: Process,
  x_T: Array,  # [B, *D]
  cond: Any,
  reduce_fn: ReduceFn,
) -> Rollout:
  """Samples all S steps from the initial noise x_T in one scan.

  The noise of step i comes from fold_in(key, i). `x` is differentiable in `params` by
  reparameterisation; for the gradient of `log_prob` use `step_log_prob` on the stored trajectory,
  whose x_t is data.
  """
  x_T = at_least_float32(x_T)

  def body(x_t: jax.Array, i: jax.Array):
    per_example = jnp.full(x_t.shape[:1], i)
    mean, std = step_distribution(params, denoise_fn, process, x_t, per_example, cond)
    x_s = gaussian.sample(jax.random.fold_in(key, i), mean, std)
    log_prob = reduce_fn(transition_log_prob(x_s, mean, std))
    return x_s, (x_s, log_prob)

  steps = jnp.arange(process.table.num_steps, dtype=jnp.int32)
  _, (x_s, log_prob) = jax.lax.scan(body, x_T, steps)
  return Rollout(jnp.concatenate([x_T[None], x_s]), log_prob)
