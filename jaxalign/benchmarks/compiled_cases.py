"""The cases of `compiled`: a method's update or rollout on shapes, compiled and read."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import system
from jaxalign.aot import reading, topology
from jaxalign.benchmarks import gpu, measure, models, workload
from jaxalign.distributed import sharding
from jaxalign.methods import Finished, Inputs, Rollouts, Stored
from jaxalign.models.adapters import lora
from jaxalign.models.families import stable_diffusion
from jaxalign.models.networks import clip_vision
from jaxalign.rewards import DeviceReward
from jaxalign.training import least_work
from jaxalign.training.batching import Selection
from jaxalign.training.feeds import base, online


class Case(NamedTuple):
  """A program: of a model (`models.CONFIGS`) and a method (`METHODS`).

  full: whether all weights are trained.
  """

  model: str
  method: str
  program: str
  full: bool


# The config, and what is set in it.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
  "ddpo": ("ddpo_sd15", {}),
  "dpo": ("dpo_sd15", {}),
  "draft": ("draft_sd15", {"method.num_grad_steps": 1}),
  "refl": (
    "draft_sd15", {"method": {"name": "refl", "step_range": (0.75, 1.0), "target": 2.0}}
  ),
}  # fmt: skip
BATCHES = {"sd15": 8, "sdxl": 2, "small": 8, "18m": 8}
HELD = 8  # microbatches of trajectories that an iteration holds in memory


def _cases() -> dict[str, Case]:
  found = {}
  for model in BATCHES:
    found[f"{model}-ddpo-rollout"] = Case(model, "ddpo", "rollout", False)
    for method in METHODS:
      found[f"{model}-{method}-update"] = Case(model, method, "update", False)
      found[f"{model}-{method}-update-full"] = Case(model, method, "update", True)
  return found


CASES = _cases()


def run(
  case: Case,
  *,
  topology_name: str,
  fsdp: int,
  batch: int | None,
  slices: int,
  changes: Mapping[str, Any],
) -> tuple[dict[str, Any], str]:
  """Compiles a case: the result as JSON has it, and the program's text."""
  described = topology.find_devices(topology_name)
  mesh = sharding.make_mesh(data=-1, fsdp=fsdp, devices=described.devices)
  config = make_config(case, changes)
  size = (batch or BATCHES[case.model]) * mesh.size
  with topology.answering_for(described):
    work = make_work(case, config, mesh)
    function, args, least = program(case, work, size, slices)
  steps = config.process.num_steps if case.program == "rollout" else slices
  tokens = workload.tokens(work.system, 1)
  unknown = least_work.Programs(work.system, work.sections, tokens).unknown_trips()
  made = reading.compile_for(described, function, args)
  found = reading.read(made.executable, described, mesh, steps=steps, unknown_trips=unknown)
  examples = size * (1 if case.program == "rollout" else slices)
  result = {
    **case._asdict(),
    "topology": topology_name,
    "mesh": dict(mesh.shape),
    "examples": examples,
    "slices": slices,
    "changes": {key: str(value) for key, value in changes.items()},
    "seconds": {"trace": made.trace_seconds, "compile": made.compile_seconds},
    "least": least,
    "memory": described.memory,
    "environment": measure.environment(),
    **found.as_json(described),
  }
  return result, made.executable.as_text() or ""


def make_config(case: Case, changes: Mapping[str, Any]) -> Any:
  """The method's config with the settings of all cases, and the user's changes."""
  name, own = METHODS[case.method]
  config = workload.load_config(name)
  config.unlock()
  settings: dict[str, Any] = {
    "model.dtype": "bfloat16",
    "process": {"transition": "ddim", "num_steps": 50, "eta": 1.0},
    "guidance": {"scale": 5.0},
    "lora": {"rank": 4, "alpha": 4.0, "targets": lora.ATTENTION},
    **own,
  }
  if case.full:
    settings["lora"] = {"rank": 0, "alpha": 1.0, "targets": ""}
  if case.method in ("draft", "refl"):
    name = f"{__name__}:aesthetic_shapes"
    settings["reward"] = {"names": (name,), "weights": (1.0,), "kwargs": ({},)}
    settings["reward"]["normalize"] = "none"
  elif "reward" in config:
    del config["reward"]  # its own runs on the host
  for key, value in {**settings, **changes}.items():
    section, _, name = key.partition(".")
    if section not in config:
      raise ValueError(f"--set: expected a section of the config, found none called {section!r}")
    with config.ignore_type():
      if name:
        config[section][name] = value
      else:
        config[section] = value
  return config


def make_work(case: Case, config: Any, mesh: jax.sharding.Mesh) -> workload.Workload:
  """The parts of a case, of which the arrays are shapes on described devices."""
  model = stable_diffusion.as_model(shape_model(case.model, config))
  return workload.make(config, model, mesh)


def shape_model(name: str, config: Any) -> Any:
  """A model whose parameters are shapes, computing as `config.model` says."""
  model = models.build(name, random_params=False)
  known = ("dtype", "remat", "param_dtype", "vae_dtype")
  model = model.with_compute(**{key: config.model[key] for key in known if key in config.model})
  return model.with_params(model.networks.param_shapes())


def program(
  case: Case, work: workload.Workload, size: int, slices: int
) -> tuple[Any, tuple, float | None]:
  """The jitted function, its arguments as shapes, and the least operations of all devices."""
  sys = work.system
  whole = sharding.replicated(sys.mesh)
  least = least_work.Programs(sys, work.sections, workload.tokens(sys, 1))
  if case.program == "rollout":
    given = workload.rollout_args(sys, _tokens(sys, size))
    return sys.sample_fn, given, least.rollout(size)
  number = sharding.shaped(jax.ShapeDtypeStruct((slices, size), np.int32), whole)
  selection: Any = number
  query = None
  if isinstance(work.data, Rollouts):
    data: Any = _trajectories(sys, size)
    fresh = sharding.shaped(jax.ShapeDtypeStruct((slices, size), np.bool_), whole)
    selection = Selection(number, number, fresh)
  elif isinstance(work.data, Stored):
    data = _pairs(sys, size, slices)
  else:
    assert work.rewards is not None and work.rewards.device is not None
    query = work.rewards.device.encode([{"prompt": ""}])
    data = _records(sys, work.rewards.device, size, slices)
  args = (work.state, work.frozen, data, selection, 0, 0, 0)
  device = work.rewards.device if work.rewards is not None else None
  once = least.update(size, device, query)
  return work.update_fn, args, None if once is None else slices * once


def _tokens(sys: system.System, count: int) -> Any:
  return jax.eval_shape(lambda: workload.tokens(sys, count))


def _cond(sys: system.System, count: int) -> Any:
  return jax.eval_shape(sys.condition_fn, sys.frozen, _tokens(sys, count))


def _trajectories(sys: system.System, size: int) -> tuple[online.Trajectories, Any, Any, Any]:
  """Those of an iteration, the steps that they took, and their advantages."""
  sampled = jax.eval_shape(sys.sample_fn, *workload.rollout_args(sys, _tokens(sys, size)))
  collected = jax.eval_shape(online.collect, [sampled] * HELD)
  samples = jax.ShapeDtypeStruct((HELD * size,), jnp.int32)
  labels = {"advantages": jax.ShapeDtypeStruct((HELD * size,), jnp.float32)}
  placed = online.collected_shardings("step", sys.mesh), sharding.replicated(sys.mesh)
  held, (samples, labels) = sharding.shaped((collected, (samples, labels)), placed)
  return held, sys.pipeline.table, samples, labels


def _pairs(sys: system.System, size: int, slices: int) -> Finished:
  x_0: Any = jax.ShapeDtypeStruct((size, 2, *sys.model.latent_shape), jnp.float32)
  p: Any = jax.ShapeDtypeStruct((size,), jnp.float32)
  part = Finished(x_0, _cond(sys, size).cond, {"p": p})
  return _stacked(sys, part, slices)


def _records(sys: system.System, device: DeviceReward, size: int, slices: int) -> Inputs:
  cond = _cond(sys, size)
  own, query = _stacked(sys, (cond.cond, device.encode([{"prompt": ""}] * size)), slices)
  uncond = sharding.shaped(cond.uncond, sharding.replicated(sys.mesh))
  return Inputs(cond._replace(cond=own, uncond=uncond), query)


def _stacked(sys: system.System, part: Any, slices: int) -> Any:
  """So many microbatches, cut over the devices."""
  data = jax.eval_shape(base.stack, [part] * slices)
  return sharding.shaped(data, sharding.batch(sys.mesh, axis=1))


def aesthetic_shapes() -> DeviceReward:
  """A score from the image tower of CLIP-L/14, of whose parameters only the shapes are there."""
  config = clip_vision.CLIPVisionConfig(**gpu.CLIP_L_VISION)
  return gpu.score_of_tower(config, gpu.tower_shapes(config))
