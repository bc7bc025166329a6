"""A flow model of plans, told start and goal: the family without text, images or an autoencoder."""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import files, streams
from jaxalign.diffusion import schedules, transitions
from jaxalign.modalities import trajectory
from jaxalign.models.families import compute
from jaxalign.models.model import Model, ModelFiles
from jaxalign.models.networks import temporal
from jaxalign.models.weights import hub, safetensors_io
from jaxalign.types import Array, DenoiseFn, Params, Record, at_least_float32
from jaxalign.worlds import planner

CLASS_NAME = "PlannerPipeline"
PREDICTION = "velocity"
NUM_LEVELS = 1000  # noise levels that it was trained on
Tokens = dict[str, np.ndarray]


def open_model(
  path: str | os.PathLike = "planner",
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
  shapes_only: bool = False,
) -> Model:
  """Opens a model of plans `[H, 2]`, whose parameters are lazy until they are placed.

  Args:
    path: "planner" (the embedded model), or a folder with its layout: `model_index.json`,
      `denoiser/config.json` (the fields of `temporal.TemporalConfig`) and safetensors beside it.
    dtype: what the network computes in, "float32" or "bfloat16"; plans are float32 always.
    param_dtype: what frozen weights are stored in on devices; bfloat16 only if `dtype` is too.
    shapes_only: parameters are shapes, by the config; weights are not read.

  Raises:
    ValueError: no such folder, a size that is missing, weights that do not fit, or another dtype.
  """
  compute.check(dtype=dtype, param_dtype=param_dtype)
  folder = hub.find_model(path, weights=not shapes_only)
  config = temporal.TemporalConfig.from_dict(files.read_json(folder / "denoiser" / "config.json"))
  params = param_shapes(config)
  if not shapes_only:
    params = safetensors_io.open_component(folder / "denoiser", params)
  return build(config, params, dtype=dtype, param_dtype=param_dtype)


def build(
  config: temporal.TemporalConfig,
  params: Params,
  *,
  dtype: str = "float32",
  param_dtype: str = "float32",
) -> Model:
  """The model of a network's sizes and the parameters of its denoiser, see `open_model`."""
  shape = (config.horizon, config.dim)

  return Model(
    params={"denoiser": params},
    tokenize=tokenize,
    empty={name: np.zeros((1, width), np.float32) for name, width in _WIDTHS.items()},
    condition=lambda params, tokens: {name: jnp.asarray(tokens[name]) for name in _WIDTHS},
    denoise=make_denoise_fn(config, compute.narrow(dtype)),
    encode=lambda params, samples, key: jnp.asarray(samples),
    decode=lambda params, x_0: x_0,
    describe=describe,
    latent_shape=shape,
    sample_shape=shape,
    prediction_type=PREDICTION,
    levels=schedules.uniform_flow_table(NUM_LEVELS)[::-1],
    make_process=make_process,
    modality=trajectory.make(planner.OBSTACLES),
    files=ModelFiles(functools.partial(save, config), {}),
    dtype=compute.narrow(dtype),
    exact=None if dtype == "float32" else make_denoise_fn(config, None),
    stored_dtypes=functools.partial(compute.stored_dtypes, param_dtype=param_dtype),
  )


# What the network is told: start, goal, and whether they are given (1) or masked with zeros (0).
_WIDTHS = {"start": 2, "goal": 2, "given": 1}


def tokenize(records: Sequence[Record]) -> Tokens:
  """Start and goal of each record `[B, 2]`, and ones `[B, 1]` that say they are given; float32.

  Raises ValueError, naming the record and the field, unless both are two numbers in [-1, 1].
  """
  start, goal = planner.read_records(records)
  return {"start": start, "goal": goal, "given": np.ones((len(start), 1), np.float32)}


def describe(record: Record) -> str:
  """Where a plan starts and ends, for the caption of a picture."""
  start, goal = (", ".join(f"{x:.2f}" for x in record[name]) for name in ("start", "goal"))
  return f"({start}) to ({goal})"


def make_process(*, num_steps: int, transition: str, **knobs: Any) -> transitions.Process:
  """`num_steps` steps of equal size on the rectified flow, with any transition."""
  table = schedules.uniform_flow_table(num_steps)
  return transitions.bind(table, transition, PREDICTION, **knobs)


def make_denoise_fn(config: temporal.TemporalConfig, dtype: str | None) -> DenoiseFn:
  """`(variables, x_t [B, H, 2], t [B], cond) -> velocity [B, H, 2]`, float32; pure."""
  network = temporal.TemporalMixer(config)

  def denoise(variables: Params, x_t: Array, t: Array, cond: Mapping[str, Array]) -> jax.Array:
    told = jnp.concatenate([jnp.asarray(cond[name]) for name in _WIDTHS], axis=-1)
    prediction: Any = network.apply(variables, jnp.asarray(x_t, dtype), t, told)
    return at_least_float32(prediction)

  return denoise


def param_shapes(config: temporal.TemporalConfig) -> Params:
  """The parameter tree of the denoiser with shapes in place of arrays."""
  x_t = jnp.zeros((1, config.horizon, config.dim))
  cond = jnp.zeros((1, sum(_WIDTHS.values())))
  network = temporal.TemporalMixer(config)
  return jax.eval_shape(network.init, streams.key_shape(), x_t, jnp.zeros(1), cond)["params"]


def save(
  config: temporal.TemporalConfig, params: Mapping[str, Params], folder: str | os.PathLike
) -> None:
  """Writes the folder that `open_model` reads; ValueError without params of the denoiser."""
  folder = pathlib.Path(folder)
  if "denoiser" not in params:
    raise ValueError(f"expected params of the denoiser, found {sorted(params) or 'none'}")
  sizes = {name: getattr(config, name) for name in config.__dataclass_fields__}
  safetensors_io.write_component(folder / "denoiser", params["denoiser"], sizes)
  files.write_json(folder / "model_index.json", {"_class_name": CLASS_NAME})
