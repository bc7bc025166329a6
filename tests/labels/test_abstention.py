"""Samples without a verdict: their labels are 0, and nobody else's label changes by them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_policy import scores_of

from jaxalign.labels import advantages, pairs, weights
from jaxalign.methods import raft

NONE = np.nan
ROWS = np.float32([[1, NONE, 5], [NONE, 4, 8], [2, NONE, NONE], [NONE, NONE, NONE]])
VALID = np.ravel(~np.isnan(ROWS))
ESTIMATORS = {
  "batch": {"epsilon": 0.0},
  "group": {"epsilon": 1e-9, "ddof": 0},
  "group_global_std": {"epsilon": 0.0},
  "leave_one_out": {},
  "per_prompt": {"buffer_size": 4, "min_count": 2, "epsilon": 0.0},
}


def close(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def estimate(name, rows, memory=None, **kwargs):
  made = advantages.make(name, limit=1e9, **ESTIMATORS[name], **kwargs)
  scores = scores_of(rows)
  memory = made.init(len(rows)) if memory is None else memory
  return jax.jit(made.estimate)(memory, scores)


def test_advantages_by_hand():
  # Valid are 1, 5 | 4, 8 | 2, of mean 4 and squares 9 + 1 + 0 + 16 + 4.
  z = np.zeros(3)
  std = np.sqrt(30 / 5)
  close(estimate("batch", ROWS)[1], np.array([-3, 0, 1, 0, 0, 4, -2, 0, 0, *z]) / std)
  close(estimate("group", ROWS)[1], [-1, 0, 1, 0, -1, 1, *z, *z])
  close(estimate("group_global_std", ROWS)[1], np.array([-2, 0, 2, 0, -2, 2, *z, *z]) / std)
  close(estimate("leave_one_out", ROWS)[1], [-4, 0, 4, 0, -4, 4, *z, *z])


@pytest.mark.parametrize("name", ESTIMATORS)
def test_they_are_exactly_zero_and_others_are_as_without_them(name):
  rows = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
  rows[:, 4:] = NONE
  memory, found = estimate(name, rows)
  found = np.asarray(found).reshape(4, 6)
  assert (found[:, 4:] == 0).all() and np.isfinite(found).all()
  alone_memory, alone = estimate(name, rows[:, :4])
  close(found[:, :4], np.reshape(alone, (4, 4)))
  jax.tree.map(np.testing.assert_array_equal, memory, alone_memory)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_without_a_single_verdict_all_are_zero(name):
  memory, found = estimate(name, np.full((2, 3), NONE, np.float32))
  assert (np.asarray(found) == 0).all()
  if name == "per_prompt":
    assert not memory.count.any() and not memory.buffer.any()


def test_a_history_skips_them_and_goes_on():
  memory, _ = estimate("per_prompt", ROWS[:2])
  assert memory.count.tolist() == [2, 2]
  close(memory.buffer, [[1, 5, 0, 0], [4, 8, 0, 0]])
  memory, found = estimate("per_prompt", np.float32([[NONE, 3, 7], [6, NONE, NONE]]), memory)
  close(memory.buffer, [[1, 5, 3, 7], [4, 8, 6, 0]])
  # Of 1, 5, 3, 7 mean 4 and std sqrt(5); of 4, 8, 6 mean 6.
  close(found, [0, -1 / np.sqrt(5), 3 / np.sqrt(5), 0, 0, 0])


def test_rewards_by_themselves_skip_what_any_that_counts_has_not_judged():
  scores = scores_of(ROWS, a=np.where(np.isnan(ROWS), 100.0, ROWS), b=ROWS)
  made = advantages.make("leave_one_out", limit=1e9, per_reward=True)
  close(made.estimate(None, scores)[1], 2 * np.array([-4, 0, 4, 0, -4, 4, *np.zeros(6)]))


def test_an_estimator_from_outside_that_forgets_them_has_zeros_too():
  made = advantages.make(f"{__name__}:raw", limit=100.0)
  close(made.estimate(None, scores_of(ROWS))[1], np.where(VALID, np.ravel(ROWS), 0))


def raw():
  return advantages.Estimator(lambda count: None, lambda memory, s: (memory, jnp.ravel(s.total)))


def test_pairs_are_of_valid_samples_and_a_row_with_fewer_than_two_is_a_tie():
  _, labels = jax.jit(pairs.best_and_worst)(None, scores_of(ROWS), None)
  assert labels.samples.tolist() == [[2, 0], [5, 4], [6, 6], [9, 9]]
  close(labels.values["weight"], [2, 2, 0, 0])
  close(labels.values["gap"], [4, 4, 0, 0])
  close(labels.metrics["preference/ties"], 0.5)


LN_2 = float(np.log(2))
WEIGHTS = {
  # exp(ln 2 r) of 0, 1, 3 is 1, 2, 8, of mean 11 / 3; of these the best third is one.
  "exponential": (weights.exponential_weights, {"gamma": LN_2}, [3 / 11, 6 / 11, 24 / 11]),
  "sparse": (weights.sparse_weights, {"share": 1 / 3}, [0, 0, 3]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_are_zero_and_of_mean_one_over_the_others(kind):
  function, kwargs, expected = WEIGHTS[kind]
  weigh = jax.jit(functools.partial(function, **kwargs))
  rewards, valid = np.float32([0, NONE, 1, NONE, 3]), np.array([1, 0, 1, 0, 1], bool)
  found = weigh(rewards, valid)
  close(found, np.insert(np.float32(expected), [1, 2], 0))
  assert found[valid].mean() == pytest.approx(1.0)
  close(weigh(rewards, np.zeros(5, bool)), np.zeros(5))


def test_raft_keeps_what_has_a_verdict():
  # Of no pipeline: a label knows rewards only.
  label = raft.make(None, keep=2, refresh=1).data.label
  _, found = label(None, scores_of(ROWS), None)
  np.testing.assert_array_equal(found.samples[:5], [2, 0, 5, 4, 6])
  close(found.values["weight"], np.float32([1, 1, 1, 1, 1, 0, 0, 0]) * 8 / 5)
  close(found.metrics["reward/kept"], 20 / 5)
