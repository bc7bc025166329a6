"""Rollouts: stored log-probabilities are those of the losses, exactness, gradients, one trace."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scheduler_configs import SD1

from jaxalign.diffusion import gaussian, guidance, rollout, transitions
from jaxalign.diffusion.kernel import Kernel

B, SHAPE = 3, (5, 3, 2)
FLOW = dict(_class_name="FlowMatchEulerDiscreteScheduler", shift=3.0)
PROCESSES = {
  "ddim": (SD1, dict(transition="ddim", eta=1.0)),
  "ddim_eta_0": (SD1, dict(transition="ddim", eta=0.0)),
  "ddpm": (dict(SD1, _class_name="DDPMScheduler"), dict(transition="ddpm")),
  "euler": (FLOW, dict(transition="euler")),
  "flow_sde": (FLOW, dict(transition="flow_sde", noise_level=0.7)),
  "dance_sde": (FLOW, dict(transition="dance_sde", eta=0.3)),
  "cps": (FLOW, dict(transition="cps", noise_level=0.8)),
}
PARAMS = {"w": jnp.float32(0.4), "b": jnp.linspace(-1.0, 1.0, 2)}


def denoise(params, x_t, t, cond):
  assert t.shape == x_t.shape[:1]
  time = (t / 1000)[:, None, None, None]
  return jnp.tanh(params["w"] * x_t + params["b"] * time + cond[:, None, None, None])


def mean_over_latents(elementwise):
  return elementwise.mean(axis=(1, 2, 3))


COND = jnp.array([0.1, -0.2, 0.3])
X_T = jax.random.normal(jax.random.key(9), (B, *SHAPE))


@functools.cache  # each process is built and compiled once for the whole file
def make(name):
  config, arguments = PROCESSES[name]
  return transitions.make_process(config, num_steps=6, **arguments)


def kernel(name, denoise_fn=denoise):
  return Kernel(denoise_fn, make(name).transition)


@functools.cache
def sampler(name, denoise_fn=denoise):
  return jax.jit(
    lambda key, params, cond: rollout.rollout(
      key, kernel(name, denoise_fn), params, make(name).table, X_T, cond, mean_over_latents
    )
  )


@functools.cache
def scorer(name, denoise_fn=denoise):
  """(params, x_t, x_s, i) -> [B], with the gradient of its sum."""

  def score(params, x_t, x_s, i):
    log_prob = kernel(name, denoise_fn).log_prob(
      params, x_t, x_s, make(name).table[i], COND, mean_over_latents
    )
    return log_prob.sum(), log_prob

  return jax.jit(jax.value_and_grad(score, argnums=(0, 2), has_aux=True))


def sample(name, key=0):
  return sampler(name)(jax.random.key(key), PARAMS, COND)


@pytest.mark.parametrize("name", PROCESSES)
def test_log_prob_is_recomputed_exactly(name):
  r, S = sample(name), make(name).table.num_steps
  assert r.x.shape == (S + 1, B, *SHAPE) and r.log_prob.shape == (S, B)
  assert r.x.dtype == r.log_prob.dtype == jnp.float32
  x, b = np.array(r.x), np.arange(B)
  # The last row puts the examples of one batch at different steps.
  for i in [*(np.full(B, i) for i in range(S)), np.array([0, S - 1, 2])]:
    (_, again), _ = scorer(name)(PARAMS, x[i, b], x[i + 1, b], i)
    # Two programs: JAX 0.12 rounds them differently, by a last place or two of x, which the last
    # step's deviation of 0.03 makes forty times as much.
    assert np.max(np.abs(again - np.array(r.log_prob)[i, b])) < 5e-6


@pytest.mark.parametrize("name", PROCESSES)
def test_deterministic_steps_are_known_and_score_zero(name):
  r, process = sample(name), make(name)
  expected = {
    "ddim": [True] * 6,
    "ddim_eta_0": [False] * 6,
    "euler": [False] * 6,
    "flow_sde": [True] * 6,
    "dance_sde": [True] * 6,
  }.get(name, [True] * 5 + [False])  # ddpm and cps end without noise
  assert process.noisy_steps() == np.flatnonzero(expected).tolist()
  if any(expected):
    assert process.stochastic_steps() == np.flatnonzero(expected).tolist()
  else:
    with pytest.raises(ValueError, match="every step is deterministic"):
      process.stochastic_steps()
  assert np.isfinite(r.log_prob).all() and np.isfinite(r.x).all()
  np.testing.assert_array_equal((np.array(r.log_prob) != 0).all(axis=1), expected)


@pytest.mark.parametrize("name", ["ddim", "flow_sde", "cps"])
def test_equals_a_plain_loop(name):
  process, r = make(name), sample(name, key=5)
  x = r.x[0]
  for i in range(process.table.num_steps):
    step = process.table[i]
    mean, std = process.transition(x, denoise(PARAMS, x, np.full(B, step.t), COND), step)
    z = jax.random.normal(jax.random.fold_in(jax.random.key(5), i), x.shape)
    x = mean + std * z
    np.testing.assert_allclose(r.x[i + 1], x, atol=2e-5)
    if std > 0:
      log_prob = mean_over_latents(gaussian.log_prob(x, mean, std))
      np.testing.assert_allclose(r.log_prob[i], log_prob, atol=2e-5)
  np.testing.assert_array_equal(r.x_0, r.x[-1])


def test_the_reduction_is_the_callers():
  r = sample("ddim")
  arguments = (PARAMS, r.x[2], r.x[3], make("ddim").table[np.full(B, 2)], COND)
  total = kernel("ddim").log_prob(*arguments, lambda e: e.sum(axis=(1, 2, 3)))
  np.testing.assert_allclose(total, np.prod(SHAPE) * r.log_prob[2], rtol=1e-5)
  with pytest.raises(TypeError, match="reduce_fn"):
    kernel("ddim").log_prob(*arguments)


def test_keys_decide_the_noise():
  first, again, other = (np.array(sample("flow_sde", key=k).x) for k in (1, 1, 2))
  np.testing.assert_array_equal(first, again)
  np.testing.assert_array_equal(first[0], other[0])
  assert np.abs(first[1] - other[1]).min() > 0
  np.testing.assert_array_equal(*(sample("euler", key=k).x for k in (1, 2)))


def test_policy_gradient_is_the_analytic_one():
  # d log_prob / d mean = (x_s - mean) / std^2, and the sample itself carries no gradient.
  i, b = np.array([1, 4, 2]), np.arange(B)
  x = np.array(sample("ddim").x)
  x_t, x_s = x[i, b], x[i + 1, b]
  _, (ours, through_sample) = scorer("ddim")(PARAMS, x_t, x_s, i)

  @jax.jit
  def analytic(params):
    (mean, std), pullback = jax.vjp(
      lambda p: kernel("ddim").moments(p, x_t, make("ddim").table[i], COND), params
    )
    score = (x_s - mean) / std**2 / np.prod(SHAPE)  # the reduction is a mean
    return pullback((score, jnp.zeros_like(std)))[0]

  jax.tree.map(lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-4), ours, analytic(PARAMS))
  assert np.abs(ours["w"]) > 0 and not np.any(through_sample)


@pytest.mark.parametrize("name", ["ddim_eta_0", "ddpm", "cps"])
def test_gradients_are_zero_and_finite_at_deterministic_steps(name):
  r = sample(name)
  _, (gradient, _) = scorer(name)(PARAMS, r.x[-2], r.x[-1], np.full(B, len(r.x) - 2))
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(leaf, np.zeros_like(leaf))


def test_the_sample_is_differentiable_by_reparameterisation():
  def loss(w):
    r = sampler("flow_sde")(jax.random.key(0), dict(PARAMS, w=w), COND)
    return jnp.mean(r.x_0**2)

  h = 1e-2
  numeric = (loss(0.4 + h) - loss(0.4 - h)) / (2 * h)
  np.testing.assert_allclose(jax.jit(jax.grad(loss))(0.4), numeric, rtol=1e-2)


def test_traces_once():
  traces = []

  def counting(params, x_t, t, cond):
    traces.append(x_t.shape)
    return denoise(params, x_t, t, cond)

  for seed in range(3):
    params = dict(PARAMS, w=jnp.float32(seed))
    sampler("ddim", counting)(jax.random.key(seed), params, COND + seed)
  assert traces == [(B, *SHAPE)]  # one scan, one body, however many steps and calls


def test_the_table_is_data_so_a_moving_window_of_noise_traces_once():
  traces = []

  def counting(params, x_t, t, cond):
    traces.append(x_t.shape)
    return denoise(params, x_t, t, cond)

  @jax.jit
  def sample(table):
    of_counting = kernel("flow_sde", counting)
    args = (PARAMS, table, X_T, COND, mean_over_latents)
    return rollout.rollout(jax.random.key(0), of_counting, *args)

  table = make("flow_sde").table
  for first in range(5):
    window = np.zeros(6, np.float32)
    window[first : first + 2] = 1.0
    log_prob = np.array(sample(dataclasses.replace(table, noise_scale=window)).log_prob)
    assert ((log_prob != 0).all(axis=1) == (window > 0)).all()
  assert traces == [(B, *SHAPE)]


def test_guided_rollout_with_equal_branches_is_the_unguided_one():
  guided = sampler("ddim", guidance.classifier_free(denoise, 5.0))
  both = guided(jax.random.key(0), PARAMS, guidance.Guided(COND, COND))
  np.testing.assert_allclose(both.x, sample("ddim").x, atol=1e-5)
  np.testing.assert_allclose(both.log_prob, sample("ddim").log_prob, atol=1e-5)


def test_half_precision_network_still_gives_float32():
  def low(params, x_t, t, cond):
    return denoise(params, x_t, t, cond).astype(jnp.bfloat16)

  r = sampler("ddim", low)(jax.random.key(0), PARAMS, COND)
  assert r.x.dtype == r.log_prob.dtype == jnp.float32
  (_, again), _ = scorer("ddim", low)(PARAMS, r.x[3], r.x[4], np.full(B, 3))
  assert np.max(np.abs(again - r.log_prob[3])) < 1e-6
