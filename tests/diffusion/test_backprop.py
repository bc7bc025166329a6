"""Windows of a differentiable chain: values, gradients, and which of them are the same thing."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_policy
from toy_policy import GUIDED, KERNEL, PARAMS, REFERENCE, SHAPE, TABLE

from jaxalign.diffusion import backprop, guidance, log_ratios, rollout, transitions
from jaxalign.diffusion.kernel import Kernel, mean_over_latents

S = TABLE.num_steps
KEY = jax.random.key(2)
X_T = jax.random.normal(jax.random.key(3), (2, *SHAPE))
COND = guidance.Guided({"text": jnp.array([[0.1, -0.2], [0.0, 0.3]])}, {"text": jnp.zeros((1, 2))})


def square(x_0):
  return jnp.sum(jnp.square(x_0 - 0.5))


@functools.partial(jax.jit, static_argnames=("num_steps", "kl"))
def grad_of_window(params, first=0, *, num_steps, kl=False):
  """`(x_0, KL [B]), gradient` of `square`, or of the KL."""

  def fn(params):
    reference = REFERENCE if kl else None
    x_0, nats = backprop.last_steps(
      KEY, KERNEL, params, reference, TABLE, X_T, COND, num_steps=num_steps, first=first
    )
    return (nats.sum() if kl else square(x_0)), (x_0, nats)

  (_, out), grad = jax.value_and_grad(fn, has_aux=True)(params)
  return out, grad


@jax.jit
def sample():
  return rollout.rollout(KEY, KERNEL, PARAMS, TABLE, X_T, COND, mean_over_latents)


@pytest.mark.parametrize("num_steps", range(1, S + 1))
def test_every_window_samples_what_the_rollout_samples(num_steps):
  (x_0, _), _ = grad_of_window(PARAMS, num_steps=num_steps)
  np.testing.assert_allclose(x_0, sample().x_0, rtol=1e-5, atol=1e-6)


def test_the_whole_window_is_plain_back_propagation():
  def fn(params):
    args = (TABLE, X_T, COND, mean_over_latents)
    return square(rollout.rollout(KEY, KERNEL, params, *args).x_0)

  expected = jax.jit(jax.grad(fn))(PARAMS)
  _, grad = grad_of_window(PARAMS, num_steps=S)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), grad, expected)


@pytest.mark.parametrize("num_steps", range(1, S))
def test_a_window_is_the_gradient_from_the_stored_state_on(num_steps):
  """DRaFT-K: x at step S - K is a constant, the rest of the chain is not."""

  def fn(params):
    x = sample().x[S - num_steps]
    for i in range(S - num_steps, S):
      mean, std = KERNEL.moments(params, x, TABLE[jnp.full(2, i, jnp.int32)], COND)
      x = mean + std * jax.random.normal(jax.random.fold_in(KEY, i), x.shape)
    return square(x)

  _, grad = grad_of_window(PARAMS, num_steps=num_steps)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), grad, jax.jit(jax.grad(fn))(PARAMS)
  )


@pytest.mark.parametrize("num_steps", range(1, S + 1))
def test_a_window_decided_at_run_time_equals_the_static_one(num_steps):
  """AlignProp with a cut before step S - K is DRaFT-K."""
  dynamic = grad_of_window(PARAMS, jnp.int32(S - num_steps), num_steps=S)
  static = grad_of_window(PARAMS, num_steps=num_steps)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), dynamic, static)


def test_the_kl_of_the_window_is_that_of_its_steps():
  x = sample().x
  every = log_ratios.trajectory_kl(KERNEL, PARAMS, REFERENCE, TABLE, x, COND)
  for num_steps in (2, S):
    (_, kl), grad = grad_of_window(PARAMS, num_steps=num_steps, kl=True)
    np.testing.assert_allclose(kl, every[S - num_steps :].sum(axis=0), rtol=1e-4)
    assert all(leaf.any() for leaf in jax.tree.leaves(grad))
  (_, kl), _ = grad_of_window(PARAMS, jnp.int32(S - 2), num_steps=S, kl=True)
  np.testing.assert_allclose(kl, every[S - 2 :].sum(axis=0), rtol=1e-4)


def test_a_window_of_no_or_too_many_steps_is_refused():
  for num_steps in (0, S + 1):
    with pytest.raises(ValueError, match=f"1 to {S} steps to differentiate through"):
      grad_of_window(PARAMS, num_steps=num_steps)


def test_refl_predicts_x_0_at_its_step_and_only_that_call_carries_gradient():
  predict = jax.jit(lambda p, i: backprop.one_prediction(
    KEY, KERNEL, p, TABLE, "eps", X_T, COND, i=i
  ))  # fmt: skip
  x = sample().x
  for i in range(S):
    step = TABLE[np.full(2, i)]

    def by_hand(params, x_t=x[i], step=step):
      eps = GUIDED(params, x_t, step.t, COND)
      alpha, sigma = (jnp.reshape(c, (2, 1, 1, 1)) for c in (step.alpha_t, step.sigma_t))
      return (x_t - sigma * eps) / alpha

    np.testing.assert_allclose(predict(PARAMS, i), by_hand(PARAMS), rtol=1e-4, atol=1e-4)
    grad = jax.grad(lambda p, i=i: square(predict(p, i)))(PARAMS)
    expected = jax.grad(lambda p, fn=by_hand: square(fn(p)))(PARAMS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3), grad, expected)


def test_draft_lv_is_unbiased_for_the_one_step_term():
  """The mean gradient over noisings against quadrature over eps, on one latent.

  With x_1 = alpha x_0 + sigma eps and prediction w x_1 (eps), the last step is linear in x_1, so
  the expected gradient of its square is a polynomial in w of the moments of x_1.
  """
  process = transitions.make_process(
    {**toy_policy.SD1, "set_alpha_to_one": True}, num_steps=3, transition="ddim", eta=0.0
  )
  step = process.table[2]
  alpha, sigma = float(step.alpha_t), float(step.sigma_t)
  x_0, w = jnp.full((1, 1), 0.7), jnp.float32(0.9)
  network = lambda params, x_t, t, cond: params * x_t  # noqa: E731
  kernel, num = Kernel(network, process.transition), 40_000

  @jax.jit
  @jax.vmap
  def one(key):
    fn = lambda w: jnp.sum(  # noqa: E731
      jnp.square(backprop.noised_last_step(key, kernel, w, process.table, x_0, None) - 0.5)
    )
    return jax.grad(fn)(w)

  grads = one(jax.random.split(jax.random.key(0), num))
  # x_s = (x_1 - sigma w x_1) / alpha = c x_1, d x_s / d w = -sigma x_1 / alpha.
  c, slope = (1 - sigma * float(w)) / alpha, -sigma / alpha
  second = (alpha * 0.7) ** 2 + sigma**2
  expected = 2 * slope * (c * second - 0.5 * alpha * 0.7)
  error = float(grads.std()) / np.sqrt(num)
  assert abs(float(grads.mean()) - expected) < 4 * error
  assert 4 * error < 0.05 * abs(expected)


def test_the_gradient_of_the_whole_chain_equals_finite_differences_in_float64():
  """In a process of its own, where JAX computes in float64 throughout."""
  program = """
import jax
jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import numpy as np
import toy_policy
from jaxalign.diffusion import backprop, guidance
from jaxalign.diffusion.schedules import StepTable

table = StepTable(*(np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(toy_policy.TABLE)))
x_T = jax.random.normal(jax.random.key(0), (2, 1, 1, 2), jnp.float64)
cond = guidance.Guided({"text": jnp.array([[0.1, -0.2], [0.0, 0.3]])}, {"text": jnp.zeros((1, 2))})

def denoise(params, x_t, t, cond):
  hidden = jnp.tanh(x_t @ params["in"] + cond["text"][:, None, None])
  return hidden @ params["out"] + 0.1 * x_t

guided = guidance.classifier_free(denoise, 1.5)
kernel = toy_policy.KERNEL._replace(denoise_fn=guided)
rng = np.random.default_rng(0)
params = {"in": jnp.array(rng.normal(size=(2, 2))), "out": jnp.array(rng.normal(size=(2, 2)))}

def total(params):
  x_0, kl = backprop.last_steps(
    jax.random.key(1), kernel, params, None, table, x_T, cond, num_steps=4)
  return jnp.sum(jnp.square(x_0 - 0.5))

total = jax.jit(total)
grad = jax.grad(total)(params)
worst = 0.0
for name in params:
  for index in np.ndindex(2, 2):
    h = HSTEP
    up = {**params, name: params[name].at[index].add(h)}
    down = {**params, name: params[name].at[index].add(-h)}
    numeric = (float(total(up)) - float(total(down))) / (2 * h)
    worst = max(worst, abs(numeric - float(grad[name][index])) / abs(numeric))
print(worst)
""".replace("HSTEP", "1e-6")
  run = subprocess.run(
    [sys.executable, "-c", program],
    capture_output=True,
    text=True,
    check=False,
    cwd=toy_policy.__file__.rsplit("/", 1)[0],
  )
  assert run.returncode == 0, run.stderr
  assert float(run.stdout) < 1e-6
