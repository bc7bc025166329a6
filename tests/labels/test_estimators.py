"""Estimators of advantages by name, those from outside, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from advantage_cases import GROUPED, REWARDS, close, per_record_normalize
from toy_policy import scores_of

from jaxalign.labels import advantages

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


def test_every_sample_is_an_example():
  _, labels = advantages.of_every_sample(make_estimator("leave_one_out"))(
    None, scores_of(ROWS), None
  )
  assert labels.samples.tolist() == list(range(6))
  close(labels.values["advantages"], [-2, 2, -5, 5, 3, -3])
