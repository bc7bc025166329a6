"""A Gaussian with its exact denoiser as a model: the family whose right answers are known.

Mean and standard deviation of each dimension are the parameters, so that training them is training
the policy, and the optimum of KL-regularised alignment with a quadratic reward is in the family
(`worlds.gaussian.tilt`).
"""

import functools
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, files
from jaxalign.diffusion import schedules, transitions
from jaxalign.modalities.points import POINTS
from jaxalign.models.model import Model, ModelFiles
from jaxalign.models.weights import hub, safetensors_io
from jaxalign.types import Array, Params, Record

CLASS_NAME = "GaussianPipeline"
PREDICTION = {"log_snr": "x_0", "flow": "velocity"}  # what the denoiser predicts, by schedule
NUM_LEVELS = 1000  # noise levels that losses draw from


def open_model(
  path: str | os.PathLike = "gaussian",
  *,
  schedule: str | None = None,
  mean: Sequence[float] | None = None,
  std: Sequence[float] | None = None,
  shapes_only: bool = False,
) -> Model:
  """A Gaussian in D dimensions, independent of its records; samples are points `[D]`.

  Args:
    path: "gaussian", or a folder that the model's `files.save` wrote.
    schedule: "log_snr", the default, is variance-preserving, with steps equal in log-SNR
      (`schedules.log_snr_table`; transitions ddim, ddpm, cps); "flow" is a rectified flow
      (`schedules.flow_table`; every transition).
    mean, std: of each dimension; by default (0.5, -0.3) and (1.0, 0.7).
    shapes_only: parameters are shapes.

  Raises:
    ValueError: an unknown schedule, a mean and std that do not fit, or any of these with a folder,
      which has its own.
  """
  given = {"schedule": schedule, "mean": mean, "std": std}
  if os.fspath(path) == "gaussian":
    chosen = "log_snr" if schedule is None else schedule
    params = _params((0.5, -0.3) if mean is None else mean, (1.0, 0.7) if std is None else std)
  else:
    own = [name for name, value in given.items() if value is not None]
    if own:
      raise ValueError(f"{path}: expected no {own[0]}, which a folder has of its own; leave it out")
    chosen, params = _read(hub.find_model(path))
  checks.check_choice("schedule", chosen, PREDICTION)
  if shapes_only:
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  return _make(chosen, params)


def _params(mean: Sequence[float], std: Sequence[float]) -> Params:
  means, stds = np.asarray(mean, np.float32), np.asarray(std, np.float32)
  if means.ndim != 1 or not means.size or means.shape != stds.shape or not (stds > 0).all():
    raise ValueError(
      "mean and std: expected one number of each for every dimension, with std positive; got "
      f"{mean} and {std}"
    )
  return {"mean": means, "log_std": np.log(stds)}


def _make(schedule: str, params: Params) -> Model:
  shape = tuple(params["mean"].shape)
  return Model(
    params={"denoiser": params},
    tokenize=lambda records: np.zeros((len(records), 1), np.float32),
    empty=None,
    condition=lambda params, tokens: jnp.asarray(tokens),
    denoise=make_denoise_fn(schedule),
    encode=lambda params, samples, key: jnp.asarray(samples),
    decode=lambda params, x_0: x_0,
    describe=_describe,
    latent_shape=shape,
    sample_shape=shape,
    prediction_type=PREDICTION[schedule],
    levels=make_table(schedule, NUM_LEVELS)[::-1],
    make_process=functools.partial(_make_process, schedule),
    modality=POINTS,
    files=ModelFiles(functools.partial(_save, schedule), {}),
  )


def _describe(record: Record) -> str:
  return ", ".join(f"{name} {value}" for name, value in record.items())


def make_table(schedule: str, num_steps: int) -> schedules.StepTable:
  """The `num_steps` steps of a schedule, from noise to data."""
  checks.check_choice("schedule", schedule, PREDICTION)
  if schedule == "log_snr":
    return schedules.log_snr_table(num_steps)
  return schedules.uniform_flow_table(num_steps)


def levels_at(schedule: str, t: Array) -> tuple[Array, Array]:
  """alpha_t and sigma_t at the times of a schedule, `[B]` each."""
  if schedule == "log_snr":
    return schedules.log_snr_levels(t)
  return 1.0 - t / 1000.0, t / 1000.0


def _make_process(
  schedule: str, *, num_steps: int, transition: str, **knobs: float
) -> transitions.Process:
  return transitions.bind(
    make_table(schedule, num_steps), transition, PREDICTION[schedule], **knobs
  )


def make_denoise_fn(schedule: str) -> Callable[[Params, Array, Array, Any], jax.Array]:
  """The exact denoiser, dimension by dimension: `(variables, x_t [B, D], t [B], cond) -> [B, D]`.

    E[x_0 | x_t] = mean + g (x_t - alpha mean),      g = alpha std^2 / (alpha^2 std^2 + sigma^2)

  It predicts x_0 on "log_snr" and the velocity E[eps - x_0 | x_t] on "flow".
  """
  checks.check_choice("schedule", schedule, PREDICTION)

  def denoise(variables: Params, x_t: Array, t: Array, cond: Any) -> jax.Array:
    del cond
    mean, log_std = variables["params"]["mean"], variables["params"]["log_std"]
    alpha, sigma = (level[:, None] for level in levels_at(schedule, t))
    variance = jnp.exp(2.0 * log_std)
    offset = (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
    x_0 = mean + alpha * variance * offset
    # E[eps | x_t] = sigma offset: no division by a sigma that may be small.
    return x_0 if schedule == "log_snr" else sigma * offset - x_0

  return denoise


def _save(schedule: str, params: Mapping[str, Params], folder: str | os.PathLike) -> None:
  if "denoiser" not in params:
    raise ValueError(f"expected params of the denoiser, found {sorted(params) or 'none'}")
  folder = pathlib.Path(folder)
  config = {"schedule": schedule, "dim": int(np.size(params["denoiser"]["mean"]))}
  safetensors_io.write_component(folder / "denoiser", params["denoiser"], config)
  files.write_json(folder / "model_index.json", {"_class_name": CLASS_NAME})


def _read(folder: pathlib.Path) -> tuple[str, Params]:
  """The schedule and the parameters of a folder."""
  config = files.read_json(folder / "denoiser" / "config.json")
  if not isinstance(config.get("dim"), int) or "schedule" not in config:
    raise ValueError(
      f"{folder / 'denoiser' / 'config.json'}: expected schedule and dim, found {sorted(config)}"
    )
  shape = jax.ShapeDtypeStruct((config["dim"],), np.float32)
  expected = {"mean": shape, "log_std": shape}
  return config["schedule"], safetensors_io.open_component(folder / "denoiser", expected)
