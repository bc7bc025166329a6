"""Sampling whole trajectories, with the log-probability of every step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.diffusion import gaussian
from jaxalign.diffusion.kernel import Kernel, ReduceFn, for_all, transition_log_prob
from jaxalign.diffusion.schedules import StepTable
from jaxalign.diffusion.transitions import Moments
from jaxalign.types import Array, Key, Params, at_least_float32


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


def rollout(
  key: Key,
  kernel: Kernel,
  variables: Params,
  table: StepTable,
  x_T: Array,  # [B, *D]
  cond: Any,
  reduce_fn: ReduceFn,
) -> Rollout:
  """Samples all S steps of `table` from the initial noise x_T in one scan.

  The noise of step i comes from fold_in(key, i). `x` is differentiable in `variables` by
  reparameterisation; for the gradient of `log_prob` use `Kernel.log_prob` on the stored trajectory,
  whose x_t is data. Another table of as many steps needs no other program.
  """
  x_T = at_least_float32(x_T)

  def body(x_t: jax.Array, numbered: tuple[Array, StepTable]):
    x_s, (mean, std) = _step(key, kernel, variables, x_t, numbered, cond)
    log_prob = reduce_fn(transition_log_prob(x_s, mean, std))
    return x_s, (x_s, log_prob)

  _, (x_s, log_prob) = jax.lax.scan(body, x_T, _numbered(table))
  return Rollout(jnp.concatenate([x_T[None], x_s]), log_prob)


def end(
  key: Key,
  kernel: Kernel,
  variables: Params,
  table: StepTable,
  x_T: Array,  # [B, *D]
  cond: Any,
) -> jax.Array:  # [B, *D]
  """The x_0 of `rollout` with the same key, in the memory of a single step."""

  def body(x_t: jax.Array, numbered: tuple[Array, StepTable]):
    return _step(key, kernel, variables, x_t, numbered, cond)[0], None

  return jax.lax.scan(body, at_least_float32(x_T), _numbered(table))[0]


def _numbered(table: StepTable) -> tuple[Array, StepTable]:
  """The steps of a table with their numbers, to scan over."""
  return jnp.arange(table.num_steps, dtype=jnp.int32), jax.tree.map(jnp.asarray, table)


def _step(
  key: Key,
  kernel: Kernel,
  variables: Params,
  x_t: jax.Array,
  numbered: tuple[Array, StepTable],
  cond: Any,
) -> tuple[Array, Moments]:
  """x_s of one step, `[B, *D]`, and the moments of the Gaussian that it is drawn from."""
  i, row = numbered
  moments = kernel.moments(variables, x_t, for_all(row, len(x_t)), cond)
  return gaussian.sample(jax.random.fold_in(key, i), *moments), moments
