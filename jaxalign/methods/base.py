"""What a method is: a pure loss, and the name of what feeds it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from jaxalign.diffusion.schedules import StepTable
from jaxalign.types import Array, Key, Params


class Method(NamedTuple):
  """A pair of a pure function and the data it wants.

  loss: `(params, frozen, batch, key) -> (loss [B], metrics {name: [B]})`. `params` are the complete
    variables of the policy. `frozen` holds every other tree, both as arguments of the program;
    `frozen["reference"]` are the complete variables of the reference.
  data: what `batch` is:
    "rollout": `Transitions` of trajectories that the policy just sampled, with their advantages;
    "rollout_pairs": `StepPairs` of two such trajectories of one record and one initial noise;
    "pairs": `Pairs` of finished samples, stored before the run;
    "records": `Records`, from which the loss itself samples.
  on_policy: whether the loss is right for one update per rollout only.
  kl_weight: what a nat of trajectory KL to the reference costs; it is taken off the reward before
    advantages are estimated. The loss adds the part of the gradient that goes through the KL.
  soft_labels: of methods on "pairs": whether the loss uses `Pairs.p`. One that does not takes the
    first of a pair as the winner; of a tie the first means nothing, so its feed refuses ties.
  """

  loss: Callable[[Params, Mapping[str, Params], Any, Key], tuple[Array, dict[str, Array]]]
  data: str
  on_policy: bool = False
  kl_weight: float = 0.0
  soft_labels: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transitions:
  """Single denoising steps x_t -> x_s of sampled trajectories, with what they earned.

  x_t, x_s:     `[B, *D]` float32.
  row:          the steps' rows of the table, fields `[B]`.
  cond:         conditioning, every leaf `[B, ...]`.
  old_log_prob: `[B]`, under the policy that sampled, as the rollout computed it.
  fresh:        `[B]` bool: the policy is still the one that sampled, so that the ratio is 1.
  advantages:   `[B]`, of the whole trajectory.
  """

  x_t: Array
  x_s: Array
  row: StepTable
  cond: Any
  old_log_prob: Array
  fresh: Array
  advantages: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepPairs:
  """The same step of two sampled trajectories, the preferred one first.

  x_t, x_s: `[B, 2, *D]` float32.
  row:      the step's row of the table, fields `[B]`.
  cond:     conditioning, every leaf `[B, ...]`.
  weight:   `[B]`, what the pair counts; 0 for a tie.
  """

  x_t: Array
  x_s: Array
  row: StepTable
  cond: Any
  weight: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
  """Two finished samples of one record, the preferred one first.

  x_0:  `[B, 2, *D]` float32.
  cond: conditioning without guidance, every leaf `[B, ...]`.
  p:    `[B]`, the probability that the first is preferred: 1 for a plain label, 0.5 for a tie.
  """

  x_0: Array
  cond: Any
  p: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Records:
  """Records to sample for.

  cond:  a `Guided`, leaves `[B, ...]`.
  query: what the reward wants to know of them, leaves `[B, ...]`.
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
