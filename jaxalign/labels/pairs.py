"""Pairs of sampled data: of each record a better and a worse sample."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxalign.labels.base import Labels, Scores
from jaxalign.types import Array, Key


def best_and_worst(memory: Any, scores: Scores, key: Key) -> tuple[Any, Labels]:
  """Of each row the sample with the highest and the one with the lowest reward.

  Among several best (or worst) it takes the first. The values are "weight" `[P]`, 0 where all K
  rewards are equal and else P divided by the number of rows where they are not, so that the mean of
  a weighted loss is its mean over pairs that have a better one; and "gap" `[P]`, the difference of
  the two rewards. It chooses among valid samples; a row with fewer than two of them is a tie.

  Raises ValueError for rows of one sample.
  """
  del key  # nothing is random
  total, valid = jnp.asarray(scores.total), jnp.asarray(scores.valid)
  P, K = total.shape
  if K < 2:
    raise ValueError(f"config.batch.group_size: expected at least 2, to compare, got {K}")
  high, low = jnp.where(valid, total, -jnp.inf), jnp.where(valid, total, jnp.inf)
  samples = jnp.stack([jnp.argmax(high, axis=1), jnp.argmin(low, axis=1)], axis=1)
  # The one sample that is valid is both, and without any the first is.
  gap = jnp.where(valid.any(axis=1), jnp.max(high, axis=1) - jnp.min(low, axis=1), 0.0)
  untied = gap > 0
  weight = untied * (P / jnp.maximum(1, jnp.sum(untied)))
  return memory, Labels(
    samples=(samples + K * jnp.arange(P)[:, None]).astype(jnp.int32),
    values={"weight": weight.astype(jnp.float32), "gap": gap},
    metrics={"preference/ties": jnp.mean(~untied)},
  )


def choice_probability(gap: Array, *, temperature: float) -> Array:  # [P]
  """P(the better one is chosen) by Bradley & Terry 1952, sigmoid(gap / temperature).

  At a temperature of 0 the better one always is.
  """
  return jnp.ones_like(gap) if temperature == 0 else jax.nn.sigmoid(gap / temperature)
