"""Conversions between what networks predict: round trips, known values, diffusers' v target."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxalign.diffusion import predictions

TYPES = ["eps", "x_0", "v", "velocity"]
B = 3
LEVELS = {
  "diffusion": (np.array([0.9, 0.6, 0.1]), np.sqrt(1 - np.array([0.9, 0.6, 0.1]) ** 2)),
  "flow": (np.array([0.9, 0.6, 0.1]), np.array([0.1, 0.4, 0.9])),
}


def draw():
  x_0, eps = np.random.default_rng(1).normal(size=(2, B, 5, 3, 2)).astype(np.float32)
  return jnp.array(x_0), jnp.array(eps)


@pytest.mark.parametrize("schedule", LEVELS)
@pytest.mark.parametrize("prediction_type", TYPES)
def test_round_trip(schedule, prediction_type):
  x_0, eps = draw()
  alpha_t, sigma_t = (jnp.float32(level) for level in LEVELS[schedule])
  x_t = alpha_t[:, None, None, None] * x_0 + sigma_t[:, None, None, None] * eps
  target = predictions.target(x_0, eps, alpha_t, sigma_t, prediction_type)
  back_x_0, back_eps = predictions.to_x_0_and_eps(target, x_t, alpha_t, sigma_t, prediction_type)
  np.testing.assert_allclose(back_x_0, x_0, atol=2e-5)
  np.testing.assert_allclose(back_eps, eps, atol=2e-5)
  velocity = predictions.to_velocity(target, x_t, alpha_t, sigma_t, prediction_type)
  np.testing.assert_allclose(velocity, eps - x_0, atol=4e-5)


def test_by_hand():
  # alpha .6, sigma .8, x_0 = 1, eps = 2: x_t = 2.2, v = 1.2 - .8 = .4, velocity = 1.
  x_0, eps = jnp.ones((1, 1)), 2 * jnp.ones((1, 1))
  targets = [
    float(predictions.target(x_0, eps, jnp.float32(0.6), jnp.float32(0.8), p)[0, 0]) for p in TYPES
  ]
  np.testing.assert_allclose(targets, [2.0, 1.0, 0.4, 1.0], rtol=1e-6)


def test_v_target_equals_diffusers():
  x_0, eps = draw()
  scheduler = diffusers.DDPMScheduler()
  t = torch.tensor([3, 500, 990])
  theirs = scheduler.get_velocity(torch.tensor(np.array(x_0)), torch.tensor(np.array(eps)), t)
  abar = scheduler.alphas_cumprod.numpy()[t]
  ours = predictions.target(x_0, eps, jnp.array(abar**0.5), jnp.array((1 - abar) ** 0.5), "v")
  np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-6)


@pytest.mark.parametrize("prediction_type", TYPES)
def test_zero_snr_is_finite_with_finite_gradients(prediction_type):
  x_0, eps = draw()
  zero, one = jnp.float32(0), jnp.float32(1)

  def total(prediction):
    return sum(
      jnp.sum(a) for a in predictions.to_x_0_and_eps(prediction, eps, zero, one, prediction_type)
    )

  target = predictions.target(x_0, eps, zero, one, prediction_type)
  assert np.isfinite(total(target))
  assert np.isfinite(jax.grad(total)(target)).all()
  back_x_0, _ = predictions.to_x_0_and_eps(target, eps, zero, one, prediction_type)
  expected = jnp.zeros_like(x_0) if prediction_type == "eps" else x_0
  np.testing.assert_allclose(back_x_0, expected, atol=1e-6)


def test_unknown_name_lists_the_known_ones():
  x_0, eps = draw()
  with pytest.raises(ValueError, match=r"eps, x_0, v, velocity.*'epsilon'"):
    predictions.target(x_0, eps, jnp.ones(B), jnp.ones(B), "epsilon")
