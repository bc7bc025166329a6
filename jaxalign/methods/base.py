"""What a method is: a pure loss, and the name of what feeds it."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxalign.types import Array, Key, Params


class Method(NamedTuple):
  """A pair of a pure function and the data it wants.

  loss: `(params, frozen, batch, key) -> (loss [B], metrics {name: [B]})`. `params` are the complete
    variables of the policy, `frozen` holds every other tree, both as arguments of the program.
  data: what `batch` is. "rollout": `Transitions` of trajectories that the policy just sampled.
  on_policy: whether the loss is right for one update per rollout only.
  """

  loss: Callable[[Params, Params, Any, Key], tuple[Array, dict[str, Array]]]
  data: str
  on_policy: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transitions:
  """Single denoising steps x_t -> x_s of sampled trajectories, with what they earned.

  x_t, x_s:     `[B, *D]` float32.
  i:            `[B]` int32, which step of the process each one is.
  cond:         conditioning, every leaf `[B, ...]`.
  old_log_prob: `[B]`, under the policy that sampled.
  advantages:   `[B]`, of the whole trajectory.
  """

  x_t: Array
  x_s: Array
  i: Array
  cond: Any
  old_log_prob: Array
  advantages: Array
