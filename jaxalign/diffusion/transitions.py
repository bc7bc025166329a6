"""One reverse step as a Gaussian: transition(x_t, prediction, step) -> (mean, std) of x_s.

Every function takes x_t and prediction `[B, *D]` and a `step` (a row of a `StepTable`) whose fields
are scalars or `[B]`, and returns a mean `[B, *D]` and a std that broadcasts against it. The std
depends on the schedule alone, never on the network. Everything is float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.checks import check_call, closest, kinds, load_function, shown
from jaxalign.diffusion import predictions, schedulers
from jaxalign.diffusion.schedules import StepTable
from jaxalign.types import Array, expand_to

Moments = tuple[Array, Array]  # mean [B, *D], std broadcastable to it


def ddim(
  x_t: Array,
  prediction: Array,
  step: StepTable,
  *,
  prediction_type: str,
  eta: float,
  clip_x_0: float | None = None,
) -> Moments:
  """DDIM with churn (Song et al. 2021, arXiv:2010.02502, eqs. 12 and 16).

    std  = eta sigma_s sqrt(1 - q^2),      q = alpha_t sigma_s / (alpha_s sigma_t)
    mean = alpha_s x_0 + sqrt(sigma_s^2 - std^2) eps

  `eta` in [0, 1]; 1 is the DDPM posterior. `clip_x_0` limits the predicted x_0 to
  [-clip_x_0, clip_x_0] and leaves eps alone, as diffusers does; it is for pixel models.
  """
  step = _expand(step, x_t)
  x_0, eps = _x_0_and_eps(x_t, prediction, step, prediction_type, clip_x_0)
  return _churn(x_0, eps, step, eta)


def ddpm(
  x_t: Array,
  prediction: Array,
  step: StepTable,
  *,
  prediction_type: str,
  clip_x_0: float | None = None,
) -> Moments:
  """Ancestral sampling: the posterior of x_s given x_t and x_0 (arXiv:2006.11239, eqs. 6 and 7).

  It is DDIM at eta = 1 with eps recomputed from the clipped x_0, so without clipping the two agree.
  """
  step = _expand(step, x_t)
  x_0, _ = _x_0_and_eps(x_t, prediction, step, prediction_type, clip_x_0)
  return _churn(x_0, (x_t - step.alpha_t * x_0) / step.sigma_t, step, 1.0)


def euler(x_t: Array, prediction: Array, step: StepTable, *, prediction_type: str) -> Moments:
  """The ODE of rectified flow: mean = x_t + (sigma_s - sigma_t) velocity, std = 0."""
  return dance_sde(x_t, prediction, step, prediction_type=prediction_type, eta=0.0)


def flow_sde(
  x_t: Array, prediction: Array, step: StepTable, *, prediction_type: str, noise_level: float
) -> Moments:
  """Flow-GRPO's SDE, g = noise_level sqrt(sigma_t / (1 - sigma_t)) (arXiv:2505.05470).

  Where sigma_t = 1 the denominator takes sigma_s, the next value of the grid, as in the official
  code.
  """
  step = _expand(step, x_t)
  remaining = 1.0 - jnp.where(step.sigma_t == 1.0, step.sigma_s, step.sigma_t)
  g = noise_level * step.noise_scale * jnp.sqrt(step.sigma_t / remaining)
  return _reverse_sde(x_t, prediction, step, prediction_type, g)


def dance_sde(
  x_t: Array, prediction: Array, step: StepTable, *, prediction_type: str, eta: float
) -> Moments:
  """DanceGRPO's SDE, g = eta at every step (arXiv:2505.07818)."""
  step = _expand(step, x_t)
  return _reverse_sde(x_t, prediction, step, prediction_type, eta * step.noise_scale)


def cps(
  x_t: Array, prediction: Array, step: StepTable, *, prediction_type: str, noise_level: float
) -> Moments:
  """Coefficient-preserving sampling (arXiv:2509.05952).

    std  = sigma_s sin(noise_level pi / 2)
    mean = alpha_s x_0 + sigma_s cos(noise_level pi / 2) eps

  `noise_level` in [0, 1]. The total noise coefficient stays sigma_s, and std is 0 where sigma_s is.
  """
  step = _expand(step, x_t)
  x_0, eps = _x_0_and_eps(x_t, prediction, step, prediction_type, None)
  angle = noise_level * step.noise_scale * (math.pi / 2)
  mean = step.alpha_s * x_0 + step.sigma_s * jnp.cos(angle) * eps
  return mean, step.sigma_s * jnp.sin(angle)


def _expand(step: StepTable, x_t: Array) -> StepTable:
  return jax.tree.map(lambda field: expand_to(field, x_t), step)


def _x_0_and_eps(x_t, prediction, step, prediction_type, clip_x_0):
  x_0, eps = predictions.to_x_0_and_eps(
    prediction, x_t, step.alpha_t, step.sigma_t, prediction_type
  )
  return (x_0 if clip_x_0 is None else jnp.clip(x_0, -clip_x_0, clip_x_0)), eps


def _churn(x_0: Array, eps: Array, step: StepTable, eta: float | Array) -> Moments:
  # sqrt(sigma_s^2 - std^2) is written as sigma_s sqrt(1 - eta^2 + eta^2 q^2): the difference of
  # squares would be rounding noise where std is close to sigma_s, that is near zero SNR.
  eta = eta * step.noise_scale
  q = step.alpha_t * step.sigma_s / (step.alpha_s * step.sigma_t)
  std = eta * step.sigma_s * jnp.sqrt((1.0 - q) * (1.0 + q))
  kept = step.sigma_s * jnp.sqrt((1.0 - eta) * (1.0 + eta) + jnp.square(eta * q))
  return step.alpha_s * x_0 + kept * eps, std


def _reverse_sde(
  x_t: Array, prediction: Array, step: StepTable, prediction_type: str, g: Array
) -> Moments:
  """Euler-Maruyama for the reverse SDE with the marginals of the flow, at any noise g.

  mean = x_t + (velocity - g^2 score / 2) dt,      score = -(x_t + (1 - sigma_t) velocity) / sigma_t
  std  = g sqrt(-dt),                              dt = sigma_s - sigma_t < 0
  """
  velocity = predictions.to_velocity(prediction, x_t, step.alpha_t, step.sigma_t, prediction_type)
  dt = step.sigma_s - step.sigma_t
  half = g**2 / (2.0 * step.sigma_t)
  mean = x_t * (1.0 + half * dt) + velocity * (1.0 + half * (1.0 - step.sigma_t)) * dt
  return mean, g * jnp.sqrt(-dt)


class Process(NamedTuple):
  """A step table and the transition that goes with it; what rollouts and losses share."""

  table: StepTable
  transition: Callable[[Array, Array, StepTable], Moments]

  def noisy_steps(self) -> list[int]:
    """The steps with noise, in order: the others have no density, and so no KL to a reference."""
    x = np.zeros((self.table.num_steps, 1), np.float32)
    _, std = self.transition(x, x, self.table)
    return np.flatnonzero(np.asarray(std) > 0).tolist()

  def stochastic_steps(self) -> list[int]:
    """`noisy_steps`, which alone train a policy gradient; ValueError if there are none."""
    steps = self.noisy_steps()
    if not steps:
      raise ValueError(
        "config.process: every step is deterministic, so a policy gradient has nothing to train\n"
        "raise eta, or noise_level, above 0"
      )
    return steps


class _Kind(NamedTuple):
  transition: Callable[..., Moments]
  knob: str | None  # its noise hyper-parameter
  knob_max: float
  needs_flow: bool


TRANSITIONS = {
  "ddim": _Kind(ddim, "eta", 1.0, False),
  "ddpm": _Kind(ddpm, None, 0.0, False),
  "euler": _Kind(euler, None, 0.0, True),
  "flow_sde": _Kind(flow_sde, "noise_level", math.inf, True),
  "dance_sde": _Kind(dance_sde, "eta", math.inf, True),
  "cps": _Kind(cps, "noise_level", 1.0, False),
}


def make_process(
  scheduler_config: Mapping[str, Any],
  *,
  num_steps: int,
  transition: str = "ddim",
  image_seq_len: int | None = None,
  even: bool = False,
  mu: Callable[[int, int], float] | None = None,
  **knobs: Any,
) -> Process:
  """The process of a diffusers scheduler_config.json, sampled in `num_steps` steps.

  `knobs` is the one noise hyper-parameter of the transition: `eta` for ddim and dance_sde,
  `noise_level` for flow_sde and cps, none for ddpm and euler. `image_seq_len`, `even` and `mu` are
  as in `schedulers.from_config`. The prediction type and the clipping of x_0 come from the config;
  a transition of one's own, see `bind`, clips for itself.
  """
  kind = find_kind(transition, knobs)
  if kind.needs_flow and not schedulers.is_flow(scheduler_config):
    raise ValueError(
      f"transition {transition!r}: expected a FlowMatchEulerDiscreteScheduler; got "
      f"{scheduler_config['_class_name']}; use ddim, ddpm or cps"
    )
  table = schedulers.from_config(
    scheduler_config, num_steps, image_seq_len=image_seq_len, even=even, mu=mu
  )
  prediction_type = schedulers.network_prediction_type(scheduler_config)
  if transition in ("ddim", "ddpm") and schedulers.clips(scheduler_config):
    clip_x_0 = scheduler_config.get("clip_sample_range", 1.0)
    return bind(table, transition, prediction_type, clip_x_0=clip_x_0, **knobs)
  return bind(table, transition, prediction_type, **knobs)


def bind(
  table: StepTable,
  transition: str,
  prediction_type: str,
  *,
  clip_x_0: float | None = None,
  **knobs: Any,
) -> Process:
  """The process of a step table: what every family ends in once its steps are known.

  Args:
    table: the steps.
    transition: a name of `TRANSITIONS`; or "package.module:function", a user's own
      `(x_t, prediction, row, *, prediction_type, **knobs) -> (mean, std)`, std `[B, 1, ...]`.
    prediction_type: what the network predicts, as `predictions` names it.
    clip_x_0: limits the predicted x_0, in ddim and ddpm only.
    **knobs: the one noise hyper-parameter of the transition, as in `make_process`; of a user's own
      whatever it takes.

  Raises:
    ValueError: an unknown transition, another knob than it has or one out of range, a transition of
      rectified flow on another schedule, a prediction of noise where there is nothing else, or a
      user's own that returns what the rest of the package cannot rely on.
  """
  kind = find_kind(transition, knobs)
  if kind.needs_flow and not np.allclose(np.add(table.alpha_t, table.sigma_t), 1.0, atol=1e-5):
    raise ValueError(
      f"transition {transition!r}: expected the schedule of a rectified flow (alpha = 1 - sigma); "
      "got another; use ddim, ddpm or cps"
    )
  if prediction_type == "eps" and (table.alpha_t == 0).any():
    raise ValueError(
      "prediction_type: expected v_prediction or sample, because the first step has zero SNR "
      "(rescale_betas_zero_snr); got epsilon, which says nothing about x_0 there"
    )
  if clip_x_0 is not None:
    knobs = {"clip_x_0": clip_x_0, **knobs}
  bound = functools.partial(kind.transition, prediction_type=prediction_type, **knobs)
  process = Process(table, bound)
  if ":" in transition:
    _check_own(f"config.process.transition {transition!r}", process)
  return process


def _check_own(what: str, process: Process) -> None:
  """Raises ValueError unless a user's transition keeps what everything else relies on."""
  # At least two rows, so that a field [B] that meets x [B, 1] shows as [B, B].
  rows = np.arange(max(2, process.table.num_steps)) % process.table.num_steps
  row = process.table[rows]
  ones = np.ones((len(rows), 1), np.float32)
  found = process.transition(ones, ones, row)
  if not isinstance(found, tuple) or len(found) != 2:
    raise ValueError(f"{what}: expected it to return (mean, std), got {type(found).__name__}")
  mean, std = map(np.asarray, found)
  if mean.shape != ones.shape or std.shape != ones.shape:
    raise ValueError(
      f"{what}: expected mean and std {ones.shape} of x_t {ones.shape}, got {mean.shape} and "
      f"{std.shape}\na field of the row is {rows.shape}: use jaxalign.types.expand_to(field, x_t)"
    )
  if not (np.isfinite(std) & (std >= 0)).all():
    raise ValueError(f"{what}: expected finite std of at least 0, got {std[:, 0].tolist()}")
  # Policy and reference share a std: ratios and KLs are those of two means.
  if not np.array_equal(std, process.transition(-ones, 2.0 * ones, row)[1]):
    raise ValueError(
      f"{what}: expected a std that depends on the row alone, got another one for another x_t and "
      "prediction"
    )
  # Windows of noise, and what samples without noise, set it to 0.
  silent = dataclasses.replace(row, noise_scale=np.zeros_like(row.noise_scale))
  if np.any(process.transition(ones, ones, silent)[1]):
    raise ValueError(
      f"{what}: expected std 0 where row.noise_scale is 0, got more\n"
      "multiply what the noise depends on by row.noise_scale"
    )


def find_kind(transition: str, knobs: Mapping[str, Any]) -> _Kind:
  """What there is to know of a transition; ValueError for a name or for knobs that it has not."""
  if ":" in transition:
    what = "config.process.transition"
    function = load_function(what, transition)
    given = {"prediction_type": "", **knobs}
    check_call(f"{what} {transition!r}", function, "x_t", "prediction", "row", **given)
    return _Kind(function, None, 0.0, False)
  if transition not in TRANSITIONS:
    raise ValueError(
      f"transition: expected one of {', '.join(TRANSITIONS)}, or your own function as "
      f'"package.module:function"; got {transition!r}{closest(transition, TRANSITIONS)}'
    )
  kind = TRANSITIONS[transition]
  _check_knobs(transition, kind, knobs)
  return kind


def _check_knobs(transition: str, kind: _Kind, knobs: Mapping[str, Any]) -> None:
  expected = {kind.knob} if kind.knob else set()
  if set(knobs) != expected:
    raise ValueError(
      f"transition {transition!r}: expected {kind.knob or 'no noise argument'}; "
      f"got {', '.join(knobs) or 'none'}"
    )
  for name, value in knobs.items():
    if not kinds.fits(value, float) or not 0.0 <= value <= kind.knob_max:
      expected = f"expected 0 to {kind.knob_max}; got {shown(value)}"
      raise ValueError(f"{name} of {transition!r}: {expected}")
