import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign import losses

C = 0.2
# One column per region of (ratio, advantage): below, inside and above the interval, both signs.
RATIO = np.array([0.5, 0.5, 0.9, 0.9, 1.1, 1.1, 1.5, 1.5], np.float32)
ADVANTAGES = np.array([2.0, -2.0, 2.0, -2.0, 2.0, -2.0, 2.0, -2.0], np.float32)
OLD_LOG_PROB = np.linspace(-1.0, 0.5, 8).astype(np.float32)
LOG_PROB = OLD_LOG_PROB + np.log(RATIO)


def clipped(log_prob, old_log_prob=OLD_LOG_PROB, advantages=ADVANTAGES):
  return losses.clipped_pg_loss(log_prob, old_log_prob, advantages, clip_range=C)


def test_reinforce_by_hand():
  loss = losses.reinforce_loss(jnp.array([-1.0, 2.0, 0.5]), jnp.array([3.0, -1.0, 0.0]))
  np.testing.assert_array_equal(loss, [3.0, 2.0, 0.0])


def test_clipped_by_hand():
  # A = 2: -min(2 rho, 2 clip(rho)); A = -2: max(2 rho, 2 clip(rho)); clip to [0.8, 1.2].
  expected = [-1.0, 1.6, -1.8, 1.8, -2.2, 2.2, -2.4, 3.0]
  np.testing.assert_allclose(clipped(LOG_PROB), expected, rtol=1e-6)


def test_gradient_is_zero_exactly_where_clipping_is_active():
  grad = jax.grad(lambda log_prob: clipped(log_prob).sum())(LOG_PROB)
  # d loss / d log_prob = -A rho, except A < 0, rho < 0.8 (second) and A > 0, rho > 1.2 (seventh).
  expected = -ADVANTAGES * RATIO
  expected[[1, 6]] = 0.0
  np.testing.assert_allclose(grad, expected, rtol=1e-6)
  np.testing.assert_array_equal(np.flatnonzero(grad == 0.0), [1, 6])


@pytest.mark.parametrize("clip_range", [1e-4, 0.2])
def test_gradient_at_ratio_one_is_reinforce(clip_range):
  def total(fn):
    return jax.grad(lambda log_prob: fn(log_prob).sum())(OLD_LOG_PROB)

  ppo = total(
    lambda lp: losses.clipped_pg_loss(lp, OLD_LOG_PROB, ADVANTAGES, clip_range=clip_range)
  )
  reinforce = total(lambda lp: losses.reinforce_loss(lp, ADVANTAGES))
  np.testing.assert_array_equal(ppo, reinforce)
  np.testing.assert_array_equal(reinforce, -ADVANTAGES)


def test_a_small_step_raises_the_log_prob_of_a_good_sample():
  grad = jax.grad(lambda lp: clipped(lp).sum())(OLD_LOG_PROB)
  change = -1e-2 * grad
  np.testing.assert_array_equal(np.sign(change), np.sign(ADVANTAGES))


def test_no_gradient_but_to_log_prob():
  by_old, by_advantages = jax.grad(lambda old, adv: clipped(LOG_PROB, old, adv).sum(), (0, 1))(
    OLD_LOG_PROB, ADVANTAGES
  )
  np.testing.assert_array_equal(by_old, np.zeros(8))
  np.testing.assert_array_equal(by_advantages, np.zeros(8))
  by_advantages = jax.grad(lambda adv: losses.reinforce_loss(LOG_PROB, adv).sum())(ADVANTAGES)
  np.testing.assert_array_equal(by_advantages, np.zeros(8))


def test_importance_ratio():
  np.testing.assert_allclose(losses.importance_ratio(LOG_PROB, OLD_LOG_PROB), RATIO, rtol=1e-6)
  np.testing.assert_array_equal(losses.importance_ratio(LOG_PROB, LOG_PROB), np.ones(8))


def test_clip_fraction_counts_both_sides():
  fraction = losses.clip_fraction(LOG_PROB, OLD_LOG_PROB, clip_range=C)
  np.testing.assert_array_equal(fraction, [1, 1, 0, 0, 0, 0, 1, 1])
  assert fraction.dtype == jnp.float32


def test_clip_fraction_bounds_the_share_of_removed_gradients():
  grad = jax.grad(lambda log_prob: clipped(log_prob).sum())(LOG_PROB)
  outside = losses.clip_fraction(LOG_PROB, OLD_LOG_PROB, clip_range=C)
  assert np.all(np.asarray(grad == 0.0) <= np.asarray(outside))
  assert np.mean(grad == 0.0) < np.mean(outside)


def test_k2_by_hand_and_against_the_exact_gaussian_kl():
  np.testing.assert_allclose(
    losses.approx_kl_k2(jnp.array([0.0, 0.2, -0.3]), jnp.array([0.0, 0.1, 0.1])),
    [0.0, 0.005, 0.08],
    rtol=1e-5,
  )
  # old N(0, 1), new N(m, 1): KL(old || new) = m^2 / 2; E[k2] = m^2 / 2 + m^4 / 8.
  mean = 0.1
  x = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
  k2 = losses.approx_kl_k2(-0.5 * (x - mean) ** 2, -0.5 * x**2)
  np.testing.assert_allclose(np.mean(k2), mean**2 / 2, rtol=0.02)


def test_k2_keeps_its_digits_at_small_log_ratios():
  log_prob = jnp.array([1e-6], jnp.float32)
  k2 = losses.approx_kl_k2(log_prob, jnp.zeros(1))
  np.testing.assert_allclose(k2, [5e-13], rtol=1e-6)


def test_diagnostics_have_no_gradient():
  def total(log_prob):
    return (
      losses.clip_fraction(log_prob, OLD_LOG_PROB, clip_range=C)
      + losses.approx_kl_k2(log_prob, OLD_LOG_PROB)
    ).sum()

  np.testing.assert_array_equal(jax.grad(total)(LOG_PROB), np.zeros(8))


def test_jit_equals_no_jit():
  np.testing.assert_allclose(jax.jit(clipped)(LOG_PROB), clipped(LOG_PROB), rtol=1e-6)


def test_a_trailing_axis_is_an_error_that_names_the_arguments():
  column = OLD_LOG_PROB[:, None]
  message = r"expected equal shapes.*'old_log_prob': \(8, 1\)"
  with pytest.raises(ValueError, match=message):
    clipped(LOG_PROB, old_log_prob=column)
  with pytest.raises(ValueError, match=r"'advantages': \(8, 1\)"):
    losses.reinforce_loss(LOG_PROB, ADVANTAGES[:, None])
  for diagnostic in (losses.importance_ratio, losses.approx_kl_k2):
    with pytest.raises(ValueError, match=message):
      diagnostic(LOG_PROB, column)
  with pytest.raises(ValueError, match=message):
    losses.clip_fraction(LOG_PROB, column, clip_range=C)


def test_reinforce_finds_the_reward_maximum_of_a_gaussian_policy():
  # Policy N(mean, 0.5^2), reward -(x - 3)^2: the expected reward is largest at mean = 3.
  def total(mean, x, rewards):
    log_prob = -0.5 * ((x - mean) / 0.5) ** 2
    return losses.reinforce_loss(log_prob, rewards - rewards.mean()).mean()

  @jax.jit
  def step(mean, noise):
    x = mean + 0.5 * noise
    return mean - 0.02 * jax.grad(total)(mean, x, -((x - 3.0) ** 2))

  rng = np.random.default_rng(0)
  mean = 0.0
  for _ in range(200):
    mean = step(mean, rng.normal(size=256).astype(np.float32))
  assert math.isclose(float(mean), 3.0, abs_tol=0.1)


def test_losses_import_without_flax():
  code = (
    "import sys; sys.modules['flax'] = None; sys.modules['optax'] = None\n"
    "import jaxalign.losses\n"
    "assert not [m for m in sys.modules if m.startswith('jaxalign.models')]\n"
  )
  result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
