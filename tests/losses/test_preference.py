"""Preference losses against numbers derived by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

# log p_theta = (-1, -1.5) and log p_ref = (-1.1, -1.3) for winner and loser: d = 0.1 - (-0.2).
W, L = jnp.array([0.1]), jnp.array([-0.2])
ZERO, ONE = jnp.zeros(1), jnp.ones(1)
LOSSES = (
  functools.partial(losses.dpo_loss, beta=2.0),
  functools.partial(losses.ipo_loss, tau=0.5),
)


def test_dpo_by_hand():
  # -log sigmoid(0.1 * 0.3) = log(1 + exp(-0.03)) = 0.678259676
  np.testing.assert_allclose(losses.dpo_loss(W, L, beta=0.1, p=ONE), [0.67825968], rtol=1e-6)


def test_dpo_at_the_reference_is_log_2_with_slope_half_beta():
  np.testing.assert_allclose(losses.dpo_loss(ZERO, ZERO, beta=7.0, p=ONE), [np.log(2.0)], rtol=1e-7)
  loss = lambda w, l: losses.dpo_loss(w, l, beta=7.0, p=ONE).sum()  # noqa: E731
  slopes = jax.grad(loss, argnums=(0, 1))(ZERO, ZERO)
  np.testing.assert_allclose(slopes, [[-3.5], [3.5]])


@pytest.mark.parametrize("beta", [0.1, 3.0, 5000.0])
def test_the_slope_of_dpo_is_minus_beta_sigmoid(beta):
  """d loss / d log_ratio_w = -beta sigmoid(-beta d), also far out, where exp would overflow."""
  w, p = jnp.array([0.3, -0.4, 0.0, 2.0, -2.0]), jnp.ones(5)
  slope = jax.grad(lambda w: losses.dpo_loss(w, jnp.zeros(5), beta=beta, p=p).sum())(w)
  expected = -beta / (1.0 + np.exp(np.clip(beta * np.asarray(w, np.float64), -700, 700)))
  np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-30)
  assert np.isfinite(losses.dpo_loss(w, -w, beta=beta, p=p)).all()


def test_ipo_by_hand_and_its_minimiser():
  # (0.3 - 1 / (2 * 0.1))^2 = 4.7^2
  np.testing.assert_allclose(losses.ipo_loss(W, L, tau=0.1, p=ONE), [22.09], rtol=1e-6)
  np.testing.assert_allclose(losses.ipo_loss(ZERO, ZERO, tau=0.1, p=ONE), [25.0], rtol=1e-6)
  at_target = jnp.array([4.0])
  slope = jax.grad(lambda w: losses.ipo_loss(w, -ONE, tau=0.1, p=ONE).sum())
  np.testing.assert_allclose(slope(at_target), [0.0], atol=1e-6)
  assert slope(at_target - 0.1) < 0 < slope(at_target + 0.1)


def test_both_depend_on_the_difference_alone():
  for loss in LOSSES:
    np.testing.assert_allclose(loss(W + 0.5, L + 0.5, p=ONE), loss(W, L, p=ONE), rtol=1e-5)
    assert not np.allclose(loss(L, W, p=ONE), loss(W, L, p=ONE))


def test_soft_labels_by_hand():
  p = jnp.array([0.75])
  # beta d = 0.6, and log(1 + exp(0.6)) = log(1 + exp(-0.6)) + 0.6
  expected = np.log1p(np.exp(-0.6)) + 0.25 * 0.6
  np.testing.assert_allclose(losses.dpo_loss(W, L, beta=2.0, p=p), [expected], rtol=1e-6)
  # (0.3 - 0.5 / (2 * 0.1))^2 = 2.2^2
  np.testing.assert_allclose(losses.ipo_loss(W, L, tau=0.1, p=p), [4.84], rtol=1e-6)


def test_the_optimum_of_a_soft_label():
  """DPO's margin goes to logit(p) / beta, IPO's to (2 p - 1) / (2 tau)."""
  p = jnp.array([0.5, 0.6, 0.9, 0.2])
  margins = np.log(p / (1 - p)) / 2.0, 2 * p - 1
  for loss, margin in zip(LOSSES, margins, strict=True):
    slope = jax.grad(lambda w, loss=loss: loss(w, jnp.zeros(4), p=p).sum())
    np.testing.assert_allclose(slope(margin), np.zeros(4), atol=1e-6)
    assert (slope(margin - 0.1) < 0).all() and (slope(margin + 0.1) > 0).all()


def test_a_tie_has_no_gradient_at_the_reference_and_elsewhere_pulls_back_to_it():
  w, tie = jnp.array([0.0, 0.7, -0.7]), jnp.full(3, 0.5)
  for loss in LOSSES:
    of_w, of_l = jax.grad(
      lambda w, l, loss=loss: loss(w, l, p=tie).sum(), argnums=(0, 1)
    )(w, jnp.zeros(3))
    np.testing.assert_array_equal(np.sign(of_w), [0.0, 1.0, -1.0])
    np.testing.assert_array_equal(of_w, -of_l)


def test_a_pair_swapped_while_p_becomes_one_minus_p_is_the_same_pair():
  w, l = jnp.array([0.1, -0.3, 2.0, 0.4]), jnp.array([-0.2, 0.5, 0.0, 0.4])
  p = jnp.array([1.0, 0.75, 0.5, 0.25])
  for loss in (*LOSSES, losses.implicit_accuracy):
    np.testing.assert_allclose(loss(w, l, p=p), loss(l, w, p=1 - p), rtol=1e-6)


def test_the_label_is_no_parameter():
  for loss in LOSSES:
    assert not jax.grad(lambda p, loss=loss: loss(W, L, p=p).sum())(ONE).any()


def test_the_ratio_is_clipped_before_the_logarithm():
  """D3PO's clip range of 0.1: log 0.9 and log 1.1, which are not symmetric."""
  given = jnp.array([-1.0, np.log(0.95), 0.0, np.log(1.05), 1.0])
  clipped = losses.clip_log_ratio(given, clip_range=0.1)
  np.testing.assert_allclose(clipped[jnp.array([0, 4])], [np.log(0.9), np.log(1.1)], rtol=1e-6)
  np.testing.assert_array_equal(clipped[1:4], given[1:4])


def test_the_clip_kills_the_gradient_on_either_side_for_winner_and_loser():
  """Also where the gradient would lead back, which the surrogate of PPO keeps."""

  def loss(w, l):
    clipped = [losses.clip_log_ratio(x, clip_range=0.1) for x in (w, l)]
    return losses.dpo_loss(*clipped, beta=0.1, p=jnp.ones(4)).sum()

  w = jnp.array([0.05, 0.5, -0.5, 0.05])
  l = jnp.array([-0.05, -0.5, 0.05, 0.5])
  of_w, of_l = jax.grad(loss, argnums=(0, 1))(w, l)
  assert ((of_w != 0) == np.array([True, False, False, True])).all()
  assert ((of_l != 0) == np.array([True, False, True, False])).all()


def test_implicit_accuracy_counts_a_tie_one_half():
  """Both that of the policy and that of the label."""
  w, l, p = jnp.array([1.0, 0.0, -1.0]), jnp.zeros(3), jnp.ones(3)
  np.testing.assert_array_equal(losses.implicit_accuracy(w, l, p=p), [1.0, 0.5, 0.0])
  np.testing.assert_array_equal(losses.implicit_accuracy(w, l, p=0.5 * p), [0.5, 0.5, 0.5])
  np.testing.assert_allclose(losses.implicit_accuracy(w, l, p=0.6 * p), [0.6, 0.5, 0.4])
  slope = jax.grad(lambda w: losses.implicit_accuracy(w, l, p=p).sum())(w)
  assert not slope.any()


def test_shapes_that_would_broadcast_are_refused():
  for loss in LOSSES:
    with pytest.raises(ValueError, match="expected equal shapes"):
      loss(jnp.zeros(3), jnp.zeros((3, 1)), p=jnp.ones(3))
    with pytest.raises(ValueError, match="expected equal shapes"):
      loss(jnp.zeros(3), jnp.zeros(3), p=jnp.ones((3, 1)))


def test_the_loss_of_a_reward_is_its_negative_or_its_shortfall():
  reward = jnp.array([1.5, 2.5])
  np.testing.assert_array_equal(losses.reward_loss(reward, target=None), [-1.5, -2.5])
  np.testing.assert_array_equal(losses.reward_loss(reward, target=2.0), [0.5, 0.0])
  slope = jax.grad(lambda r: losses.reward_loss(r, target=2.0).sum())(reward)
  np.testing.assert_array_equal(slope, [-1.0, 0.0])
