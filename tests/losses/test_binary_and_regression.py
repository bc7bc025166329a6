"""KTO's, NFT's and weighted losses: published numbers, and what moves them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

ONES = {"weight_good": 1.0, "weight_bad": 1.0}


def test_kto_equals_the_published_code():
  """Of Diffusion-KTO: its z is the clamped mean of the batch, 2.5e-4 here; in float64."""
  g, good = np.array([0.001, -0.002, 0.0005, 0.0015]), np.array([1.0, 0.0, 1.0, 0.0])
  loss = losses.kto_loss(g, good, np.maximum(0, g.mean()), beta=1000.0, **ONES)
  expected = 1 - np.array([0.6791787, 0.90465054, 0.5621765, 0.22270014])
  np.testing.assert_allclose(loss, expected, rtol=1e-4)
  np.testing.assert_allclose(loss.mean(), 0.40782354, rtol=1e-5)


@pytest.mark.parametrize("good, expected", [(1.0, 0.49875), (0.0, 0.49375033)])
def test_kto_by_hand(good, expected):
  """A log-ratio of 0.1 (good) or -0.2 (bad) against z = 0.05 at beta 0.1, weights of 1."""
  log_ratio = np.array([0.1 if good else -0.2])
  loss = losses.kto_loss(log_ratio, np.array([good]), 0.05, beta=0.1, **ONES)
  np.testing.assert_allclose(loss, [expected], rtol=1e-5)


def test_kto_at_the_reference_is_half_the_weight():
  weights = {"weight_good": 2.0, "weight_bad": 0.5}
  loss = losses.kto_loss(np.zeros(2), np.array([1.0, 0.0]), 0.0, beta=3.0, **weights)
  np.testing.assert_allclose(loss, [1.0, 0.25])


def test_kto_has_no_gradient_to_labels_and_reference_point_and_saturates():
  def total(log_ratio, good, z):
    return losses.kto_loss(log_ratio, good, z, beta=5.0, **ONES).sum()

  args = (jnp.array([0.3, -0.2]), jnp.array([1.0, 0.0]), jnp.float32(0.1))
  slope, *none = jax.grad(total, (0, 1, 2))(*args)
  assert slope[0] < 0 < slope[1]  # up with the good, down with the bad
  assert not any(leaf.any() for leaf in none)
  far = jax.grad(total)(jnp.array([40.0, -40.0]), *args[1:])
  np.testing.assert_allclose(far, [0, 0], atol=1e-12)


def nft(v, v_old=0.2, r=0.8, mix=1.0):
  """One number, at x_t = 0.6 and t = 0.4 of a flow towards x_0 = 0.5."""
  values = (0.5, 0.6 - 0.4 * v, 0.6 - 0.4 * v_old)
  x_0, x_0_theta, x_0_old = (jnp.full((1, 1), value) for value in values)
  return losses.nft_loss(x_0, x_0_theta, x_0_old, jnp.array([r]), mix=mix)[0]


def test_nft_by_hand():
  """x_+ = 0.48 and x_- = 0.56: 0.8 * 0.02 + 0.2 * 0.06, each square over its own distance."""
  np.testing.assert_allclose(nft(0.3), 0.028, rtol=1e-4)
  # At half the mix x_+ = 0.5 and x_- = 0.54: 0.2 * 0.04 / 0.5, and 0.8 * 0.
  np.testing.assert_allclose(nft(0.3, mix=0.5), 0.016, rtol=1e-4)


@pytest.mark.parametrize("mix", [0.1, 1.0])
def test_nft_at_the_old_policy_goes_by_the_optimality(mix):
  """There both policies are one, its error 0.02, and the slope (2 r - 1) d |x - x_0|^2 / |x - x_0|:
  of v, with x = 0.6 - 0.4 v above x_0, -0.8 (2 r - 1), whatever the mix.
  """
  for r in (0.0, 0.25, 0.5, 1.0):
    slope = jax.grad(lambda v, r=r: nft(v, r=r, mix=mix))(0.2)
    np.testing.assert_allclose(slope, -0.8 * (2 * r - 1), rtol=1e-4, atol=1e-6)


def test_nft_has_no_gradient_to_the_old_policy_and_bears_a_perfect_one():
  slope = jax.grad(lambda v_old: nft(0.3, v_old=v_old))(0.2)
  assert slope == 0.0
  assert jnp.isfinite(jax.grad(lambda v: nft(v, v_old=0.25))(0.25))  # x_0 itself: w is 1e-5


def test_the_weighted_error_by_hand():
  error, weight = jnp.array([1.0, 2.0]), jnp.array([0.5, 1.5])
  np.testing.assert_allclose(losses.weighted_error_loss(error, weight), [0.5, 3.0])
  slope = jax.grad(lambda w: losses.weighted_error_loss(error, w).sum())(weight)
  assert not slope.any()
  with pytest.raises(ValueError, match="equal shapes"):
    losses.weighted_error_loss(error, weight[:, None])
