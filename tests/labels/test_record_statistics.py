"""Running statistics of every record's rewards, with a deque for each as the oracle."""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advantage_cases import GROUP, REWARDS, close, per_record_normalize

from jaxalign.labels import advantages


class DequeTracker:
  """What per_record_normalize must equal: one deque per prompt, in float64."""

  def __init__(self, buffer_size, min_count):
    self.min_count = min_count
    self.deques = collections.defaultdict(lambda: collections.deque(maxlen=buffer_size))

  def update(self, record_ids, rewards):
    rewards = rewards.astype(np.float64)
    for prompt, reward in zip(record_ids, rewards, strict=True):
      self.deques[prompt].append(reward)
    out = []
    for prompt, reward in zip(record_ids, rewards, strict=True):
      stored = np.array(self.deques[prompt])
      source = rewards if len(stored) < self.min_count else stored
      out.append((reward - source.mean()) / (source.std() + 1e-6))
    return np.array(out)


@pytest.mark.parametrize(
  "num_records, buffer_size, min_count, batch_size",
  [(5, 16, 16, 7), (3, 4, 2, 13), (1, 3, 3, 8), (6, 1, 1, 5), (4, 8, 5, 1), (2, 8, 8, 32)],
)
def test_per_record_normalize_equals_a_deque(num_records, buffer_size, min_count, batch_size):
  rng = np.random.default_rng(buffer_size * 100 + batch_size)
  tracker = DequeTracker(buffer_size, min_count)
  stats = advantages.init_record_stats(num_records, buffer_size)
  update = functools.partial(per_record_normalize, min_count=min_count, epsilon=1e-6)
  used_buffer = 0
  for _ in range(40):
    ids = rng.integers(0, num_records, batch_size).astype(np.int32)
    rewards = rng.normal(5.0, 2.0, batch_size).astype(np.float32)
    stats, actual = update(stats, rewards, ids)
    np.testing.assert_allclose(actual, tracker.update(ids, rewards), rtol=2e-4, atol=2e-5)
    used_buffer += sum(len(tracker.deques[i]) >= min_count for i in ids)
  assert used_buffer > 0
  for prompt in range(num_records):
    count = int(stats.count[prompt])
    stored = np.asarray(stats.buffer[prompt, : min(count, buffer_size)])
    oldest_first = np.roll(stored, -(count % buffer_size) if count > buffer_size else 0)
    np.testing.assert_array_equal(oldest_first, np.float32(tracker.deques[prompt]))


def test_per_record_normalize_by_hand():
  stats = advantages.init_record_stats(2, 3)
  ids = jnp.array([0, 0, 1], jnp.int32)
  stats, actual = per_record_normalize(
    stats, jnp.array([1.0, 3.0, 8.0]), ids, min_count=2, epsilon=0.0
  )
  # Prompt 0 stores [1, 3]: mean 2, std 1. Prompt 1 stores one of two: batch mean 4, std sqrt(26/3).
  close(actual, [-1.0, 1.0, 4.0 / np.sqrt(26 / 3)])
  stats, actual = per_record_normalize(
    stats, jnp.array([5.0, 7.0, 4.0]), ids, min_count=2, epsilon=0.0
  )
  # Prompt 0 keeps the last three, [3, 5, 7]: mean 5, std sqrt(8/3). Prompt 1 stores [8, 4]: 6, 2.
  close(actual, [0.0, 2.0 / np.sqrt(8 / 3), -1.0])
  np.testing.assert_array_equal(stats.count, [4, 2])


def test_more_rewards_in_a_batch_than_the_buffer_holds_keeps_the_last():
  stats, _ = per_record_normalize(
    advantages.init_record_stats(1, 3),
    jnp.arange(8.0),
    jnp.zeros(8, jnp.int32),
    min_count=1,
    epsilon=1e-6,
  )
  assert sorted(stats.buffer[0].tolist()) == [5.0, 6.0, 7.0]
  np.testing.assert_array_equal(stats.count, [8])


def test_two_halves_leave_the_same_state_as_one_batch():
  rng = np.random.default_rng(3)
  ids, rewards = rng.integers(0, 4, 24).astype(np.int32), rng.normal(size=24).astype(np.float32)
  update = functools.partial(per_record_normalize, min_count=1, epsilon=1e-6)
  whole, _ = update(advantages.init_record_stats(4, 5), rewards, ids)
  half, _ = update(advantages.init_record_stats(4, 5), rewards[:12], ids[:12])
  half, _ = update(half, rewards[12:], ids[12:])
  np.testing.assert_array_equal(whole.buffer, half.buffer)
  np.testing.assert_array_equal(whole.count, half.count)


def test_a_prompt_out_of_range_is_nan_and_leaves_the_state_alone():
  empty = advantages.init_record_stats(2, 3)
  stats, actual = per_record_normalize(
    empty, jnp.array([1.0, 2.0]), jnp.array([-1, 2], jnp.int32), min_count=1, epsilon=1e-6
  )
  assert np.isnan(actual).all()
  jax.tree.map(np.testing.assert_array_equal, stats, empty)


def test_min_count_above_the_buffer_size_is_an_error():
  with pytest.raises(ValueError, match="min_count <= buffer_size, got 16 > 8"):
    advantages.per_record_normalize(
      advantages.init_record_stats(2, 8), REWARDS, GROUP, min_count=16, epsilon=1e-6
    )


def test_prompt_stats_is_a_pytree_with_named_leaves():
  stats = advantages.init_record_stats(2, 3)
  paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(stats)]
  assert paths == [".buffer", ".count"]
  assert stats.buffer.dtype == jnp.float32 and stats.count.dtype == jnp.int32


def test_one_trace_for_many_rounds():
  traces = []

  @jax.jit
  def update(stats, rewards, ids):
    traces.append(1)
    return advantages.per_record_normalize(stats, rewards, ids, min_count=2, epsilon=1e-6)

  stats = advantages.init_record_stats(3, 4)
  for _ in range(3):
    stats, _ = update(stats, REWARDS, GROUP)
  assert len(traces) == 1
