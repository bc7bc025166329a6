"""Step tables: what a schedule becomes once "S steps" is decided.

Diffusion (alpha_t^2 + sigma_t^2 = 1, integer timesteps) and rectified flow (alpha_t = 1 - sigma_t)
both end in a `StepTable`, so nothing above this file asks which one it has. Grids follow the
schedulers of diffusers exactly, their rounding to float32 included.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks
from jaxalign.types import Array, expand_to


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StepTable:
  """The S reverse steps t -> s of a sampler, from noise to data; every field is float32 `[S]`.

  `table[i]` has scalar fields for an int, `[B]` fields for an int32 array `[B]`, and is a shorter
  table for a slice. x_t = alpha_t x_0 + sigma_t eps, and the same with s.
  """

  t: Array  # the time the network sees: 0..T-1 for diffusion, 1000 * sigma_t for flow
  alpha_t: Array
  sigma_t: Array
  alpha_s: Array
  sigma_s: Array
  # Multiplies the transition's eta or noise_level: 1 as configured, 0 makes the step deterministic.
  noise_scale: Array

  @property
  def num_steps(self) -> int:
    return self.t.shape[0]

  def __getitem__(self, i: int | slice | Array) -> "StepTable":
    traced = isinstance(i, jax.Array)  # numpy refuses a traced index
    return jax.tree.map(lambda field: (jnp.asarray(field) if traced else field)[i], self)


def add_noise(x_0: Array, eps: Array, alpha_t: Array, sigma_t: Array) -> Array:
  """x_t = alpha_t x_0 + sigma_t eps, for `[B, *D]` arrays and scalar or `[B]` coefficients."""
  return expand_to(alpha_t, x_0) * x_0 + expand_to(sigma_t, x_0) * eps


# Diffusion grids


def ddpm_alphas_cumprod(
  *,
  num_train_timesteps: int,
  beta_start: float,
  beta_end: float,
  beta_schedule: str,
  rescale_betas_zero_snr: bool = False,
) -> np.ndarray:
  """alpha_t^2 for t = 0..T-1, float32 `[T]`: the product of 1 - beta up to and including t.

  `linear` is Ho et al. 2020 (arXiv:2006.11239), `scaled_linear` is linear in sqrt(beta) (Rombach et
  al. 2022, arXiv:2112.10752), `squaredcos_cap_v2` is Nichol and Dhariwal 2021 (arXiv:2102.09672,
  eq. 17). Zero terminal SNR is Lin et al. 2023 (arXiv:2305.08891, algorithm 1).
  """
  T = num_train_timesteps
  if beta_schedule == "linear":
    betas: np.ndarray = np.linspace(beta_start, beta_end, T)
  elif beta_schedule == "scaled_linear":
    betas = np.linspace(math.sqrt(beta_start), math.sqrt(beta_end), T).astype(np.float32) ** 2
  elif beta_schedule == "squaredcos_cap_v2":
    level = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * np.pi / 2) ** 2
    betas = np.minimum(1 - level[1:] / level[:-1], 0.999)
  else:
    raise ValueError(
      f"beta_schedule: expected linear, scaled_linear or squaredcos_cap_v2; got "
      f"{checks.shown(beta_schedule)}"
    )
  # Rounded to float32 where diffusers rounds: at t = 0 one float32 step of alpha_t^2 is already
  # 7e-5 of 1 - alpha_t^2, which would show in every standard deviation near the data.
  alphas = 1 - betas.astype(np.float32)
  if rescale_betas_zero_snr:
    alphas = _rescale_to_zero_snr(alphas)
  return _cumprod(alphas)


def _cumprod(alphas: np.ndarray) -> np.ndarray:
  return np.cumprod(alphas, dtype=np.float64).astype(np.float32)


def _rescale_to_zero_snr(alphas: np.ndarray) -> np.ndarray:
  root = np.sqrt(_cumprod(alphas))
  root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
  alphas_cumprod = root**2
  return np.concatenate([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def _timesteps(num_steps: int, T: int, timestep_spacing: str, steps_offset: int) -> np.ndarray:
  """Decreasing integer timesteps `[S]` (Lin et al. 2023, arXiv:2305.08891, table 2)."""
  if not 1 <= num_steps <= T:
    raise ValueError(f"num_steps: expected 1 to {T} (num_train_timesteps); got {num_steps}")
  if timestep_spacing == "linspace":
    t: np.ndarray = np.linspace(0, T - 1, num_steps).round()[::-1]
  elif timestep_spacing == "leading":
    t = np.arange(num_steps)[::-1] * (T // num_steps) + steps_offset
  elif timestep_spacing == "trailing":
    t = np.round(T - np.arange(num_steps) * (T / num_steps)) - 1
  else:
    raise ValueError(
      f"timestep_spacing: expected leading, trailing or linspace; got "
      f"{checks.shown(timestep_spacing)}"
    )
  if t[0] >= T:
    raise ValueError(
      f"steps_offset={steps_offset} with {num_steps} steps asks for timestep {int(t[0])}, "
      f"but the last one is {T - 1}; use fewer steps"
    )
  return t.astype(np.int64)


def _diffusion_table(t: np.ndarray, square_t: np.ndarray, square_s: np.ndarray) -> StepTable:
  """From timesteps and alpha^2 at t and s, all `[S]`."""
  square_t, square_s = square_t.astype(np.float64), square_s.astype(np.float64)
  alpha_t, sigma_t = square_t**0.5, (1 - square_t) ** 0.5
  alpha_s, sigma_s = square_s**0.5, (1 - square_s) ** 0.5
  fields = (t, alpha_t, sigma_t, alpha_s, sigma_s, np.ones(len(t)))
  return StepTable(*(field.astype(np.float32) for field in fields))


def ddim_table(
  num_steps: int,
  *,
  num_train_timesteps: int = 1000,
  beta_start: float,
  beta_end: float,
  beta_schedule: str,
  timestep_spacing: str = "leading",
  steps_offset: int = 0,
  set_alpha_to_one: bool = True,
  rescale_betas_zero_snr: bool = False,
) -> StepTable:
  """The grid of diffusers' DDIMScheduler; arguments are the fields of its scheduler_config.json.

  Every s is t - T // S, whatever the spacing, so with `trailing` or `linspace` and an S that does
  not divide T it is not quite the next t. Below zero, alpha_s is 1, or that of timestep 0 with
  `set_alpha_to_one=False`; then the last step keeps a positive variance, which a likelihood needs.
  """
  T = num_train_timesteps
  alphas_cumprod = ddpm_alphas_cumprod(
    num_train_timesteps=T,
    beta_start=beta_start,
    beta_end=beta_end,
    beta_schedule=beta_schedule,
    rescale_betas_zero_snr=rescale_betas_zero_snr,
  )
  t = _timesteps(num_steps, T, timestep_spacing, steps_offset)
  s = t - T // num_steps
  final = 1.0 if set_alpha_to_one else alphas_cumprod[0]
  return _diffusion_table(
    t, alphas_cumprod[t], np.where(s >= 0, alphas_cumprod[np.maximum(s, 0)], final)
  )


def ddpm_table(
  num_steps: int,
  *,
  num_train_timesteps: int = 1000,
  beta_start: float,
  beta_end: float,
  beta_schedule: str,
  timestep_spacing: str = "leading",
  steps_offset: int = 0,
  rescale_betas_zero_snr: bool = False,
) -> StepTable:
  """The grid of diffusers' DDPMScheduler: s is the next t, and the last step ends at alpha_s = 1.

  The last step is therefore deterministic.
  """
  T = num_train_timesteps
  alphas_cumprod = ddpm_alphas_cumprod(
    num_train_timesteps=T,
    beta_start=beta_start,
    beta_end=beta_end,
    beta_schedule=beta_schedule,
    rescale_betas_zero_snr=rescale_betas_zero_snr,
  )
  t = _timesteps(num_steps, T, timestep_spacing, steps_offset)
  square_t = alphas_cumprod[t]
  return _diffusion_table(t, square_t, np.append(square_t[1:], 1.0))


# A grid in log-SNR

MAX_LOG_SNR = 7.0


def log_snr_table(num_steps: int) -> StepTable:
  """Steps that are equal in log-SNR, from -7 to 7, on a variance-preserving schedule.

    log-SNR = log(alpha_t^2 / sigma_t^2),      t = 1000 (7 - log-SNR) / 14

  The last step ends at sigma_s = 0 in place of log-SNR 7, and `log_snr_levels(t)` gives alpha_t and
  sigma_t back. Such a grid suits closed forms: no stretch of it is coarse (Kingma et al. 2021,
  arXiv:2107.00630, section 5.1, for what a schedule is in log-SNR).
  """
  if num_steps < 1:
    raise ValueError(f"num_steps: expected at least 1; got {num_steps}")
  log_snr = np.linspace(-MAX_LOG_SNR, MAX_LOG_SNR, num_steps + 1)
  alpha, sigma = (1.0 / np.sqrt(1.0 + np.exp(sign * log_snr)) for sign in (-1.0, 1.0))
  alpha_s, sigma_s = np.append(alpha[1:-1], 1.0), np.append(sigma[1:-1], 0.0)
  t = 1000.0 * (MAX_LOG_SNR - log_snr[:-1]) / (2.0 * MAX_LOG_SNR)
  fields = (t, alpha[:-1], sigma[:-1], alpha_s, sigma_s, np.ones(num_steps))
  return StepTable(*(field.astype(np.float32) for field in fields))


def log_snr_levels(t: Array) -> tuple[jax.Array, jax.Array]:
  """alpha_t and sigma_t at any time of `log_snr_table`, `[B]` each."""
  log_snr = MAX_LOG_SNR * (1.0 - jnp.asarray(t) / 500.0)
  return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


# Rectified-flow grids


def resolution_mu(
  image_seq_len: int,
  *,
  base_seq_len: int = 256,
  max_seq_len: int = 4096,
  base_shift: float = 0.5,
  max_shift: float = 1.15,
) -> float:
  """The shift exponent mu for an image of `image_seq_len` tokens, linear in the token count.

  Resolution-dependent shift of Esser et al. 2024 (arXiv:2403.03206, section 5.3.2) as FLUX uses it.
  """
  slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
  return base_shift + slope * (image_seq_len - base_seq_len)


def flow_table(
  num_steps: int,
  *,
  shift: float = 1.0,
  mu: float | None = None,
  time_shift_type: str = "exponential",
  shift_terminal: float | None = None,
  sigma_min: float | None = None,
  num_train_timesteps: int = 1000,
) -> StepTable:
  """The grid of diffusers' FlowMatchEulerDiscreteScheduler, ending at sigma_s = 0.

    sigma -> shift sigma / (1 + (shift - 1) sigma)      (arXiv:2403.03206, eq. 23)

  Args:
    num_steps: S.
    shift: the constant shift, used when `mu` is None.
    mu: the resolution-dependent shift (`resolution_mu`): shift = exp(mu), or shift = mu when
      `time_shift_type` is "linear".
    time_shift_type: "exponential" or "linear".
    shift_terminal: stretches the grid so that its last sigma_t is this.
    sigma_min: last sigma_t before the shift. None is the scheduler's own choice, 1 / T, already
      shifted once when the shift is constant; the FLUX pipeline asks for 1 / S.
    num_train_timesteps: T; the network sees T * sigma_t.
  """
  if num_steps < 1:
    raise ValueError(f"num_steps: expected at least 1; got {num_steps}")
  if time_shift_type not in ("exponential", "linear"):
    raise ValueError(f"time_shift_type: expected exponential or linear; got {time_shift_type!r}")
  if sigma_min is None:
    last = np.float32(1 / num_train_timesteps)
    sigma_min = float(_shift(last, shift) if mu is None else last)
  sigma = np.linspace(1.0, float(np.float32(sigma_min)), num_steps)
  if mu is not None:
    shift = math.exp(mu) if time_shift_type == "exponential" else mu
  sigma = _shift(sigma, shift)
  if shift_terminal and sigma[-1] < 1:  # of one step there is one level, and none to stretch
    sigma = 1 - (1 - sigma) * (1 - shift_terminal) / (1 - sigma[-1])
  sigma_t = sigma.astype(np.float32)
  sigma_s = np.append(sigma_t[1:], np.float32(0))
  t = sigma_t * np.float32(num_train_timesteps)
  return StepTable(t, 1 - sigma_t, sigma_t, 1 - sigma_s, sigma_s, np.ones_like(t))


def uniform_flow_table(num_steps: int) -> StepTable:
  """`flow_table` without any shift: steps of equal size from sigma_t = 1 to sigma_s = 0."""
  return flow_table(num_steps, sigma_min=1.0 / max(1, num_steps))


def _shift(sigma: Any, shift: float) -> Any:
  return shift * sigma / (1 + (shift - 1) * sigma)
