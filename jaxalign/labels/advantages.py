"""Advantage estimators: rewards `[B]` in, advantages `[B]` out, no gradient through either.

One function per estimator, all jit-able. `group [B]` int32 says which record of the batch each
sample belongs to, in `[0, num_groups)`; an id outside that range gives NaN rather than borrowing
another group's statistics. Equal rewards give advantages of exactly zero: deviations are taken
from a member of the set first, so that no rounding error is divided by a tiny epsilon.

`valid [B]` is False where a sample has no verdict. Its advantage is exactly zero, whatever stands
in the place of its reward, and it enters no mean, deviation or history of others.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxalign.checks import check_call, load_function
from jaxalign.labels.base import LabelFn, Labels, Scores
from jaxalign.types import Array, Key, check_same_shape


def batch_normalize(
  rewards: Array,  # [B]
  valid: Array | None = None,  # [B] bool; all by default
  *,
  epsilon: float,
) -> Array:  # [B]
  """`(r - mean) / (std + epsilon)` over the batch, std with ddof 0.

  DDPO without per-prompt statistics (Black et al. 2023, arXiv:2305.13301).
  """
  valid = _all_unless(valid, rewards)
  deviation, std = _batch_moments(rewards, valid)
  return _known(valid, deviation / (std + epsilon))


def group_normalize(
  rewards: Array,  # [B]
  group: Array,  # [B] int32
  valid: Array | None = None,  # [B] bool; all by default
  *,
  num_groups: int,
  epsilon: float,
  ddof: int,
) -> Array:  # [B]
  """`(r - mean_g) / (std_g + epsilon)`, both over the samples of one record.

  GRPO (Shao et al. 2024, arXiv:2402.03300); for diffusion DanceGRPO (Xue et al. 2025,
  arXiv:2505.07818), which uses ddof 1. A group of one has advantage zero.
  """
  valid = _all_unless(valid, rewards)
  deviation, size = _group_deviation(rewards, group, num_groups, valid)
  sum_of_squares = jax.ops.segment_sum(jnp.square(deviation), group, num_groups)
  std = jnp.sqrt(_take(sum_of_squares, group) / jnp.maximum(size - ddof, 1.0))
  return _known(valid, deviation / (std + epsilon))


def group_mean_global_std(
  rewards: Array,  # [B]
  group: Array,  # [B] int32
  valid: Array | None = None,  # [B] bool; all by default
  *,
  num_groups: int,
  epsilon: float,
) -> Array:  # [B]
  """`(r - mean_g) / (std + epsilon)`: mean per record, std (ddof 0) of the whole batch's rewards.

  Flow-GRPO (Liu et al. 2025, arXiv:2505.05470), with epsilon 1e-4 in its code. Dividing by one
  number keeps a record whose samples hardly differ from shouting.
  """
  valid = _all_unless(valid, rewards)
  deviation, _ = _group_deviation(rewards, group, num_groups, valid)
  _, std = _batch_moments(rewards, valid)
  return _known(valid, deviation / (std + epsilon))


def leave_one_out(
  rewards: Array,  # [B]
  group: Array,  # [B] int32
  valid: Array | None = None,  # [B] bool; all by default
  *,
  num_groups: int,
) -> Array:  # [B]
  """`r_i - mean of the other rewards of the group`, which is `n / (n - 1) * (r_i - mean_g)`.

  RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv:2402.14740). Unbiased, and in the rewards'
  own units. A group of one has advantage zero.
  """
  valid = _all_unless(valid, rewards)
  deviation, size = _group_deviation(rewards, group, num_groups, valid)
  return _known(valid, deviation * size / jnp.maximum(size - 1.0, 1.0))


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
  valid: Array | None = None,  # [B] bool; all by default
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
  valid = _all_unless(valid, rewards)
  stats = _append(stats, rewards, record_ids, valid)
  stored = jnp.minimum(stats.count, buffer_size).astype(stats.buffer.dtype)
  num_stored = _take(stored, record_ids)  # [B]
  rows = _take(stats.buffer, record_ids)  # [B, N]
  is_stored = jnp.arange(buffer_size) < num_stored[:, None]

  origin = rows[:, :1]
  mean = jnp.mean(rows - origin, axis=1, where=is_stored, keepdims=True)  # relative to origin
  std = jnp.std(rows - origin, axis=1, where=is_stored)
  deviation = (rewards[:, None] - origin - mean)[:, 0]

  batch_deviation, batch_std = _batch_moments(rewards, valid)
  too_few = num_stored < min_count
  advantages = jnp.where(
    too_few, batch_deviation / (batch_std + epsilon), deviation / (std + epsilon)
  )
  return stats, _known(valid, advantages)


def _append(stats: RecordStats, rewards: Array, record_ids: Array, valid: Array) -> RecordStats:
  """Appends in batch order; of more than N rewards of one record in a batch the last N stay."""
  num_records, buffer_size = stats.buffer.shape
  same = (record_ids[:, None] == record_ids[None, :]) & valid[None, :]  # [B, B]
  num_earlier = jnp.sum(jnp.tril(same, -1), axis=1)
  is_kept = (jnp.sum(same, axis=1) - num_earlier <= buffer_size) & valid
  slot = (_take(stats.count, record_ids) + num_earlier) % buffer_size
  # What is not kept goes to a row that does not exist: two writes to one slot have no order.
  row = jnp.where(is_kept, record_ids, num_records)
  rewards = rewards.astype(stats.buffer.dtype)
  return RecordStats(
    buffer=stats.buffer.at[row, slot].set(rewards, mode="drop", wrap_negative_indices=False),
    count=stats.count.at[record_ids].add(
      valid.astype(stats.count.dtype), mode="drop", wrap_negative_indices=False
    ),
  )


def _all_unless(valid: Array | None, rewards: Array) -> Array:
  """`valid`, or that every sample is."""
  if valid is None:
    return jnp.ones(jnp.shape(rewards), bool)
  check_same_shape(rewards=rewards, valid=valid)
  return jnp.asarray(valid)


def _known(valid: Array, advantages: Array) -> Array:
  """0 for samples without a verdict, and no gradient."""
  return jax.lax.stop_gradient(jnp.where(valid, advantages, 0.0))


def _batch_moments(rewards: Array, valid: Array) -> tuple[Array, Array]:
  """Deviations from the mean `[B]` and the standard deviation `[]` (ddof 0), of the valid ones."""
  rewards = jnp.asarray(rewards)
  shifted = rewards - rewards[jnp.argmax(valid)]  # the first of them
  return shifted - jnp.mean(shifted, where=valid), jnp.std(shifted, where=valid)


def _group_deviation(
  rewards: Array, group: Array, num_groups: int, valid: Array
) -> tuple[Array, Array]:
  """Each sample's deviation from its group's mean `[B]`, and its group's size `[B]` as float.

  Both of valid samples; others deviate by 0.
  """
  check_same_shape(rewards=rewards, group=group)
  least = jax.ops.segment_min(jnp.where(valid, rewards, jnp.inf), group, num_groups)
  shifted = jnp.where(valid, rewards - _take(least, group), 0.0)
  size = _take(jax.ops.segment_sum(valid.astype(shifted.dtype), group, num_groups), group)
  total = _take(jax.ops.segment_sum(shifted, group, num_groups), group)
  return jnp.where(valid, shifted - total / size, 0.0), size


def _take(per_row: jax.Array, index: Array) -> Array:
  """`per_row[index]`, but NaN (or the smallest integer) where the index is out of range."""
  return per_row.at[index].get(mode="fill", wrap_negative_indices=False)


class Estimator(NamedTuple):
  """An advantage estimator as a pair of pure functions over explicit memory.

  init: `num_records -> memory`; None for the estimators that remember nothing.
  estimate: `(memory, scores) -> (memory, advantages [P K])`, those of a row one after another. Only
    `scores.valid` ones may enter memory or the advantages of others; `make` sets the rest to 0.
  per_reward: it sees each reward by itself, and not `Scores.penalty`.
  """

  init: Callable[[int], Any]
  estimate: Callable[[Any, Scores], tuple[Any, Array]]
  per_reward: bool = False


def make(name: str, *, limit: float, per_reward: bool = False, **kwargs) -> Estimator:
  """The estimator called `name`, an entry of `ESTIMATORS`, clipped to `[-limit, limit]`.

  Args:
    name: which one; or "package.module:function", a user's own that returns an `Estimator`.
    limit: of an advantage's size.
    per_reward: estimates the advantages of every reward apart, and takes their weighted sum, so
      that none drowns in another's scale ("advantage aggregation" of MixGRPO, arXiv:2507.21802).
    **kwargs: the estimator's own.

  Raises:
    ValueError: an unknown name, arguments that it does not have, or `per_reward` with one that has
      a memory or is not of this package; and in `estimate`, rows of one sample where samples of a
      row are compared.
  """
  own = load_function("config.advantage.name", name) if ":" in name else None
  if own is None and name not in ESTIMATORS:
    raise ValueError(
      f"config.advantage.name: unknown estimator {name!r}; known: {', '.join(ESTIMATORS)}, or your "
      'own function as "package.module:function"'
    )
  factory = own or ESTIMATORS[name]
  check_call(f"config.advantage {name!r}", factory, **kwargs)
  made = factory(**kwargs)
  if own is not None and not isinstance(made, Estimator):
    raise ValueError(
      f"config.advantage.name: expected {name!r} to return a jaxalign.labels.advantages.Estimator, "
      f"got {type(made).__name__}"
    )
  estimator = made if isinstance(made, Estimator) else _on_scores(name, made, per_reward)
  if per_reward and not estimator.per_reward:
    raise ValueError(
      f"config.advantage.per_reward: expected False, because {name!r} has no such form"
    )

  def estimate(memory, scores: Scores):
    memory, advantages = estimator.estimate(memory, scores)
    clipped = clip_advantages(advantages, limit=limit)
    return memory, _known(jnp.ravel(jnp.asarray(scores.valid)), clipped)

  return estimator._replace(estimate=estimate)


def _on_scores(name: str, kind: "_Kind", per_reward: bool) -> Estimator:
  """The estimator of a kind: of the total of the scores, or of each reward in them."""
  per_reward = per_reward and kind.init(1) is None  # one history of a record is not one a reward

  def estimate(memory, scores: Scores):
    size = scores.total.shape[1]
    if size == 1 and kind.within_rows:
      raise ValueError(
        f"config.advantage.name: {name!r} compares the samples of one record, and there is one of "
        "each; raise config.batch.group_size, or use 'batch' or 'per_prompt'"
      )
    record_ids, group = (
      jnp.repeat(jnp.asarray(ids), size) for ids in (scores.record, scores.group)
    )
    valid = jnp.ravel(jnp.asarray(scores.valid))
    if not per_reward:
      rewards = jnp.ravel(jnp.asarray(scores.total))
      return kind.estimate(memory, rewards, record_ids, group, valid)
    terms = []
    for reward, values in scores.named.items():
      rewards = jnp.ravel(jnp.asarray(values))
      known = valid & ~jnp.isnan(rewards)  # one without a weight may have no verdict of a valid one
      advantages = kind.estimate(None, rewards, record_ids, group, known)[1]
      terms.append(scores.weights[reward] * advantages)
    return memory, functools.reduce(jnp.add, terms)

  return Estimator(kind.init, estimate, per_reward)


def of_every_sample(estimator: Estimator) -> LabelFn:
  """A label function: every sample is an example, with the value "advantages" `[P K]`."""

  def label(memory: Any, scores: Scores, key: Key) -> tuple[Any, Labels]:
    del key  # nothing is random
    memory, advantages = estimator.estimate(memory, scores)
    samples = jnp.arange(advantages.size, dtype=jnp.int32)
    return memory, Labels(samples, {"advantages": advantages}, {})

  return label


class _Kind(NamedTuple):
  """An estimator before it knows of scores.

  estimate: `(memory, rewards [B], record_ids [B], group [B], valid [B]) -> (memory, advantages
    [B])`, where `record_ids` name records for the whole run, `group` those of the iteration.
  within_rows: it compares the samples of a row with each other.
  """

  init: Callable[[int], Any]
  estimate: Callable[[Any, Array, Array, Array, Array], tuple[Any, Array]]
  within_rows: bool


def _make_batch(*, epsilon: float) -> _Kind:
  return _forgetful(
    lambda r, group, valid: batch_normalize(r, valid, epsilon=epsilon), within_rows=False
  )


def _make_group(*, epsilon: float, ddof: int) -> _Kind:
  return _forgetful(
    lambda r, *rows: group_normalize(r, *rows, num_groups=len(r), epsilon=epsilon, ddof=ddof)
  )


def _make_group_global_std(*, epsilon: float) -> _Kind:
  return _forgetful(
    lambda r, *rows: group_mean_global_std(r, *rows, num_groups=len(r), epsilon=epsilon)
  )


def _make_leave_one_out() -> _Kind:
  return _forgetful(lambda r, *rows: leave_one_out(r, *rows, num_groups=len(r)))


def _make_per_prompt(*, buffer_size: int, min_count: int, epsilon: float) -> _Kind:
  if not 1 <= min_count <= buffer_size:
    raise ValueError(
      f"config.advantage: expected 1 <= min_count <= buffer_size, got min_count={min_count} and "
      f"buffer_size={buffer_size}"
    )

  def estimate(stats, rewards, record_ids, group, valid):
    del group  # the history, not the batch, says which samples belong together
    return per_record_normalize(
      stats, rewards, record_ids, valid, min_count=min_count, epsilon=epsilon
    )

  init = functools.partial(init_record_stats, buffer_size=buffer_size)
  return _Kind(init, estimate, within_rows=False)


def _forgetful(
  function: Callable[[Array, Array, Array], Array], *, within_rows: bool = True
) -> _Kind:
  def estimate(memory, rewards, record_ids, group, valid):
    del record_ids
    return memory, function(rewards, group, valid)

  return _Kind(lambda num_records: None, estimate, within_rows)


ESTIMATORS: dict[str, Callable[..., _Kind]] = {
  "batch": _make_batch,
  "group": _make_group,
  "group_global_std": _make_group_global_std,
  "leave_one_out": _make_leave_one_out,
  "per_prompt": _make_per_prompt,
}
