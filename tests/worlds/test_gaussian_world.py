"""The closed forms against quadrature, scipy, and samplers driven by the ideal denoiser."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from scheduler_configs import SD1

from jaxalign.diffusion import rollout, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.worlds import gaussian

COVS = np.array([[[0.5, 0.2], [0.2, 0.3]], [[0.2, -0.1], [-0.1, 0.4]]])
MIXTURE = gaussian.Mixture(
  log_weights=jnp.log(jnp.array([0.3, 0.7])),
  means=jnp.array([[-1.0, 0.5], [1.2, -0.4]]),
  covs=jnp.asarray(COVS),
)
REWARD = gaussian.QuadraticReward(
  curvature=jnp.array([[0.8, 0.3], [0.3, 0.5]]), slope=jnp.array([0.4, -1.1])
)
LINE = gaussian.Mixture(
  log_weights=jnp.log(jnp.array([0.4, 0.6])),
  means=jnp.array([[-1.0], [0.8]]),
  covs=jnp.array([[[0.3]], [[0.5]]]),
)
X = jax.random.normal(jax.random.key(0), (7, 2))
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 1.0}


def density(x):
  parts = zip((0.3, 0.7), MIXTURE.means, COVS, strict=True)
  return sum(w * scipy.stats.multivariate_normal(m, c).pdf(x) for w, m, c in parts)


def line_density(x):
  return float(jnp.exp(gaussian.log_prob(LINE, jnp.array([[x]])))[0])


def integrate(function):
  return scipy.integrate.quad(function, -8, 8, limit=200)[0]


def test_log_prob_is_scipys():
  np.testing.assert_allclose(
    np.exp(gaussian.log_prob(MIXTURE, X)), density(np.asarray(X)), rtol=1e-4
  )


def test_score_is_the_slope_of_the_log_density():
  h = 1e-4
  for i in range(2):
    shift = h * np.eye(2)[i]
    up, down = np.log(density(np.asarray(X) + shift)), np.log(density(np.asarray(X) - shift))
    np.testing.assert_allclose(
      gaussian.score(MIXTURE, X)[:, i], (up - down) / (2 * h), rtol=1e-4, atol=1e-4
    )


def test_samples_have_the_moments():
  n = 20_000
  x = gaussian.sample(jax.random.key(1), MIXTURE, n)
  mean, cov = gaussian.moments(MIXTURE)
  error = np.sqrt(np.diag(cov) / n)
  assert (np.abs(x.mean(0) - mean) < 4 * error).all()
  np.testing.assert_allclose(np.cov(x.T), cov, atol=0.05)


def test_moments_by_hand():
  # Mean .4 * -1 + .6 * .8; variance .4 * .3 + .6 * .5 within, .4 * .6 * 1.8^2 between.
  mean, cov = gaussian.moments(LINE)
  np.testing.assert_allclose(mean, [0.08], atol=1e-6)
  np.testing.assert_allclose(cov, [[0.42 + 0.7776]], rtol=1e-6)


@pytest.mark.parametrize("alpha, sigma", [(0.9, 0.3), (0.5, 0.8), (0.0, 1.0)])
def test_the_posterior_mean_is_tweedies(alpha, sigma):
  """alpha E[x_0 | x_t] = x_t + sigma^2 score(x_t): Efron 2011, by way of the score."""
  marginal = gaussian.noised(MIXTURE, alpha, sigma)
  alphas, sigmas = jnp.full(len(X), alpha), jnp.full(len(X), sigma)
  x_0 = gaussian.posterior_mean(MIXTURE, X, alphas, sigmas)
  np.testing.assert_allclose(
    alpha * x_0, X + sigma**2 * gaussian.score(marginal, X), rtol=1e-4, atol=1e-5
  )


def test_the_posterior_mean_is_bayes():
  x_t, alpha, sigma = 0.4, 0.7, 0.6

  def joint(x):
    return line_density(x) * scipy.stats.norm.pdf(x_t, alpha * x, sigma)

  expected = integrate(lambda x: x * joint(x)) / integrate(joint)
  actual = gaussian.posterior_mean(LINE, jnp.array([[x_t]]), jnp.array([alpha]), jnp.array([sigma]))
  np.testing.assert_allclose(actual[0, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_tilted_density_is_the_exponential_of_the_reward(beta):
  tilted, log_z = gaussian.tilt(MIXTURE, REWARD, beta)
  expected = gaussian.log_prob(MIXTURE, X) + REWARD(X) / beta - log_z
  np.testing.assert_allclose(gaussian.log_prob(tilted, X), expected, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(jnp.sum(jnp.exp(tilted.log_weights)), 1.0, rtol=1e-6)


def test_the_normaliser_and_the_value_of_the_optimum_by_quadrature():
  beta = 0.7
  reward = gaussian.QuadraticReward(jnp.array([[0.5]]), jnp.array([0.9]))
  tilted, log_z = gaussian.tilt(LINE, reward, beta)

  def r(x):
    return 0.9 * x - 0.25 * x * x

  def unnormalised(x):
    return line_density(x) * np.exp(r(x) / beta)

  z = integrate(unnormalised)
  np.testing.assert_allclose(log_z, np.log(z), rtol=1e-5)
  mean = integrate(lambda x: x * unnormalised(x)) / z
  np.testing.assert_allclose(gaussian.moments(tilted)[0], [mean], rtol=1e-4)

  def gain(x):
    q = unnormalised(x) / z
    return q * (r(x) - beta * np.log(q / line_density(x)))

  value = integrate(gain)
  np.testing.assert_allclose(beta * log_z, value, rtol=1e-5)


def test_a_reward_without_an_optimum_is_refused():
  steep = gaussian.QuadraticReward(-jnp.eye(2), jnp.zeros(2))
  with pytest.raises(ValueError, match="rises faster than the density falls"):
    gaussian.tilt(MIXTURE, steep, 0.1)
  with pytest.raises(ValueError, match="beta: expected a positive temperature, got 0"):
    gaussian.tilt(MIXTURE, REWARD, 0.0)


@pytest.mark.parametrize(
  "scheduler, transition, knobs",
  [
    ({**SD1, "prediction_type": "epsilon"}, "ddim", {"eta": 1.0}),
    ({**SD1, "prediction_type": "v_prediction"}, "ddim", {"eta": 0.0}),
    ({**SD1, "prediction_type": "sample"}, "ddpm", {}),
    (FLOW, "euler", {}),
    (FLOW, "flow_sde", {"noise_level": 0.7}),
    (FLOW, "cps", {"noise_level": 0.5}),
  ],
)
def test_every_sampler_reaches_the_mixture_with_the_ideal_denoiser(scheduler, transition, knobs):
  n = 4_000
  process = transitions.make_process(scheduler, num_steps=200, transition=transition, **knobs)
  denoise_fn = gaussian.make_denoise_fn(scheduler)

  @jax.jit
  def run(key):
    key_start, key_steps = jax.random.split(key)
    x_T = jax.random.normal(key_start, (n, 2))
    kernel = Kernel(denoise_fn, process.transition)
    rolled = rollout.rollout(
      key_steps, kernel, MIXTURE._asdict(), process.table, x_T, None, mean_over_latents
    )
    return rolled.x_0

  x_0 = run(jax.random.key(3))
  mean, cov = gaussian.moments(MIXTURE)
  np.testing.assert_allclose(x_0.mean(0), mean, atol=0.1)
  np.testing.assert_allclose(np.cov(x_0.T), cov, atol=0.15)
  left = float((x_0[:, 0] < 0).mean())  # the modes, not the moments alone
  expected = float((gaussian.sample(jax.random.key(4), MIXTURE, 50_000)[:, 0] < 0).mean())
  assert abs(left - expected) < 0.04


def test_no_record_is_in_two_sets():
  numbers = {
    split: {record["number"] for record in gaussian.records(split)} for split in gaussian.SIZES
  }
  assert {split: len(found) for split, found in numbers.items()} == gaussian.SIZES
  assert len(set.union(*numbers.values())) == sum(gaussian.SIZES.values())
  with pytest.raises(ValueError, match=r"expected one of test, validation, train, got 'held_out'"):
    gaussian.records("held_out")
