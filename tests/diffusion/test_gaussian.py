"""Elementwise Gaussians against torch.distributions and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jaxalign.diffusion import gaussian


def draw(seed=0):
  x, mean_1, mean_2 = np.random.default_rng(seed).normal(size=(3, 2, 3, 5, 1)).astype(np.float32)
  std = np.array([0.3, 2.0], np.float32).reshape(2, 1, 1, 1)
  return x, mean_1, mean_2, std


def test_log_prob_equals_torch():
  x, mean, _, std = draw()
  theirs = torch.distributions.Normal(torch.tensor(mean), torch.tensor(std)).log_prob(
    torch.tensor(x)
  )
  ours = gaussian.log_prob(jnp.array(x), jnp.array(mean), jnp.array(std))
  assert ours.shape == x.shape
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_log_prob_by_hand():
  # One std away from the mean with std 2: -1/2 - log 2 - log(2 pi) / 2.
  value = gaussian.log_prob(jnp.array([3.0]), jnp.array([1.0]), jnp.array(2.0))
  np.testing.assert_allclose(value, [-0.5 - 0.69314718 - 0.91893853], rtol=1e-6)


def test_kl_equals_torch_and_is_zero_on_itself():
  _, mean_1, mean_2, std = draw()
  # In float64, because torch's formula cancels where the means are close.
  std_64 = torch.tensor(std).double()
  normals = [
    torch.distributions.Normal(torch.tensor(mean).double(), std_64) for mean in (mean_1, mean_2)
  ]
  theirs = torch.distributions.kl_divergence(*normals).numpy()
  ours = gaussian.kl(jnp.array(mean_1), jnp.array(mean_2), jnp.array(std))
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  assert not gaussian.kl(jnp.array(mean_1), jnp.array(mean_1), jnp.array(std)).any()


def test_sample_moments_and_reparameterisation():
  mean, std = jnp.array([[1.0], [-2.0]]), jnp.array([[0.5], [3.0]])
  key = jax.random.key(3)
  x = jax.vmap(lambda k: gaussian.sample(k, mean, std))(jax.random.split(key, 20_000))
  np.testing.assert_allclose(x.mean(0), mean, atol=4 * 3 / 20_000**0.5)
  np.testing.assert_allclose(x.std(0), std, rtol=0.02)
  gradient = jax.grad(lambda m: gaussian.sample(key, m, std).sum())(mean)
  np.testing.assert_array_equal(gradient, jnp.ones_like(mean))


def test_computed_in_float32():
  half = jnp.ones((2, 2), jnp.bfloat16)
  std = jnp.float32(0.1)
  assert gaussian.sample(jax.random.key(0), half, std).dtype == jnp.float32
  assert gaussian.log_prob(half, half, std).dtype == jnp.float32
  assert gaussian.kl(half, half, std).dtype == jnp.float32
