"""The batches of losses: the examples of a gradient slice, and their labels."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from jaxalign import losses
from jaxalign.diffusion.schedules import StepTable
from jaxalign.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
  """Single denoising steps x_t -> x_s: an example is a step of one trajectory, or the same of n.

  x_t, x_s: `[B, *D]`, or `[B, n, *D]`, float32.
  row:      the steps' rows of the table, fields `[B]`.
  cond:     a `Guided`, leaves `[B, ...]`.
  log_prob: `[B]` or `[B, n]`, under what sampled, as the rollout computed it.
  fresh:    `[B]` bool: the policy is still the one that sampled, so that the ratio is 1.
  labels:   `{name: [B, ...]}`, as `Labels.values`.
  """

  x_t: Array
  x_s: Array
  row: StepTable
  cond: Any
  log_prob: Array
  fresh: Array
  labels: Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Finished:
  """Finished samples, one or n an example; the policy's own, or of a file.

  x_0:    `[B, *D]`, or `[B, n, *D]`, float32.
  cond:   conditioning without guidance, leaves `[B, ...]`, as losses on finished samples are
    published.
  labels: `{name: [B, ...]}`, as `Labels.values` or `Examples.values`.
  """

  x_0: Array
  cond: Any
  labels: Mapping[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inputs:
  """Records to sample for.

  cond:  a `Guided`, leaves `[B, ...]`.
  query: what the rewards want to know of them, leaves `[B, ...]`.
  """

  cond: Any
  query: Any


def unpair(tree: Any) -> Any:
  """`[B, 2, ...]` leaves to `[2B, ...]`: the two of a pair are neighbours.

  So a batch that is sharded over devices stays where it is.
  """
  return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), tree)


def for_both(tree: Any) -> Any:
  """`[B, ...]` leaves to `[2B, ...]`: each row for both samples of its pair."""
  return jax.tree.map(lambda leaf: leaf.repeat(2, axis=0), tree)


def winner_and_loser(values: Array) -> tuple[Array, Array]:  # [2B] -> [B], [B]
  """The inverse of `unpair` on one value per sample."""
  return values[0::2], values[1::2]


def preference_metrics(log_ratio_w: Array, log_ratio_l: Array, p: Array) -> dict[str, Array]:
  """What is logged of the log-ratios of pairs, each `[B]`; `p` counts in the accuracy alone."""
  return {
    "preference/accuracy": losses.implicit_accuracy(log_ratio_w, log_ratio_l, p=p),
    "preference/margin": log_ratio_w - log_ratio_l,
    "preference/log_ratio_w": log_ratio_w,
    "preference/log_ratio_l": log_ratio_l,
  }
