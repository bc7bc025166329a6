"""Methods on the `gaussian` world: not only upwards, but to the right answer.

The reference is the ideal denoiser of a Gaussian in two dimensions and the reward is quadratic, so
the optimum of E[r] - beta KL is a Gaussian too (`gaussian.tilt`). The policy is the ideal denoiser
of a Gaussian whose mean and spread are trained, and its chain is affine, so that what it samples is
known without sampling. In continuous time the optimum is in this family; 192 steps leave the
reference's own samples 3 % short of variance.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shipped
import toy_policy

from jaxalign import methods
from jaxalign.diffusion import backprop, guidance, log_ratios, rollout, schedules, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents
from jaxalign.distributed import sharding
from jaxalign.labels import advantages
from jaxalign.labels.base import Scores
from jaxalign.models.families import gaussian as gaussian_family
from jaxalign.pipeline import Pipeline
from jaxalign.steering import Sampled
from jaxalign.training import feeds, optim, update
from jaxalign.training.feeds import base, online
from jaxalign.training.state import init_state, jit_end
from jaxalign.worlds import gaussian

pytestmark = pytest.mark.usefixtures("as_shipped")  # hundreds of iterations
MEAN, STD = np.array([0.5, -0.3], np.float32), np.array([1.0, 0.7], np.float32)
REFERENCE = {"mean": jnp.array(MEAN), "log_std": jnp.log(jnp.array(STD))}
REWARD = gaussian.QuadraticReward(jnp.diag(jnp.array([0.6, 1.0])), jnp.array([0.8, -0.5]))
COND = guidance.Guided({}, {})
FROZEN = {"base": {}, "reference": REFERENCE, "rewards": {}}


@functools.cache
def make_pipeline(num_steps, eta=1.0):
  table = schedules.log_snr_table(num_steps)
  exact = gaussian_family.make_denoise_fn("log_snr")

  def denoise(params, x_t, t, cond):
    return exact({"params": params}, x_t, t, cond)

  process = transitions.bind(table, "ddim", "x_0", eta=eta)
  kernel = Kernel(denoise, process.transition)
  return Pipeline(
    kernel=kernel,
    conditional=kernel,
    table=table,
    levels=table[::-1],
    prediction_type="x_0",
    latent_shape=(2,),
    decode=lambda frozen, x_0: x_0,
    reward=lambda frozen, x_0, features: REWARD(x_0),
  )


def moments_of_chain(params, table, eta=1.0):
  """Mean and variance `[2]` of x_0 as sampled, exact: the chain is affine; in float64."""
  mean, variance = np.asarray(params["mean"], np.float64), np.exp(2 * np.asarray(params["log_std"]))
  m, v = np.zeros(2), np.ones(2)
  for i in range(table.num_steps):
    a_t, s_t, a_s, s_s = (
      float(getattr(table, name)[i]) for name in ("alpha_t", "sigma_t", "alpha_s", "sigma_s")
    )
    gain = a_t * variance / (a_t**2 * variance + s_t**2)
    std = eta * s_s * np.sqrt(max(0.0, 1.0 - (a_t * s_s / (a_s * s_t)) ** 2))
    kept = np.sqrt(max(0.0, s_s**2 - std**2)) / s_t  # of eps = (x_t - a_t x_0) / s_t
    slope = kept + (a_s - kept * a_t) * gain
    m = slope * m + (a_s - kept * a_t) * (1.0 - gain * a_t) * mean
    v = slope**2 * v + std**2
  return m, v


def tilted(beta):
  covs = jnp.diag(jnp.array(STD) ** 2)[None]
  mixture = gaussian.Mixture(jnp.zeros(1), jnp.array(MEAN)[None], covs)
  mean, cov = gaussian.moments(gaussian.tilt(mixture, REWARD, beta)[0])
  return np.asarray(mean), np.diagonal(cov)


def make_optimizer(learning_rate, num_steps):
  return optim.make(
    learning_rate=learning_rate, max_grad_norm=1e9, weight_decay=0.0, b1=0.9, b2=0.99,
    epsilon=1e-8, warmup_steps=1, decay_steps=num_steps + 1,
  )  # fmt: skip


def trained(method, draw, select=None, *, learning_rate, num_updates):
  """The average of the last parameters; `draw(params, step) -> (data, selection)`."""
  tx = make_optimizer(learning_rate, num_updates)
  select = select or feeds.select_fn(method.data)
  update_fn = update.jit_update(method, tx, lambda params, base: params, select)
  state = init_state(REFERENCE, tx, copies=("ema",))
  end_fn = jit_end(sharding.one_device(), None)
  for step in range(num_updates):
    data, selection = draw(state.params, step)
    state, _ = jax.block_until_ready(update_fn(state, FROZEN, data, selection, 0, step, 0))
    state = end_fn(state, {"ema": 0.95})
  return state.sampling_params


def every_step(examples, steps):
  """All the steps of all the examples in one slice."""
  example = np.tile(np.arange(examples, dtype=np.int32), len(steps))
  return toy_policy.selection(example[None], np.repeat(np.array(steps, np.int32), examples)[None])


def test_the_reference_chain_is_nearly_the_reference():
  mean, variance = moments_of_chain(REFERENCE, schedules.log_snr_table(192))
  np.testing.assert_allclose(mean, MEAN, atol=2e-3)
  np.testing.assert_allclose(variance, STD**2, rtol=0.04)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_policy_gradient_with_the_exact_kl_reaches_the_tilted_distribution(beta):
  """Within 5 % of the mean's shift and 10 % of the variance; eta = 1 forgets where it began."""
  pipeline, batch = make_pipeline(192), 512
  steps = pipeline.process.stochastic_steps()
  estimator = advantages.make("leave_one_out", limit=1e9)
  method = methods.make("ddpo_sf", pipeline, kl_weight=beta, advantage=estimator)

  @shipped.jit
  def sample(params, key):
    key_start, key_steps = jax.random.split(key)
    x_T = jax.random.normal(key_start, (batch, 2))
    kernel, table = pipeline.kernel, pipeline.table
    rolled = rollout.rollout(key_steps, kernel, params, table, x_T, COND, mean_over_latents)
    kl = log_ratios.trajectory_kl(kernel, params, REFERENCE, table, rolled.x, COND).sum(axis=0)
    zero = jnp.zeros(1, jnp.int32)
    total = (REWARD(rolled.x_0) - beta * kl)[None]
    valid = jnp.ones(total.shape, bool)
    scores = Scores(total, {}, {}, 0.0 * total, zero, zero, valid)
    _, found = method.data.label(None, scores, key)
    return online.collect([Sampled(rolled, COND, rolled.x_0)]), table, found.samples, found.values

  def draw(params, step):
    data = sample(params, jax.random.fold_in(jax.random.key(0), step))
    return data, every_step(batch, steps)

  params = trained(method, draw, learning_rate=0.04, num_updates=140)
  mean, variance = moments_of_chain(params, pipeline.table)
  expected_mean, expected_variance = tilted(beta)
  shift = np.linalg.norm(expected_mean - MEAN)
  assert np.linalg.norm(mean - expected_mean) < 0.05 * shift
  np.testing.assert_allclose(variance, expected_variance, rtol=0.1)


def preferred_first(rng, samples, rewards):
  """`[N, 2, ...]` samples in the order of Bradley-Terry choices by their true rewards `[N, 2]`."""
  first = rng.random(len(rewards)) < 1.0 / (1.0 + np.exp(rewards[:, 1] - rewards[:, 0]))
  return np.where(first[:, None, None], samples, samples[:, ::-1])


def log_density(params, x):
  z = (x - params["mean"]) / jnp.exp(params["log_std"])
  return jnp.sum(-0.5 * jnp.square(z) - params["log_std"], axis=-1)


@pytest.mark.parametrize("beta", [1.0, 0.5])
def test_dpo_recovers_the_reward_that_labelled_its_pairs(beta):
  """beta log p_theta / p_ref, in closed form, against the true reward on new pairs.

  One draw of (level, noise) a pair would do as a regression on a noisy regressor does: the slope
  of the implicit reward was 0.25 and its correlation 0.89, as the noise is more for the spread than
  for the mean. With 64 draws the noise is gone but for a few per cent.
  """
  pipeline, batch, num_pairs = make_pipeline(192), 1024, 20_000
  method = methods.make("dpo", pipeline, beta=beta, time_weight="elbo", num_draws=64)
  rng = np.random.default_rng(0)
  x = (MEAN + STD * rng.normal(size=(num_pairs, 2, 2))).astype(np.float32)
  x = preferred_first(rng, x, np.asarray(REWARD(x.reshape(-1, 2))).reshape(-1, 2))

  def draw(params, step):
    rows = np.random.default_rng([0, step]).integers(num_pairs, size=batch)
    data = base.stack([methods.Finished(x[rows], {}, {"p": np.ones(batch, np.float32)})])
    return data, np.arange(batch, dtype=np.int32)[None]

  params = trained(method, draw, learning_rate=0.02, num_updates=120)
  new = (MEAN + STD * rng.normal(size=(2000, 2, 2))).astype(np.float32)
  true = np.diff(np.asarray(REWARD(new.reshape(-1, 2))).reshape(-1, 2))[:, 0]
  log_ratio = log_density(params, new) - log_density(REFERENCE, new)
  implicit = beta * np.diff(np.asarray(log_ratio))[:, 0]
  assert np.corrcoef(true, implicit)[0, 1] > 0.99
  assert 0.85 < true @ implicit / (true @ true) < 1.05


@pytest.mark.parametrize("beta", [4.0, 2.0])
def test_d3po_recovers_the_reward_of_trajectories_from_one_start(beta):
  """beta times the sum over steps of the log-ratio, means over D = 2, so half of it in nats.

  Each step is trained on the choice between finished samples. To first order its best log-ratio is
  the change that the step made to the expected reward, and these changes add up to the reward's
  difference; the loss's second order, the KL of a step, bends that. The gap grows as beta falls:
  0.990 at 4, 0.987 at 2, 0.970 at 1.
  """
  pipeline, batch = make_pipeline(64), 768
  steps = pipeline.process.stochastic_steps()
  method = methods.make("d3po", pipeline, beta=beta, clip_range=0.999)
  kernel, table = pipeline.kernel, pipeline.table

  @shipped.jit
  def sample(key):
    key_start, key_steps = jax.random.split(key)
    x_T = jax.random.normal(key_start, (batch, 2)).repeat(2, axis=0)
    rolled = rollout.rollout(key_steps, kernel, REFERENCE, table, x_T, COND, mean_over_latents)
    return rolled, REWARD(rolled.x_0).reshape(batch, 2)

  def draw(params, step):
    rolled, reward = sample(jax.random.key(step))
    images = np.arange(2 * batch, dtype=np.int32).reshape(batch, 2, 1)
    images = preferred_first(np.random.default_rng([0, step]), images, np.asarray(reward))[..., 0]
    weight = {"weight": np.ones(batch, np.float32)}
    data = (online.collect([Sampled(rolled, COND, rolled.x_0)]), table, images, weight)
    return data, every_step(batch, steps)

  params = trained(method, draw, learning_rate=0.03, num_updates=80)
  rolled, reward = sample(jax.random.key(10_000))

  @jax.jit
  def log_ratio_of_step(x_t, x_s, i):
    row = table[jnp.full(len(x_t), i)]
    return log_ratios.step_log_ratio(
      kernel, params, REFERENCE, x_t, x_s, row, COND, mean_over_latents
    )

  log_ratio = sum(log_ratio_of_step(rolled.x[i], rolled.x[i + 1], i) for i in steps)
  implicit = beta * np.diff(np.asarray(log_ratio).reshape(batch, 2))[:, 0]
  true = np.diff(np.asarray(reward))[:, 0]
  assert np.corrcoef(true, implicit)[0, 1] > 0.98


@pytest.mark.parametrize("num_grad_steps", [1, 3, 12])
def test_the_gradient_of_draft_equals_the_analytic_one(num_grad_steps):
  """x_0 is affine in what the chain starts from; here that product is written out, in float64."""
  pipeline = make_pipeline(12)
  S, table = 12, pipeline.table
  method = methods.make("draft", pipeline, num_grad_steps=num_grad_steps, kl_weight=0.0)
  batch = methods.Inputs(guidance.Guided({"row": jnp.zeros((5, 1))}, {}), jnp.zeros(5))
  key = jax.random.key(4)
  params = {"mean": jnp.array([0.2, 0.1]), "log_std": jnp.array([0.1, -0.2])}
  fn = jax.jit(jax.grad(lambda p: method.loss(p, FROZEN, batch, key)[0].mean()))
  actual = fn(params)

  # The same noise, step by step.
  key_start, key_sample = jax.random.split(key)
  x = np.asarray(jax.random.normal(key_start, (5, 2)), np.float64)
  mean, log_std = (np.asarray(params[name], np.float64) for name in ("mean", "log_std"))
  variance = np.exp(2 * log_std)
  of_mean, of_log_std = np.zeros((5, 2)), np.zeros((5, 2))  # d x / d parameter, each dimension
  for i in range(S):
    a_t, s_t, a_s, s_s = (
      float(getattr(table, name)[i]) for name in ("alpha_t", "sigma_t", "alpha_s", "sigma_s")
    )
    total = a_t**2 * variance + s_t**2
    gain = a_t * variance / total
    of_gain = 2 * a_t * variance * s_t**2 / total**2  # d gain / d log_std
    std = s_s * np.sqrt(max(0.0, 1.0 - (a_t * s_s / (a_s * s_t)) ** 2))
    kept = np.sqrt(max(0.0, s_s**2 - std**2)) / s_t
    c = a_s - kept * a_t  # d x_s / d x_0_theta
    if i < S - num_grad_steps:
      of_mean, of_log_std = np.zeros((5, 2)), np.zeros((5, 2))
    else:
      slope = kept + c * gain
      of_mean = slope * of_mean + c * (1.0 - gain * a_t)
      of_log_std = slope * of_log_std + c * of_gain * (x - a_t * mean)
    noise = np.asarray(jax.random.normal(jax.random.fold_in(key_sample, i), (5, 2)), np.float64)
    x = kept * x + c * (mean + gain * (x - a_t * mean)) + std * noise
  of_reward = np.asarray(REWARD.slope) - x @ np.asarray(REWARD.curvature, np.float64)
  np.testing.assert_allclose(actual["mean"], -(of_reward * of_mean).mean(axis=0), rtol=1e-4)
  np.testing.assert_allclose(actual["log_std"], -(of_reward * of_log_std).mean(axis=0), rtol=1e-4)


def test_draft_climbs_where_the_reward_is_and_the_kl_holds_it_back():
  """More weight on the KL, less of a shift; none, the maximum of the reward, b / A."""
  pipeline = make_pipeline(12, eta=0.5)
  best = np.asarray(REWARD.slope) / np.diagonal(REWARD.curvature)
  batch = methods.Inputs(guidance.Guided({"row": jnp.zeros((128, 1))}, {}), jnp.zeros(128))
  shifts = []
  for kl_weight in (0.0, 0.2, 1.0):
    method = methods.make("draft", pipeline, num_grad_steps=0, kl_weight=kl_weight)
    draw = lambda params, step: (batch, np.arange(128, dtype=np.int32)[None])  # noqa: E731
    select = lambda data, rows: data  # noqa: E731
    params = trained(method, draw, select, learning_rate=0.1, num_updates=120)
    mean, _ = moments_of_chain(params, pipeline.table, eta=0.5)
    shifts.append(np.linalg.norm(mean - MEAN))
    if kl_weight == 0.0:
      np.testing.assert_allclose(mean, best, atol=0.06)
  assert shifts[0] > 1.5 * shifts[1] > 1.5 * 1.5 * shifts[2] > 0


def test_windows_of_this_chain_sample_alike():
  pipeline = make_pipeline(12)
  x_T = jax.random.normal(jax.random.key(0), (3, 2))
  sample = lambda k: backprop.last_steps(  # noqa: E731
    jax.random.key(1), pipeline.kernel, REFERENCE, None, pipeline.table, x_T, COND, num_steps=k
  )[0]
  np.testing.assert_allclose(sample(1), sample(12), rtol=1e-5, atol=1e-6)
