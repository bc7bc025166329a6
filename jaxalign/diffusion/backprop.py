"""Sampling that a reward can be differentiated through: windows over one chain.

Full back-propagation (DRaFT), the last K steps (DRaFT-K), a random number of them (AlignProp), one
step at a random place (ReFL) and a re-noised last step (DRaFT-LV) differ only in which steps of the
chain carry gradients. Noise and values are those of `rollout` with the same key.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.diffusion import gaussian, log_ratios, predictions, schedules
from jaxalign.diffusion.kernel import Kernel, for_all
from jaxalign.diffusion.schedules import StepTable
from jaxalign.types import Array, Key, Params, at_least_float32


def last_steps(
  key: Key,
  kernel: Kernel,
  variables: Params,
  reference: Params | None,
  table: StepTable,
  x_T: Array,  # [B, *D]
  cond: Any,
  *,
  num_steps: int,
  first: Array | int = 0,
) -> tuple[Array, Array]:  # [B, *D], [B]
  """x_0 with gradients through the last `num_steps` steps, and their KL to `reference` in nats.

  Several steps are each recomputed in the backward pass, so that memory holds one latent a step and
  the activations of a single one. The steps before the window run without any of that.

  Args:
    num_steps: K, static: memory grows with it.
    first: steps below this index carry no gradient either. It may be traced: which steps are
      differentiated is then decided at run time, in a program that holds `num_steps` of them.
    reference: None returns a KL of 0 without evaluating anything.

  Raises ValueError unless 1 <= num_steps <= S.
  """
  S = table.num_steps
  if not 1 <= num_steps <= S:
    raise ValueError(f"expected 1 to {S} steps to differentiate through, got {num_steps}")
  constant = jax.lax.stop_gradient(variables)

  def step(variables, x_t, i):
    return _step(key, kernel, variables, reference, table, x_t, i, cond)

  def frozen_step(x_t, i):
    x_s, kl = step(constant, x_t, i)
    return jax.lax.stop_gradient(x_s), jnp.zeros_like(kl)

  live_step = jax.checkpoint(step) if num_steps > 1 else step

  def body(x_t, i):
    if isinstance(first, int) and first <= S - num_steps:
      return live_step(variables, x_t, i)
    return jax.lax.cond(
      i < first, lambda x: frozen_step(x, i), lambda x: live_step(variables, x, i), x_t
    )

  x = _without_gradient(key, kernel, constant, table, x_T, cond, S - num_steps)
  steps = jnp.arange(S - num_steps, S, dtype=jnp.int32)
  x_0, kl = jax.lax.scan(body, x, steps)
  return x_0, jnp.sum(kl, axis=0)


def one_prediction(
  key: Key,
  kernel: Kernel,
  variables: Params,
  table: StepTable,
  prediction_type: str,
  x_T: Array,  # [B, *D]
  cond: Any,
  *,
  i: Array,  # [] int32, may be traced
) -> Array:  # [B, *D]
  """The network's x_0 at step `i`, with a gradient through that one prediction (ReFL).

  Xu et al. 2023 (arXiv:2304.05977), algorithm 1.
  """
  x_t = _without_gradient(key, kernel, variables, table, x_T, cond, i)
  row = table[jnp.full(x_T.shape[:1], i)]
  prediction = at_least_float32(kernel.denoise_fn(variables, x_t, row.t, cond))
  x_0, _ = predictions.to_x_0_and_eps(prediction, x_t, row.alpha_t, row.sigma_t, prediction_type)
  return x_0


def noised_last_step(
  key: Key,
  kernel: Kernel,
  variables: Params,
  table: StepTable,
  x_0: Array,  # [B, *D], sampled
  cond: Any,
) -> Array:  # [B, *D]
  """The last step taken again from freshly noised samples, with a gradient through it (DRaFT-LV).

  Clark et al. 2023 (arXiv:2309.17400), section 4.2: many cheap draws of the one-step gradient for
  one rollout.
  """
  key_noise, key_step = jax.random.split(key)
  row = for_all(table[-1], len(x_0))
  x_0 = jax.lax.stop_gradient(x_0)
  eps = jax.random.normal(key_noise, x_0.shape)
  x_t = schedules.add_noise(x_0, eps, row.alpha_t, row.sigma_t)
  mean, std = kernel.moments(variables, x_t, row, cond)
  return gaussian.sample(key_step, mean, std)


def _step(key, kernel, variables, reference, table, x_t, i, cond):
  """One step of the chain and its KL, `([B, *D], [B])`."""
  row = table[jnp.full(x_t.shape[:1], i)]
  moments = kernel.moments(variables, x_t, row, cond)
  x_s = gaussian.sample(jax.random.fold_in(key, i), *moments)
  if reference is None:
    return x_s, jnp.zeros(x_t.shape[0])
  return x_s, log_ratios.kl_of_moments(moments, kernel.moments(reference, x_t, row, cond))


def _without_gradient(key, kernel, variables, table, x_T, cond, num_steps):
  """x after the first `num_steps` steps, a constant; `num_steps` may be traced."""
  variables = jax.lax.stop_gradient(variables)

  def body(i, x_t):
    return _step(key, kernel, variables, None, table, x_t, i, cond)[0]

  x = jax.lax.stop_gradient(at_least_float32(x_T))
  return jax.lax.stop_gradient(jax.lax.fori_loop(0, num_steps, body, x))
