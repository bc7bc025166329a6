"""Log-ratio estimators against closed forms of Gaussians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy
from scheduler_configs import SD1
from toy_policy import KERNEL, PARAMS, PIPELINE, REFERENCE, TABLE

from jaxalign.diffusion import log_ratios, schedulers
from jaxalign.diffusion.kernel import mean_over_latents, transition_log_prob
from jaxalign.worlds import gaussian


def flat_transitions():
  rolled, cond = toy_policy.one_batch()
  i = np.array([0, 1, 3], np.int32)
  image = np.array([4, 2, 0])
  cond = cond._replace(cond=jax.tree.map(lambda leaf: leaf[image], cond.cond))
  return rolled.x[i, image], rolled.x[i + 1, image], TABLE[i], cond


def test_the_log_ratio_of_a_step_is_the_difference_of_two_log_probabilities():
  args = (*flat_transitions(), mean_over_latents)
  actual = log_ratios.step_log_ratio(KERNEL, PARAMS, REFERENCE, *args)
  expected = KERNEL.log_prob(PARAMS, *args) - KERNEL.log_prob(REFERENCE, *args)
  np.testing.assert_array_equal(actual, expected)
  same = log_ratios.step_log_ratio(KERNEL, PARAMS, PARAMS, *args)
  assert not same.any()


def test_no_gradient_reaches_the_reference():
  args = (*flat_transitions(), mean_over_latents)
  fn = lambda p, r: log_ratios.step_log_ratio(KERNEL, p, r, *args).sum()  # noqa: E731
  of_policy, of_reference = jax.grad(fn, argnums=(0, 1))(PARAMS, REFERENCE)
  assert all(leaf.any() for leaf in jax.tree.leaves(of_policy))
  assert not any(leaf.any() for leaf in jax.tree.leaves(of_reference))


def test_the_kl_of_a_step_is_the_expected_log_ratio():
  """Exact against the mean over 20,000 samples of the policy's own step, in nats."""
  x_t, _, row, cond = flat_transitions()
  kl = log_ratios.step_kl(KERNEL, PARAMS, REFERENCE, x_t, row, cond)
  mean, std = KERNEL.moments(PARAMS, x_t, row, cond)
  other, _ = KERNEL.moments(REFERENCE, x_t, row, cond)
  noise = jax.random.normal(jax.random.key(0), (20_000, *mean.shape))
  log_ratio = transition_log_prob(mean + std * noise, mean, std)
  log_ratio -= transition_log_prob(mean + std * noise, other, std)
  total = log_ratio.sum(axis=(2, 3, 4))
  error = np.asarray(total.std(axis=0) / np.sqrt(len(total)))
  assert (np.abs(np.asarray(total.mean(axis=0) - kl)) <= 4 * error + 1e-6).all()


def test_the_kl_of_a_trajectory_is_that_of_its_steps():
  rolled, cond = toy_policy.one_batch()
  kl = log_ratios.trajectory_kl(KERNEL, PARAMS, REFERENCE, TABLE, rolled.x, cond)
  assert kl.shape == rolled.log_prob.shape
  x_t, _, row, some = flat_transitions()
  steps = log_ratios.step_kl(KERNEL, PARAMS, REFERENCE, x_t, row, some)
  np.testing.assert_allclose(kl[np.array([0, 1, 3]), np.array([4, 2, 0])], steps, rtol=1e-5)
  itself = log_ratios.trajectory_kl(KERNEL, PARAMS, PARAMS, TABLE, rolled.x, cond)
  np.testing.assert_allclose(itself, 0.0, atol=1e-12)  # the square of float32's last place


def test_the_denoising_log_ratio_by_hand():
  """eps-prediction, one latent: errors 0.25 and 1, so half gives -0.5 (0.25 - 1) = 0.375."""
  step = PIPELINE.levels[np.array([500])]
  predict = lambda params, x_t, t, cond: jnp.full_like(x_t, params)  # noqa: E731
  args = (predict, step, "eps", jnp.zeros((1, 1)), jnp.ones((1, 1)), None)
  actual = log_ratios.denoising_log_ratio(0.5, 0.0, *args, log_ratios.half)
  np.testing.assert_allclose(actual, [0.375], rtol=1e-6)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_the_elbo_weight_gives_nats(prediction_type):
  """For two Gaussians, the average over levels and noise is the difference of their log-densities.

  The bound of the ideal denoiser of a Gaussian is tight up to discretisation (T = 1000), and the
  level next to the data, which counts 0 here, adds a difference that is small for wide Gaussians.
  """
  config = {**SD1, "prediction_type": prediction_type, "set_alpha_to_one": False}
  denoise = gaussian.make_denoise_fn(config)
  levels = schedulers.training_table(config)
  name = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}[prediction_type]
  cov = jnp.array([[[1.2, 0.3], [0.3, 0.8]]])
  policy = gaussian.Mixture(jnp.zeros(1), jnp.array([[0.6, -0.2]]), cov)
  reference = gaussian.Mixture(jnp.zeros(1), jnp.array([[0.0, 0.3]]), cov)
  x_0 = jnp.array([[0.4, 0.1], [1.5, -1.0], [-0.7, 0.2]])

  @jax.jit
  def at(level, key):
    eps = jax.random.normal(key, x_0.shape)
    args = (denoise, levels[jnp.full(3, level)], name, x_0, eps, None)
    weight = log_ratios.make_elbo(levels.num_steps)
    return log_ratios.denoising_log_ratio(policy._asdict(), reference._asdict(), *args, weight)

  keys = jax.random.split(jax.random.key(0), 64 * 1000).reshape(64, 1000)
  per_level = jax.lax.map(lambda ks: jax.vmap(at)(jnp.arange(1000), ks), keys)
  estimate = per_level.mean(axis=(0, 1))
  error = per_level.mean(axis=1).std(axis=0) / np.sqrt(64)
  exact = gaussian.log_prob(policy, x_0) - gaussian.log_prob(reference, x_0)
  # The prior of the noisiest level differs between the two by alpha_T^2 = 0.005 of the gap.
  np.testing.assert_allclose(estimate, exact, rtol=0.02, atol=4 * float(error.max()) + 0.01)
