"""Labels other than advantages, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from advantage_cases import close
from toy_policy import scores_of

from jaxalign.labels import pairs, weights


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
