"""Labels of sampled data: the rewards of an iteration in, what each example is trained with out."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxalign.types import Array, Key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scores:
  """The rewards of an iteration: P rows of K samples, each row of one record.

  total:   `[P, K]` float32, the weighted sum of the rewards less `penalty`.
  named:   `{name: [P, K]}`, each reward as it was scored.
  weights: `{name: []}`, what each counts in `total`.
  penalty: `[P, K]`, what the KL to the reference costs (`Rollouts.kl_weight`); zeros without.
  record:  `[P]` int32, the row's record, numbered for the whole run.
  group:   `[P]` int32, the same numbered from 0 in the iteration; two rows may be of one record.
  valid:   `[P, K]` bool: False where a reward that counts abstained. There is no verdict then, and
    `total` is NaN, as `named` is where its own reward abstained: a label takes nothing from it.
  """

  total: Array
  named: Mapping[str, Array]
  weights: Mapping[str, Array]
  penalty: Array
  record: Array
  group: Array
  valid: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labels:
  """E examples, E a multiple of P: as many of each row, in the order of the rows.

  samples: int32 `[E]`, or `[E, n]` where an example is n samples; sample k of row p is p K + k. All
    of an example are of its own row, because a device holds no others.
  values:  a tree of `[E, ...]`, which the method's `select` is given.
  metrics: `{name: []}`, for the log.
  """

  samples: Array
  values: Any
  metrics: Mapping[str, Array]


# label(memory, scores, key) -> (memory, labels): pure, and jitted by the feed. `memory` is what it
# remembers from iteration to iteration, None where that is nothing.
LabelFn = Callable[[Any, Scores, Key], tuple[Any, Labels]]
