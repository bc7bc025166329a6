"""Functions that make advantages of a batch's rewards, by hand and against numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advantage_cases import GROUP, GROUPED, REWARDS, close, per_record_normalize

from jaxalign.labels import advantages


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
