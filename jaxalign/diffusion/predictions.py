"""What a network predicts: one table of conversions between eps, x_0, v and velocity.

With x_t = alpha_t x_0 + sigma_t eps,

  v        = alpha_t eps - sigma_t x_0      (Salimans and Ho 2022, arXiv:2202.00512, appendix D)
  velocity = eps - x_0                      (Liu et al. 2022, arXiv:2209.03003, eq. 1)

`v` and `velocity` are different things. Nothing here assumes alpha_t^2 + sigma_t^2 = 1 or
alpha_t + sigma_t = 1, so every conversion holds on diffusion and on rectified-flow schedules.
"""

import jax.numpy as jnp

from jaxalign.types import Array, expand_to

# The values of `prediction_type` in a diffusers scheduler_config.json.
FROM_DIFFUSERS = {
  "epsilon": "eps",
  "sample": "x_0",
  "v_prediction": "v",
  "flow_prediction": "velocity",
}


def _from_eps(eps, x_t, alpha_t, sigma_t):
  # At zero terminal SNR (alpha_t = 0) the noise says nothing about x_0, and 0 is the value that
  # keeps x_t = alpha_t x_0 + sigma_t eps. The inner `where` keeps the gradient finite as well.
  signal = alpha_t > 0
  x_0 = (x_t - sigma_t * eps) / jnp.where(signal, alpha_t, 1.0)
  return jnp.where(signal, x_0, 0.0), eps


def _from_x_0(x_0, x_t, alpha_t, sigma_t):
  return x_0, (x_t - alpha_t * x_0) / sigma_t


def _from_v(v, x_t, alpha_t, sigma_t):
  square = alpha_t**2 + sigma_t**2
  return (alpha_t * x_t - sigma_t * v) / square, (sigma_t * x_t + alpha_t * v) / square


def _from_velocity(velocity, x_t, alpha_t, sigma_t):
  total = alpha_t + sigma_t
  return (x_t - sigma_t * velocity) / total, (x_t + alpha_t * velocity) / total


_TO_X_0_AND_EPS = {
  "eps": _from_eps,
  "x_0": _from_x_0,
  "v": _from_v,
  "velocity": _from_velocity,
}

_TARGET = {
  "eps": lambda x_0, eps, alpha_t, sigma_t: eps,
  "x_0": lambda x_0, eps, alpha_t, sigma_t: x_0,
  "v": lambda x_0, eps, alpha_t, sigma_t: alpha_t * eps - sigma_t * x_0,
  "velocity": lambda x_0, eps, alpha_t, sigma_t: eps - x_0,
}


def _lookup(table, prediction_type):
  if prediction_type not in table:
    raise ValueError(
      f"prediction_type: expected one of {', '.join(table)}; got {prediction_type!r}"
    )
  return table[prediction_type]


def to_x_0_and_eps(
  prediction: Array,  # [B, *D]
  x_t: Array,  # [B, *D]
  alpha_t: Array,  # scalar or [B]
  sigma_t: Array,  # scalar or [B], > 0
  prediction_type: str,
) -> tuple[Array, Array]:  # [B, *D], [B, *D]
  """The clean sample and the noise that a prediction stands for.

  Both satisfy x_t = alpha_t x_0 + sigma_t eps. Where alpha_t = 0, a prediction of `eps` leaves x_0
  undetermined and x_0 = 0 is returned.
  """
  convert = _lookup(_TO_X_0_AND_EPS, prediction_type)
  return convert(prediction, x_t, expand_to(alpha_t, x_t), expand_to(sigma_t, x_t))


def to_velocity(
  prediction: Array, x_t: Array, alpha_t: Array, sigma_t: Array, prediction_type: str
) -> Array:  # [B, *D]
  """velocity = eps - x_0; shapes as in `to_x_0_and_eps`."""
  if prediction_type == "velocity":
    return prediction  # the round trip through x_0 and eps would cost a float32 digit
  x_0, eps = to_x_0_and_eps(prediction, x_t, alpha_t, sigma_t, prediction_type)
  return eps - x_0


def target(
  x_0: Array,  # [B, *D]
  eps: Array,  # [B, *D]
  alpha_t: Array,  # scalar or [B]
  sigma_t: Array,  # scalar or [B]
  prediction_type: str,
) -> Array:  # [B, *D]
  """What the network should predict at x_t = alpha_t x_0 + sigma_t eps."""
  make = _lookup(_TARGET, prediction_type)
  return make(x_0, eps, expand_to(alpha_t, x_0), expand_to(sigma_t, x_0))
