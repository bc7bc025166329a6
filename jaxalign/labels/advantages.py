"""Advantage estimators: rewards `[B]` in, advantages `[B]` out, no gradient through either.

One function per estimator, all jit-able. `group [B]` int32 says which record of the batch each
sample belongs to, in `[0, num_groups)`; an id outside that range gives NaN rather than borrowing
another group's statistics. Equal rewards give advantages of exactly zero: deviations are taken
from a member of the set first, so that no rounding error is divided by a tiny epsilon.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.checks import check_call
from jaxalign.types import Array, check_same_shape


def batch_normalize(
  rewards: Array,  # [B]
  *,
  epsilon: float,
) -> Array:  # [B]
  """`(r - mean) / (std + epsilon)` over the batch, std with ddof 0.

  DDPO without per-prompt statistics (Black et al. 2023, arXiv:2305.13301).
  """
  deviation, std = _batch_moments(rewards)
  return jax.lax.stop_gradient(deviation / (std + epsilon))


def group_normalize(
  rewards: Array,  # [B]
  group: Array,  # [B] int32
  *,
  num_groups: int,
  epsilon: float,
  ddof: int,
) -> Array:  # [B]
  """`(r - mean_g) / (std_g + epsilon)`, both over the samples of one record.

  GRPO (Shao et al. 2024, arXiv:2402.03300); for diffusion DanceGRPO (Xue et al. 2025,
  arXiv:2505.07818), which uses ddof 1. A group of one has advantage zero.
  """
  deviation, size = _group_deviation(rewards, group, num_groups)
  sum_of_squares = jax.ops.segment_sum(jnp.square(deviation), group, num_groups)
  std = jnp.sqrt(_take(sum_of_squares, group) / jnp.maximum(size - ddof, 1.0))
  return jax.lax.stop_gradient(deviation / (std + epsilon))


def group_mean_global_std(
  rewards: Array,  # [B]
  group: Array,  # [B] int32
  *,
  num_groups: int,
  epsilon: float,
) -> Array:  # [B]
  """`(r - mean_g) / (std + epsilon)`: mean per record, std (ddof 0) of the whole batch's rewards.

  Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), with epsilon 1e-4 in its code. Dividing by one
  number keeps a record whose samples hardly differ from shouting.
  """
  deviation, _ = _group_deviation(rewards, group, num_groups)
  _, std = _batch_moments(rewards)
  return jax.lax.stop_gradient(deviation / (std + epsilon))


def leave_one_out(
  rewards: Array,  # [B]
  group: Array,  # [B] int32
  *,
  num_groups: int,
) -> Array:  # [B]
  """`r_i - mean of the other rewards of the group`, which is `n / (n - 1) * (r_i - mean_g)`.

  RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740). Unbiased, and in the rewards'
  own units. A group of one has advantage zero.
  """
  deviation, size = _group_deviation(rewards, group, num_groups)
  return jax.lax.stop_gradient(deviation * size / jnp.maximum(size - 1.0, 1.0))


def clip_advantages(
  advantages: Array,  # [B]
  *,
  limit: float,
) -> Array:  # [B]
  """Clips to `[-limit, limit]`; applied after normalising (5 in DDPO's PyTorch code)."""
  return jax.lax.stop_gradient(jnp.clip(advantages, -limit, limit))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RecordStats:
  """The last N rewards of each of P records. Part of the training state, so it is checkpointed.

  buffer: `[P, N]` float32, one ring per record; slots never written are zero.
  count:  `[P]` int32, rewards ever seen; `min(count, N)` of them are stored.
  """

  buffer: jax.Array
  count: jax.Array


def init_record_stats(num_records: int, buffer_size: int) -> RecordStats:
  """Empty statistics for record ids in `[0, num_records)`."""
  return RecordStats(
    buffer=jnp.zeros((num_records, buffer_size), jnp.float32),
    count=jnp.zeros((num_records,), jnp.int32),
  )


def per_record_normalize(
  stats: RecordStats,
  rewards: Array,  # [B]
  record_ids: Array,  # [B] int32
  *,
  min_count: int,
  epsilon: float,
) -> tuple[RecordStats, Array]:  # stats, [B]
  """`(r - mean) / (std + epsilon)` with the running statistics of each sample's record.

  The batch's rewards are appended first, then mean and std (ddof 0) are taken over what is stored.
  While fewer than `min_count` rewards of a record are stored, its samples use the mean and std of
  the current batch. The per-prompt tracking of DDPO (Black et al. 2023, arXiv:2305.13301), with the
  semantics of its PyTorch code, where epsilon is 1e-6.
  """
  check_same_shape(rewards=rewards, record_ids=record_ids)
  buffer_size = stats.buffer.shape[1]
  if min_count > buffer_size:
    raise ValueError(
      f"expected min_count <= buffer_size, got {min_count} > {buffer_size}: per-prompt statistics "
      "would never be used"
    )
  stats = _append(stats, rewards, record_ids)
  stored = jnp.minimum(stats.count, buffer_size).astype(stats.buffer.dtype)
  num_stored = _take(stored, record_ids)  # [B]
  rows = _take(stats.buffer, record_ids)  # [B, N]
  is_stored = jnp.arange(buffer_size) < num_stored[:, None]

  origin = rows[:, :1]
  mean = jnp.mean(rows - origin, axis=1, where=is_stored, keepdims=True)  # relative to origin
  std = jnp.std(rows - origin, axis=1, where=is_stored)
  deviation = (rewards[:, None] - origin - mean)[:, 0]

  batch_deviation, batch_std = _batch_moments(rewards)
  too_few = num_stored < min_count
  advantages = jnp.where(
    too_few, batch_deviation / (batch_std + epsilon), deviation / (std + epsilon)
  )
  return stats, jax.lax.stop_gradient(advantages)


def _append(stats: RecordStats, rewards: Array, record_ids: Array) -> RecordStats:
  """Appends in batch order; of more than N rewards of one record in a batch the last N stay."""
  num_records, buffer_size = stats.buffer.shape
  same = record_ids[:, None] == record_ids[None, :]  # [B, B]
  num_earlier = jnp.sum(jnp.tril(same, -1), axis=1)
  is_kept = jnp.sum(same, axis=1) - num_earlier <= buffer_size
  slot = (_take(stats.count, record_ids) + num_earlier) % buffer_size
  # Overtaken rewards go to a row that does not exist: two writes to one slot have no order.
  row = jnp.where(is_kept, record_ids, num_records)
  rewards = rewards.astype(stats.buffer.dtype)
  return RecordStats(
    buffer=stats.buffer.at[row, slot].set(rewards, mode="drop", wrap_negative_indices=False),
    count=stats.count.at[record_ids].add(1, mode="drop", wrap_negative_indices=False),
  )


def _batch_moments(rewards: Array) -> tuple[Array, Array]:
  """Deviations from the mean `[B]` and the standard deviation `[]` (ddof 0)."""
  shifted = rewards - rewards[0]
  return shifted - jnp.mean(shifted), jnp.std(shifted)


def _group_deviation(rewards: Array, group: Array, num_groups: int) -> tuple[Array, Array]:
  """Each sample's deviation from its group's mean `[B]`, and its group's size `[B]` as float."""
  check_same_shape(rewards=rewards, group=group)
  shifted = rewards - _take(jax.ops.segment_min(rewards, group, num_groups), group)
  size = _take(jax.ops.segment_sum(jnp.ones_like(rewards), group, num_groups), group)
  total = _take(jax.ops.segment_sum(shifted, group, num_groups), group)
  return shifted - total / size, size


def _take(per_row: jax.Array, index: Array) -> Array:
  """`per_row[index]`, but NaN (or the smallest integer) where the index is out of range."""
  return per_row.at[index].get(mode="fill", wrap_negative_indices=False)


class Estimator(NamedTuple):
  """An advantage estimator as a pair of pure functions over explicit state.

  init: `num_records -> state`; None for the estimators that remember nothing.
  estimate: `(state, rewards [B], record_ids [B], group [B]) -> (state, advantages [B])`.
    `record_ids` name records for the whole run, `group` the records of this batch.
  """

  init: Callable[[int], RecordStats | None]
  estimate: Callable[
    [RecordStats | None, Array, Array, Array], tuple[RecordStats | None, Array]
  ]


def make(
  name: str, *, num_groups: int, group_size: int, limit: float, **kwargs
) -> Estimator:
  """The estimator called `name`, an entry of `ESTIMATORS`, clipped to `[-limit, limit]`.

  `num_groups` is the number of records in a batch and `group_size` the samples of each; `kwargs`
  are the estimator's own.
  """
  if name not in ESTIMATORS:
    raise ValueError(
      f"config.advantage.name: unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}"
    )
  check_call(f"config.advantage {name!r}", ESTIMATORS[name], num_groups=num_groups, **kwargs)
  if group_size == 1 and name in _WITHIN_GROUPS:
    raise ValueError(
      f"config.advantage.name: {name!r} compares the samples of one record, and there is one of "
      "each; raise config.batch.group_size, or use 'batch' or 'per_prompt'"
    )
  estimator = ESTIMATORS[name](num_groups=num_groups, **kwargs)

  def estimate(state, rewards, record_ids, group):
    state, advantages = estimator.estimate(state, rewards, record_ids, group)
    return state, clip_advantages(advantages, limit=limit)

  return Estimator(estimator.init, estimate)


def _make_batch(*, num_groups: int, epsilon: float) -> Estimator:
  del num_groups  # one group
  return _stateless(lambda rewards, group: batch_normalize(rewards, epsilon=epsilon))


def _make_group(*, num_groups: int, epsilon: float, ddof: int) -> Estimator:
  return _stateless(
    lambda rewards, group: group_normalize(
      rewards, group, num_groups=num_groups, epsilon=epsilon, ddof=ddof
    )
  )


def _make_group_global_std(*, num_groups: int, epsilon: float) -> Estimator:
  return _stateless(
    lambda rewards, group: group_mean_global_std(
      rewards, group, num_groups=num_groups, epsilon=epsilon
    )
  )


def _make_leave_one_out(*, num_groups: int) -> Estimator:
  return _stateless(lambda rewards, group: leave_one_out(rewards, group, num_groups=num_groups))


def _make_per_prompt(
  *, num_groups: int, buffer_size: int, min_count: int, epsilon: float
) -> Estimator:
  del num_groups  # the history, not the batch, says which samples belong together
  if not 1 <= min_count <= buffer_size:
    raise ValueError(
      f"config.advantage: expected 1 <= min_count <= buffer_size, got min_count={min_count} and "
      f"buffer_size={buffer_size}"
    )

  def estimate(stats, rewards, record_ids, group):
    del group
    return per_record_normalize(stats, rewards, record_ids, min_count=min_count, epsilon=epsilon)

  return Estimator(lambda num_records: init_record_stats(num_records, buffer_size), estimate)


def _stateless(function: Callable[[Array, Array], Array]) -> Estimator:
  return Estimator(
    lambda num_records: None,
    lambda state, rewards, record_ids, group: (state, function(rewards, group)),
  )


ESTIMATORS: dict[str, Callable[..., Estimator]] = {
  "batch": _make_batch,
  "group": _make_group,
  "group_global_std": _make_group_global_std,
  "leave_one_out": _make_leave_one_out,
  "per_prompt": _make_per_prompt,
}

_WITHIN_GROUPS = ("group", "group_global_std", "leave_one_out")
