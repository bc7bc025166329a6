"""The optimizer against Adam's recurrence written out in numpy, and its schedules by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxalign.training import optim

PLAIN = dict(learning_rate=0.1, max_grad_norm=1e9, weight_decay=0.0, b1=0.9, b2=0.99, epsilon=1e-8)
PARAMS = {"a": jnp.array([1.0, -2.0]), "b": {"c": jnp.array([[0.5]])}}
GRADS = {"a": jnp.array([3.0, 0.0]), "b": {"c": jnp.array([[4.0]])}}  # global norm 5


def run(grads_per_step, **changes):
  """Parameters after one step for each of `grads_per_step`."""
  tx = optim.make(**{**PLAIN, **changes})

  @jax.jit
  def step(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params, state = PARAMS, tx.init(PARAMS)
  for grads in grads_per_step:
    params, state = step(params, state, grads)
  return params


def adamw(grads_per_step, rates, decay=0.0):
  """Loshchilov and Hutter 2019, algorithm 2, on the leaf "a" and the leaf "c" as one vector."""
  x, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
  for n, (g, rate) in enumerate(zip(grads_per_step, rates, strict=True), 1):
    m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
    m_hat, v_hat = m / (1 - 0.9**n), v / (1 - 0.99**n)
    x = x - rate * (m_hat / (np.sqrt(v_hat) + 1e-8) + decay * x)
  return x


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def tree_of(g):
  return {"a": jnp.array(g[:2]), "b": {"c": jnp.array(g[2:]).reshape(1, 1)}}


SERIES = [np.array([0.3, -0.1, 0.2]), np.array([0.1, 0.4, -0.3]), np.array([-0.5, 0.2, 0.1])]


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_three_steps_of_adamw(decay):
  actual = run([tree_of(g) for g in SERIES], weight_decay=decay)
  np.testing.assert_allclose(flat(actual), adamw(SERIES, [0.1] * 3, decay), rtol=1e-5)


def test_weight_decay_is_times_the_learning_rate_and_apart_from_the_gradient():
  zeros = jax.tree.map(jnp.zeros_like, PARAMS)
  actual = run([zeros], weight_decay=0.5)
  np.testing.assert_allclose(flat(actual), flat(PARAMS) * (1 - 0.1 * 0.5), rtol=1e-6)


def test_the_gradient_is_clipped_by_its_global_norm():
  # The second gradient counts as it is, the first as 1 / 5 of itself: Adam's memory shows it.
  small = np.array([0.1, 0.2, 0.3])
  actual = run([GRADS, tree_of(small)], max_grad_norm=1.0)
  clipped = adamw([np.array([3.0, 0.0, 4.0]) / 5, small], [0.1] * 2)
  np.testing.assert_allclose(flat(actual), clipped, rtol=1e-5)
  assert np.abs(flat(run([GRADS, tree_of(small)])) - clipped).max() > 1e-3


def test_warmup_is_linear_from_zero():
  ones = [np.ones(3)] * 4  # Adam's direction is then 1 at every step
  actual = run([tree_of(g) for g in ones], warmup_steps=2)
  np.testing.assert_allclose(flat(actual), adamw(ones, [0.0, 0.05, 0.1, 0.1]), rtol=1e-5)


def test_cosine_decay_reaches_zero_and_stays():
  ones = [np.ones(3)] * 7
  actual = run([tree_of(g) for g in ones], warmup_steps=1, decay_steps=5)
  # After the warm-up (1 + cos(pi k / 4)) / 2 of the peak at k = 0, 1, 2, 3, 4.
  rates = [0.0, *(0.05 * (1 + np.cos(np.pi * k / 4)) for k in range(5)), 0.0]
  np.testing.assert_allclose(flat(actual), adamw(ones, rates), rtol=1e-5)


def test_decay_that_ends_before_the_warmup_is_an_error():
  with pytest.raises(ValueError, match=r"config\.optim\.decay_steps: .* above 10 \(warmup_steps\)"):
    optim.make(**PLAIN, warmup_steps=10, decay_steps=10)
  assert optim.make(**PLAIN, warmup_steps=10, decay_steps=11)
