"""What a config would run, on a model in memory: the system, and its update on any data."""

import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import checks, methods, streams, system
from jaxalign.cli import command
from jaxalign.distributed import sharding
from jaxalign.models.families import stable_diffusion
from jaxalign.rewards import combine
from jaxalign.training import feeds, optim, state, update
from jaxalign.training.feeds import base

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"


class Workload(NamedTuple):
  """The parts of a run, as `train` puts them together.

  frozen: an argument of every program.
  update_fn: `(state, frozen, data, selection, seed, i, j) -> (state, metrics)`.
  """

  sections: dict[str, Any]
  system: system.System
  rewards: combine.WeightedRewards | None
  method: methods.Method
  frozen: Mapping[str, Any]
  state: state.TrainState
  update_fn: Any


def load_config(name: str, variant: str = "") -> Any:
  """What `configs/<name>.py` returns, unlocked."""
  path = CONFIGS / f"{name}.py"
  spec = importlib.util.spec_from_file_location(f"config_{name}", path)
  if spec is None or spec.loader is None or not path.is_file():
    raise ValueError(f"expected the repository's configs at {CONFIGS}, found no {path}")
  command.make_configs_importable()
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def make(
  config: Any, bundle: stable_diffusion.StableDiffusion, mesh: jax.sharding.Mesh | None = None
) -> Workload:
  """The workload of a config, on one device unless there is a mesh, which may be described only."""
  sections = config.to_dict()

  def section(name, function, **given):
    return checks.call_section(sections, name, function, **given)

  names = ("lora", "process", "guidance")
  own = {name: sections[name] for name in names}
  model = stable_diffusion.as_model(bundle)
  sys = system.from_model(model, seed=config.seed, mesh=mesh, **own)
  rewards = section("reward", combine.make_total) if "reward" in sections else None
  method = section("method", methods.make, pipeline=sys.pipeline_with(rewards))
  tx = section("optim", optim.make)
  device = rewards.device if rewards is not None else None
  frozen = dict(sys.frozen)
  if device is not None and method.data == "records":
    frozen["reward"] = sharding.place_params(device.params, sys.mesh)
  feed: Any = feeds.FEEDS[method.data]
  fresh = state.init_state(sys.policy.params, tx, None, with_ema=False, mesh=sys.mesh)
  update_fn = update.jit_update(
    method,
    tx,
    sys.policy.variables,
    feed.select,
    ema_decay=0.0,
    mesh=sys.mesh,
    state_shardings=sharding.params(fresh, sys.mesh),
    ready_fn=sys.policy.ready,
  )
  return Workload(sections, sys, rewards, method, frozen, fresh, update_fn)


def tokens(sys: system.System, count: int) -> Any:
  """The tokens of some prompts."""
  return sys.model.tokenize([{"prompt": "a red circle above a blue square"}] * count)


def rollout_args(sys: system.System, tokens: Any) -> tuple:
  """The arguments of `sample_fn` for these tokens."""
  noise = (0, streams.number("rollout"), 0, 0, None, sys.pipeline.table)
  return (sys.policy.params, sys.frozen, tokens, *noise)


def pairs(work: Workload, count: int) -> tuple[methods.Pairs, np.ndarray]:
  """Stored pairs of noise, encoded already, and the selection that takes them in one slice."""
  sys = work.system
  cond = sys.condition_fn(sys.frozen, tokens(sys, count)).cond
  key = streams.stream(0, "benchmark latents")
  x_0 = jax.random.normal(key, (count, 2, *sys.model.latent_shape))
  data = base.stack([methods.Pairs(x_0, cond, jnp.ones(count))])
  return data, np.arange(count, dtype=np.int32)[None]


def records(work: Workload, count: int) -> tuple[methods.Records, np.ndarray]:
  """Records for a reward on the device, and the selection that takes them in one slice."""
  assert work.rewards is not None and work.rewards.device is not None
  sys = work.system
  query = work.rewards.device.encode([{"prompt": "a red circle"}] * count)
  cond = sys.condition_fn(sys.frozen, tokens(sys, count))
  own, query = base.stack([(cond.cond, query)])
  data = methods.Records(cond._replace(cond=own), query)
  return data, np.arange(count, dtype=np.int32)[None]
