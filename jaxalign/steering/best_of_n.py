"""Best-of-n sampling: of n chains for each record, the one with the highest reward.

The baseline of every other way to raise a reward, because how far it goes from the model is known
beforehand: the KL that Stiennon et al. 2020 (arXiv:2009.01325) compute with, which Beirami et al.
2024 (arXiv:2401.01879) prove to be a bound.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.diffusion import rollout as rollout_lib
from jaxalign.distributed import placement
from jaxalign.pipeline import Pipeline
from jaxalign.steering.sampler import Sampled, Sampler, make_chain
from jaxalign.types import Array, Key, at_least_float32


class _Best(NamedTuple):
  """The best draws so far, of m records."""

  reward: Array  # [m]
  x_0: Array  # [m, *D]
  samples: Any  # [m, ...]


def kl_bound(n: int) -> float:
  """log n - (n - 1) / n nats: the most that best-of-n can be from the model that it draws from.

  Reached where no two samples have the same reward; ties bring the two nearer (arXiv:2401.01879).
  """
  return math.log(n) - (n - 1) / n


def make(pipeline: Pipeline, *, n: int) -> Sampler:
  """Draws n chains for each record and keeps the one whose reward is highest, the first of equals.

  The first draw is the chain's own, from `x_T` and the key as they are given; n = 1 is the chain to
  the bit, trajectories included. Others start from noise of their own. Draws follow one another and
  only the best so far is kept: memory is that of two microbatches, whatever n is. `info["reward"]`
  is that of the one kept; one that is not a number ranks last, as minus infinity.

  Raises ValueError unless n is a whole number of at least 1, and the pipeline has a reward that
  runs on the device.
  """
  if not isinstance(n, int) or isinstance(n, bool) or n < 1:
    raise ValueError(f"sampler best_of_n: expected n, a whole number of at least 1, got {n!r}")
  if pipeline.reward is None:
    raise ValueError(
      "sampler best_of_n: expected a reward that runs on the device, to rank samples by; found "
      "none\nname one: --sampler_reward=NAME, or evaluation.sampler_rewards in a config"
    )
  reward, chain = pipeline.reward, make_chain(pipeline)

  def value(frozen, samples, query):
    found = reward(frozen, samples, query)
    return jnp.where(jnp.isnan(found), -jnp.inf, found)

  def sample(key, variables, frozen, inputs, table):
    if inputs.query is None:
      raise ValueError("sampler best_of_n: expected what System.tokenize returns, found no query")
    if n == 1:
      sampled = chain.sample(key, variables, frozen, inputs, table)
      found = value(frozen, sampled.samples, inputs.query)
      return dataclasses.replace(sampled, info={"reward": found})

    def score(x_0: Array) -> _Best:
      samples = pipeline.decode(frozen, x_0)
      return _Best(value(frozen, samples, inputs.query), x_0, samples)

    def draw(best: _Best, k: Array) -> tuple[_Best, None]:
      key_steps, x_T = _noise_of_draw(key, inputs.x_T, table.num_steps, k)
      x_0 = rollout_lib.end(key_steps, pipeline.kernel, variables, table, x_T, inputs.cond)
      new = score(x_0)
      # The first one whatever it is worth: what the scan starts with is no sample.
      better = (k == 0) | (new.reward > best.reward)
      return jax.tree.map(lambda new, old: _where(better, new, old), new, best), None

    shapes = jax.eval_shape(score, at_least_float32(inputs.x_T))
    start = jax.tree.map(lambda leaf: placement.cut(jnp.zeros(leaf.shape, leaf.dtype)), shapes)
    best, _ = jax.lax.scan(draw, start, jnp.arange(n))
    return Sampled(None, inputs.cond, best.samples, best.x_0, {"reward": best.reward})

  return Sampler(sample, kl_bound(n), keeps_trajectory=n == 1)


def _noise_of_draw(key: Key, x_T: Array, num_steps: int, k: Array) -> tuple[Key, Array]:
  """The key of the steps of draw `k`, and where its chains start."""
  # The steps of the first draw have the children 0 to S - 1 of the key.
  key_start, key_steps = jax.random.split(jax.random.fold_in(key, num_steps + k))
  fresh = placement.cut(jax.random.normal(key_start, x_T.shape))
  first = k == 0
  return jnp.where(first, key, key_steps), jnp.where(first, x_T, fresh)


def _where(chosen: Array, new: Array, old: Array) -> jax.Array:
  """Rows `[m, ...]` of `new` where `chosen`, `[m]`."""
  return jnp.where(chosen.reshape(-1, *[1] * (new.ndim - 1)), new, old)
