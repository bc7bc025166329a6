"""diffusers' scheduler_config.json: the step table, prediction type and clipping that it means."""

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign import checks
from jaxalign.diffusion import predictions, schedules
from jaxalign.diffusion.schedules import StepTable

_FLOW = "FlowMatchEulerDiscreteScheduler"
_MOST_TIMESTEPS = 10**6  # a table has a row for each

_DIFFUSION_FIELDS = {  # with the defaults diffusers gives to a missing key
  "num_train_timesteps": 1000,
  "beta_start": 0.0001,
  "beta_end": 0.02,
  "beta_schedule": "linear",
  "timestep_spacing": "leading",
  "steps_offset": 0,
  "rescale_betas_zero_snr": False,
}

_DDIM_FIELDS = {**_DIFFUSION_FIELDS, "set_alpha_to_one": True}
# Other solvers of the same process.
_SOLVERS = (
  "PNDMScheduler",
  "EulerDiscreteScheduler",
  "EulerAncestralDiscreteScheduler",
  "LMSDiscreteScheduler",
  "DEISMultistepScheduler",
  "DPMSolverMultistepScheduler",
  "DPMSolverSinglestepScheduler",
  "UniPCMultistepScheduler",
  "SASolverScheduler",
)
# Those whose own noise levels start and end elsewhere where a config does not say.
_K_SOLVERS = (
  "HeunDiscreteScheduler",
  "KDPM2DiscreteScheduler",
  "KDPM2AncestralDiscreteScheduler",
  "DPMSolverSDEScheduler",
)
_K_FIELDS = {**_DDIM_FIELDS, "beta_start": 0.00085, "beta_end": 0.012}
_ALL_SOLVERS = (*_SOLVERS, *_K_SOLVERS)

# class: (table builder, its fields and their defaults)
_DIFFUSION_CLASSES = {
  "DDIMScheduler": (schedules.ddim_table, _DDIM_FIELDS),
  "DDIMParallelScheduler": (schedules.ddim_table, _DDIM_FIELDS),
  "DDPMScheduler": (schedules.ddpm_table, _DIFFUSION_FIELDS),
  "DDPMParallelScheduler": (schedules.ddpm_table, _DIFFUSION_FIELDS),
  **dict.fromkeys(_SOLVERS, (schedules.ddim_table, _DDIM_FIELDS)),
  **dict.fromkeys(_K_SOLVERS, (schedules.ddim_table, _K_FIELDS)),
}
# These limit the predicted x_0 unless a config says otherwise; the others never do.
_CLIPPING = ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler")

_FLOW_FIELDS = {
  "shift": 1.0,
  "use_dynamic_shifting": False,
  "base_shift": 0.5,
  "max_shift": 1.15,
  "base_image_seq_len": 256,
  "max_image_seq_len": 4096,
  "time_shift_type": "exponential",
}
# The fields of a config by their kinds of values, with the defaults of DDIM and of flows.
DEFAULTS = {
  **_DDIM_FIELDS,
  **_FLOW_FIELDS,
  **{"clip_sample": True, "clip_sample_range": 1.0, "thresholding": False},
}
# What kind of value each has, with one that has no default.
KINDS = {name: type(default) for name, default in DEFAULTS.items()}
KINDS["shift_terminal"] = float | None

# Fields that would change the numbers in a way this file does not implement.
_SUPPORTED_VALUES = {
  "trained_betas": (None,),
  "thresholding": (False, None),
  "variance_type": ("fixed_small", "fixed_small_log", None),
  "use_karras_sigmas": (False, None),
  "use_exponential_sigmas": (False, None),
  "use_beta_sigmas": (False, None),
  "use_flow_sigmas": (False, None),
  "timestep_type": ("discrete",),
  "invert_sigmas": (False, None),
  "stochastic_sampling": (False, None),
}
# Of these, how a solver of the diffusion spaces its own steps; DDIM and DDPM, and DDIM in the place
# of a solver, do not look at them.
_SOLVER_SPACING = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def is_flow(scheduler_config: Mapping[str, Any]) -> bool:
  """Whether the config describes rectified flow; raises ValueError on what is not supported."""
  name = scheduler_config.get("_class_name")
  classes = (*_DIFFUSION_CLASSES, _FLOW)
  if name not in classes:
    raise ValueError(
      f"scheduler _class_name: expected one of {checks.first(classes)}; got {checks.shown(name)}"
    )
  for field, supported in _SUPPORTED_VALUES.items():
    value = scheduler_config.get(field, supported[0])
    if value not in supported and not (name in _DIFFUSION_CLASSES and field in _SOLVER_SPACING):
      raise ValueError(f"{name}.{field}: expected {supported[0]!r}; got {checks.shown(value)}")
  T = scheduler_config.get("num_train_timesteps", 1000)
  checks.check_range(f"{name}.num_train_timesteps", T, 1, _MOST_TIMESTEPS)
  if name == _FLOW:
    _check_flow(scheduler_config)
  return name == _FLOW


def _check_flow(config: Mapping[str, Any]) -> None:
  """Raises ValueError, naming the field, for levels that do not run from 1 to 0."""
  found = {name: config.get(name, default) for name, default in _FLOW_FIELDS.items()}
  checks.check_range(f"{_FLOW}.shift", found["shift"], 1e-6, 1e6)
  for name in ("base_shift", "max_shift"):
    checks.check_range(f"{_FLOW}.{name}", found[name], -100.0, 100.0)
  checks.check_choice(
    f"{_FLOW}.time_shift_type", found["time_shift_type"], ("exponential", "linear")
  )
  lengths = found["base_image_seq_len"], found["max_image_seq_len"]
  if lengths[0] == lengths[1]:
    raise ValueError(
      f"{_FLOW}: expected base_image_seq_len and max_image_seq_len to differ, found {lengths[0]}"
    )
  if config.get("shift_terminal"):
    checks.check_range(f"{_FLOW}.shift_terminal", config["shift_terminal"], 0.0, 1.0)


def from_config(
  scheduler_config: Mapping[str, Any],
  num_steps: int,
  *,
  image_seq_len: int | None = None,
  even: bool = False,
  mu: Callable[[int, int], float] | None = None,
) -> StepTable:
  """The step table of a diffusers scheduler_config.json, read as a dict.

  DDIMScheduler, DDPMScheduler and FlowMatchEulerDiscreteScheduler give their own grids. Other
  solvers of the same diffusion (PNDM, Euler, DPM-Solver, ...) have no transition with a density;
  they become what DDIMScheduler.from_config makes of them, on their own noise levels, with a
  warning, printed once. A missing key has the default of the diffusers class that is used; those of
  the noise levels are the scheduler's own.

  Pipelines of flow models give their scheduler more than a number of steps:

  Args:
    scheduler_config: as a dict.
    num_steps: S.
    image_seq_len: tokens of an image, which dynamic shifting goes by.
    even: the levels before any shift are even from 1 to 1 / S, as FLUX, Qwen-Image and Z-Image ask
      for, and not the scheduler's own.
    mu: `(image_seq_len, num_steps) -> mu` of dynamic shifting, in the place of a straight line.
  """
  if is_flow(scheduler_config):
    return _flow_from_config(scheduler_config, num_steps, image_seq_len, even, mu)
  name = scheduler_config["_class_name"]
  if name in _ALL_SOLVERS:
    spacing = scheduler_config.get("timestep_spacing", _DDIM_FIELDS["timestep_spacing"])
    # Its place is here whoever calls: Python then prints it once in a process.
    warnings.warn(
      f"scheduler config: {name} is sampled as DDIM, on the same noise schedule with "
      f"timestep_spacing={spacing!r}",
      stacklevel=1,
    )
  return _diffusion_from_config(scheduler_config, num_steps)


def _diffusion_from_config(config: Mapping[str, Any], num_steps: int) -> StepTable:
  table, fields = _DIFFUSION_CLASSES[config["_class_name"]]
  return table(num_steps, **{k: config.get(k, v) for k, v in fields.items()})


def _flow_from_config(
  config: Mapping[str, Any],
  num_steps: int,
  image_seq_len: int | None,
  even: bool,
  mu_of: Callable[[int, int], float] | None,
) -> StepTable:
  mu = None
  if config.get("use_dynamic_shifting", False):
    if image_seq_len is None:
      raise ValueError(
        f"{_FLOW}.use_dynamic_shifting: expected image_seq_len, the number of tokens of an image; "
        "got None"
      )
    straight = functools.partial(
      schedules.resolution_mu,
      base_seq_len=config.get("base_image_seq_len", 256),
      max_seq_len=config.get("max_image_seq_len", 4096),
      base_shift=config.get("base_shift", 0.5),
      max_shift=config.get("max_shift", 1.15),
    )
    mu = mu_of(image_seq_len, num_steps) if mu_of else straight(image_seq_len)
  return schedules.flow_table(
    num_steps,
    shift=config.get("shift", 1.0),
    mu=mu,
    time_shift_type=config.get("time_shift_type", "exponential"),
    shift_terminal=config.get("shift_terminal"),
    sigma_min=1.0 / num_steps if even else None,
    num_train_timesteps=config.get("num_train_timesteps", 1000),
  )


def training_table(scheduler_config: Mapping[str, Any]) -> StepTable:
  """All T noise levels a network was trained on, in increasing order: row i is the i-th level.

  For diffusion row t is timestep t. For flow the levels carry the constant shift, as in diffusers'
  training scripts; dynamic shifting belongs to sampling and is left out.
  """
  T = scheduler_config.get("num_train_timesteps", 1000)
  if is_flow(scheduler_config):
    dynamic = scheduler_config.get("use_dynamic_shifting", False)
    shift = 1.0 if dynamic else scheduler_config.get("shift", 1.0)
    return schedules.flow_table(T, shift=shift, sigma_min=1 / T, num_train_timesteps=T)[::-1]
  every = {**scheduler_config, "timestep_spacing": "leading", "steps_offset": 0}
  return _diffusion_from_config(every, T)[::-1]


def network_prediction_type(scheduler_config: Mapping[str, Any]) -> str:
  """What the network predicts, in the words of `predictions`: "eps", "x_0", "v" or "velocity"."""
  if is_flow(scheduler_config):
    return "velocity"
  name = scheduler_config.get("prediction_type", "epsilon")
  if name not in predictions.FROM_DIFFUSERS:
    names = ", ".join(predictions.FROM_DIFFUSERS)
    raise ValueError(f"prediction_type: expected one of {names}; got {checks.shown(name)}")
  return predictions.FROM_DIFFUSERS[name]


def clips(scheduler_config: Mapping[str, Any]) -> bool:
  """Whether DDIM and DDPM limit the predicted x_0, to `clip_sample_range`."""
  name = scheduler_config["_class_name"]
  return name in _CLIPPING and bool(scheduler_config.get("clip_sample", True))
