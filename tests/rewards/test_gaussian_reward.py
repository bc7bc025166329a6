"""The quadratic reward: hand-derived values, and the same on the host and the device."""

import jax
import numpy as np
import pytest

from jaxalign import rewards

RECORDS = [{}, {"id": 1}, {}]
POINTS = np.array([[0.0, 0.0], [1.0, 0.0], [1.0, -1.0]], np.float32)
VALUES = [0.0, 0.8 - 0.3, 0.8 - 0.3 + 0.5 - 0.5]


def test_values_and_gradient():
  reward = rewards.make_device("gaussian_quadratic")
  query = reward.encode(RECORDS)
  assert query.shape == (3, 1)
  np.testing.assert_allclose(reward.score(reward.params, POINTS, query), VALUES, atol=1e-6)
  grad = jax.grad(lambda x: reward.score(reward.params, x, query).sum())(POINTS)
  np.testing.assert_allclose(grad, [[0.8, -0.5], [0.2, -0.5], [0.2, 0.5]], atol=1e-6)
  on_host = rewards.make("gaussian_quadratic")
  np.testing.assert_allclose(on_host.fn(POINTS, RECORDS), VALUES, atol=1e-6)
  shapes = rewards.make("gaussian_quadratic", shapes_only=True).device.params
  assert jax.tree.map(np.shape, shapes) == {"curvature": (2, 2), "slope": (2,)}


def test_a_reward_of_ones_own():
  reward = rewards.make("gaussian_quadratic", curvature=[[2.0]], slope=[1.0])
  np.testing.assert_allclose(reward.fn(np.array([[3.0]], np.float32), [{}]), [3.0 - 9.0])
  with pytest.raises(ValueError, match=r"expected \[D, D\] and \[D\]"):
    rewards.make("gaussian_quadratic", slope=[1.0])
  with pytest.raises(ValueError, match="expected a symmetric matrix"):
    rewards.make("gaussian_quadratic", curvature=[[1.0, 2.0], [0.0, 1.0]])
