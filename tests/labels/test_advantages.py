import collections
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_policy import scores_of

from jaxalign.labels import advantages, pairs, weights

REWARDS = np.array([1.0, 3.0, 5.0, 10.0, 10.0, 7.0], np.float32)
GROUP = np.array([0, 0, 0, 1, 1, 2], np.int32)  # one ordinary, one without spread, one of one


# Compiled once per shape: op by op, the same tests take three times as long.
per_record_normalize = jax.jit(
  advantages.per_record_normalize, static_argnames=("min_count", "epsilon")
)


def close(actual, expected, rtol=1e-6, atol=1e-6):
  np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def test_batch_normalize_by_hand():
  # mean 36 / 6 = 6; squares 25 + 9 + 1 + 16 + 16 + 1 = 68; std = sqrt(68 / 6)
  expected = np.array([-5, -3, -1, 4, 4, 1]) / (np.sqrt(68 / 6) + 0.5)
  close(advantages.batch_normalize(REWARDS, epsilon=0.5), expected)


@pytest.mark.parametrize("ddof, std", [(0, np.sqrt(8 / 3)), (1, 2.0)])
def test_group_normalize_by_hand(ddof, std):
  # group 0: mean 3, squares 4 + 0 + 4 = 8
  actual = advantages.group_normalize(REWARDS, GROUP, num_groups=3, epsilon=0.5, ddof=ddof)
  close(actual[:3], np.array([-2, 0, 2]) / (std + 0.5))
  np.testing.assert_array_equal(actual[3:], np.zeros(3))


def test_group_mean_global_std_by_hand():
  actual = advantages.group_mean_global_std(REWARDS, GROUP, num_groups=3, epsilon=1e-4)
  close(actual, np.array([-2, 0, 2, 0, 0, 0]) / (np.sqrt(68 / 6) + 1e-4))


def test_leave_one_out_by_hand():
  # 1 - (3 + 5) / 2, 3 - (1 + 5) / 2, 5 - (1 + 3) / 2; the rest has nothing to differ from
  actual = advantages.leave_one_out(REWARDS, GROUP, num_groups=3)
  close(actual, [-3, 0, 3, 0, 0, 0])


def test_clip_advantages():
  close(advantages.clip_advantages(jnp.array([-7.0, 0.5, 6.0]), limit=5.0), [-5.0, 0.5, 5.0])


GROUPED = {
  "ddof 0": functools.partial(advantages.group_normalize, epsilon=1e-8, ddof=0),
  "ddof 1": functools.partial(advantages.group_normalize, epsilon=1e-8, ddof=1),
  "global std": functools.partial(advantages.group_mean_global_std, epsilon=1e-4),
  "leave one out": advantages.leave_one_out,
}


def reference(name, rewards, group):
  out = np.zeros(len(rewards))
  for g in set(group.tolist()):
    where = group == g
    r = rewards[where].astype(np.float64)
    if name == "leave one out":
      out[where] = [x - (r.sum() - x) / (len(r) - 1) if len(r) > 1 else 0.0 for x in r]
      continue
    ddof = 1 if name == "ddof 1" and len(r) > 1 else 0
    std = rewards.astype(np.float64).std() + 1e-4 if name == "global std" else r.std(ddof=ddof)
    out[where] = (r - r.mean()) / std if std > 0 else 0.0
  return out


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_estimators_against_numpy_per_group(name):
  rng = np.random.default_rng(0)
  rewards = rng.normal(20.0, 3.0, 37).astype(np.float32)
  group = rng.integers(0, 9, 37).astype(np.int32)  # unsorted, unequal sizes
  close(
    jax.jit(functools.partial(GROUPED[name], num_groups=9))(rewards, group),
    reference(name, rewards, group),
    rtol=2e-5,
    atol=2e-5,
  )


@pytest.mark.parametrize("name", GROUPED)
def test_relabelling_the_groups_changes_nothing(name):
  actual = GROUPED[name](REWARDS, np.array([4, 4, 4, 0, 0, 1], np.int32), num_groups=5)
  close(actual, GROUPED[name](REWARDS, GROUP, num_groups=3))


@pytest.mark.parametrize("value", [0.1, 0.7, 1e-3, 123.4])
def test_equal_rewards_give_exactly_zero(value):
  # A float32 mean of equal numbers is off by one rounding, which 1e-8 would blow up to order one.
  rewards, ids, zeros = np.full(23, value, np.float32), np.zeros(23, np.int32), np.zeros(23)
  np.testing.assert_array_equal(advantages.batch_normalize(rewards, epsilon=1e-8), zeros)
  for estimator in GROUPED.values():
    np.testing.assert_array_equal(estimator(rewards, ids, num_groups=1), zeros)
  stats = advantages.init_record_stats(1, 32)
  for _ in range(2):
    stats, actual = per_record_normalize(stats, rewards, ids, min_count=23, epsilon=1e-8)
    np.testing.assert_array_equal(actual, zeros)


def test_one_sample_is_zero_not_nan():
  reward, group = np.array([3.0], np.float32), np.array([0], np.int32)
  np.testing.assert_array_equal(advantages.batch_normalize(reward, epsilon=1e-8), [0.0])
  for estimator in GROUPED.values():
    np.testing.assert_array_equal(estimator(reward, group, num_groups=1), [0.0])


def test_no_gradient_to_rewards():
  for estimator in GROUPED.values():
    grad = jax.grad(lambda r, e=estimator: (e(r, GROUP, num_groups=3) ** 2).sum())(REWARDS)
    np.testing.assert_array_equal(grad, np.zeros(6))
  grad = jax.grad(lambda r: (advantages.batch_normalize(r, epsilon=1e-8) ** 2).sum())(REWARDS)
  np.testing.assert_array_equal(grad, np.zeros(6))
  grad = jax.grad(lambda a: (advantages.clip_advantages(a, limit=5.0) ** 2).sum())(REWARDS)
  np.testing.assert_array_equal(grad, np.zeros(6))

  def running(rewards):
    stats = advantages.init_record_stats(3, 4)
    return (per_record_normalize(stats, rewards, GROUP, min_count=1, epsilon=1e-6)[1] ** 2).sum()

  np.testing.assert_array_equal(jax.grad(running)(REWARDS), np.zeros(6))


@pytest.mark.parametrize("bad", [-1, 3])
def test_a_group_out_of_range_gives_nan_there_and_nowhere_else(bad):
  group = GROUP.copy()
  group[5] = bad
  for estimator in GROUPED.values():
    actual = estimator(REWARDS, group, num_groups=3)
    np.testing.assert_array_equal(np.isnan(actual), [0, 0, 0, 0, 0, 1])


def test_mismatched_shapes_name_the_arguments():
  with pytest.raises(ValueError, match=r"'rewards': \(6, 1\), 'group': \(6,\)"):
    advantages.leave_one_out(REWARDS[:, None], GROUP, num_groups=3)
  stats = advantages.init_record_stats(3, 4)
  with pytest.raises(ValueError, match=r"'record_ids': \(6, 1\)"):
    advantages.per_record_normalize(stats, REWARDS, GROUP[:, None], min_count=1, epsilon=1e-6)


# ---- running per-prompt statistics


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


# ---- estimators by name

# What each entry of ESTIMATORS is made with, and the function it stands for.
ESTIMATORS = {
  "batch": ({"epsilon": 1e-6}, lambda r, g: advantages.batch_normalize(r, epsilon=1e-6)),
  "group": ({"epsilon": 1e-6, "ddof": 1}, functools.partial(GROUPED["ddof 1"], num_groups=3)),
  "group_global_std": ({"epsilon": 1e-4}, functools.partial(GROUPED["global std"], num_groups=3)),
  "leave_one_out": ({}, functools.partial(GROUPED["leave one out"], num_groups=3)),
  "per_prompt": (
    {"buffer_size": 4, "min_count": 2, "epsilon": 1e-6},
    lambda r, g: per_record_normalize(
      advantages.init_record_stats(9, 4), r, PROMPT_IDS, min_count=2, epsilon=1e-6
    )[1],
  ),
}
ROWS, RECORDS = REWARDS.reshape(3, 2), [7, 0, 7]  # two rows of one record, which are one group
PROMPT_IDS = np.repeat(np.array(RECORDS, np.int32), 2)
OF_ROWS = np.array([1, 1, 0, 0, 1, 1], np.int32)  # the same, numbered in the batch


def make_estimator(name, limit=5.0, **changes):
  kwargs, _ = ESTIMATORS[name]
  return advantages.make(name, limit=limit, **{**kwargs, **changes})


def test_every_estimator_is_under_test():
  assert set(ESTIMATORS) == set(advantages.ESTIMATORS)


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_an_estimator_is_its_function_and_threads_its_state_through_jit(name):
  estimator = make_estimator(name, limit=1e9)
  state = estimator.init(9)
  assert (state is None) == (name != "per_prompt")
  traces = []

  @jax.jit
  def estimate(state, scores):
    traces.append(1)
    return estimator.estimate(state, scores)

  new_state, actual = estimate(state, scores_of(ROWS, RECORDS))
  assert actual.shape == REWARDS.shape and actual.dtype == jnp.float32
  assert np.isfinite(actual).all() and np.any(actual != 0)
  close(actual, ESTIMATORS[name][1](REWARDS, OF_ROWS), rtol=1e-5)
  again, second = estimate(new_state, scores_of(ROWS[::-1], RECORDS))
  assert len(traces) == 1 and jax.tree.structure(again) == jax.tree.structure(state)
  assert np.isfinite(second).all()


def test_per_prompt_remembers_and_the_others_cannot():
  estimator = make_estimator("per_prompt")
  state, first = estimator.estimate(estimator.init(9), scores_of(ROWS, RECORDS))
  np.testing.assert_array_equal(state.count, [2, 0, 0, 0, 0, 0, 0, 4, 0])
  _, second = estimator.estimate(state, scores_of(ROWS + 3, RECORDS))
  assert np.abs(second - first).max() > 0.1  # the old rewards are in the mean now
  forgetful = make_estimator("group")
  _, one = forgetful.estimate(None, scores_of(ROWS, RECORDS))
  close(forgetful.estimate(None, scores_of(ROWS + 3, RECORDS))[1], one, rtol=1e-5)


@pytest.mark.parametrize("name", advantages.ESTIMATORS)
def test_advantages_are_clipped_to_the_limit(name):
  free = make_estimator(name, limit=1e9)
  bound = make_estimator(name, limit=0.5)
  _, wide = free.estimate(free.init(9), scores_of(ROWS, RECORDS))
  _, narrow = bound.estimate(bound.init(9), scores_of(ROWS, RECORDS))
  assert np.abs(wide).max() > 0.55
  close(narrow, np.clip(wide, -0.5, 0.5))


def test_a_wrong_name_or_key_is_told():
  with pytest.raises(
    ValueError, match=r"config\.advantage\.name: unknown estimator 'grpo'; known: b"
  ):
    advantages.make("grpo", limit=5.0)
  with pytest.raises(ValueError, match=r'config\.advantage.*did you mean "epsilon"'):
    advantages.make("batch", limit=5.0, epsilonn=1e-6)


@pytest.mark.parametrize("name", ["group", "group_global_std", "leave_one_out"])
def test_groups_of_one_are_refused_because_their_advantage_is_always_zero(name):
  with pytest.raises(ValueError, match=r"group_size"):
    make_estimator(name).estimate(None, scores_of(REWARDS[:, None]))


def test_each_reward_may_have_advantages_of_its_own():
  """By hand: of a small and of a large reward, weighted 1 and 3; neither drowns in the other."""
  small, large = np.array([[0.0, 1.0]]), np.array([[300.0, 100.0]])
  scores = scores_of(small + 3 * large, small=small, large=large)
  scores = dataclasses.replace(scores, weights={"small": 1.0, "large": 3.0})
  kwargs = {"limit": 10.0, "epsilon": 0.0, "ddof": 0}
  apart = advantages.make("group", per_reward=True, **kwargs)
  assert apart.per_reward
  close(apart.estimate(None, scores)[1], [-1 + 3, 1 - 3])
  close(advantages.make("group", **kwargs).estimate(None, scores)[1], [1, -1])


def test_a_history_of_records_is_not_one_of_rewards():
  with pytest.raises(ValueError, match=r"per_reward: expected False, because 'per_prompt'"):
    make_estimator("per_prompt", per_reward=True)


def best_is_one(*, bonus):
  """An estimator from outside: 1 + bonus for the best of a row, 0 for the others."""

  def estimate(memory, scores):
    best = scores.total == scores.total.max(axis=1, keepdims=True)
    return memory, jnp.ravel((1.0 + bonus) * best)

  return advantages.Estimator(lambda num_records: None, estimate)


def test_an_estimator_from_outside_is_named_by_its_function():
  made = advantages.make(f"{__name__}:best_is_one", limit=1.5, bonus=1.0)
  close(made.estimate(None, scores_of(ROWS))[1], [0, 1.5, 0, 1.5, 1.5, 0])
  with pytest.raises(ValueError, match="missing a required argument: 'bonus'"):
    advantages.make(f"{__name__}:best_is_one", limit=1.5)
  with pytest.raises(ValueError, match=r"Estimator, got int"):
    advantages.make(f"{__name__}:not_an_estimator", limit=1.5)


def not_an_estimator():
  return 3


# ---- other labels


def test_every_sample_is_an_example():
  _, labels = advantages.of_every_sample(make_estimator("leave_one_out"))(
    None, scores_of(ROWS), None
  )
  assert labels.samples.tolist() == list(range(6))
  close(labels.values["advantages"], [-2, 2, -5, 5, 3, -3])


def test_the_best_and_the_worst_of_a_row_are_a_pair():
  """The first of several best or worst; a tie counts nothing, and the others as much more."""
  rewards = [[0.0, 3.0, 3.0, -1.0], [2.0, 2.0, 2.0, 2.0], [5.0, 4.0, 4.0, 6.0]]
  _, labels = pairs.best_and_worst(None, scores_of(rewards), None)
  assert labels.samples.tolist() == [[1, 3], [4, 4], [11, 9]]
  close(labels.values["weight"], [1.5, 0.0, 1.5])
  close(labels.values["gap"], [4.0, 0.0, 2.0])
  close(labels.metrics["preference/ties"], 1 / 3)
  with pytest.raises(ValueError, match="group_size: expected at least 2, to compare, got 1"):
    pairs.best_and_worst(None, scores_of([[1.0], [2.0]]), None)


def test_how_often_the_better_one_is_chosen():
  gap = jnp.array([0.0, 1.0, 2.0])
  close(pairs.choice_probability(gap, temperature=0.0), [1, 1, 1])
  close(pairs.choice_probability(gap, temperature=2.0), 1 / (1 + np.exp([0.0, -0.5, -1.0])))


def test_weights_of_samples_by_hand():
  """exp(ln 2 * r) is 1, 2, 4 and 8, of mean 15 / 4; of the best half each counts twice."""
  rewards = jnp.array([0.0, 1.0, 2.0, 3.0])
  found = weights.exponential_weights(rewards, gamma=float(np.log(2)))
  close(found, np.array([1, 2, 4, 8]) * 4 / 15)
  close(weights.exponential_weights(jnp.full(4, 7.0), gamma=3.0), np.ones(4))
  close(weights.sparse_weights(rewards, share=0.5), [0, 0, 2, 2])
  close(weights.sparse_weights(jnp.full(4, 7.0), share=0.1), np.ones(4))
