"""What a config would run, on a model in memory: the system, and its update on any data."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import methods, streams, system
from jaxalign.cli import configs
from jaxalign.models.model import Model
from jaxalign.rewards import combine
from jaxalign.training import feeds, state
from jaxalign.training import setup as setup_lib
from jaxalign.training.feeds import base


class Workload(NamedTuple):
  """The parts of a run, as `train` puts them together.

  update_fn: `(state, frozen, data, selection, seed, i, j) -> (state, metrics)`.
  """

  setup: setup_lib.Setup
  state: state.TrainState
  update_fn: Any

  @property
  def sections(self) -> Mapping[str, Any]:
    return self.setup.sections

  @property
  def system(self) -> system.System:
    return self.setup.system

  @property
  def rewards(self) -> combine.WeightedRewards | None:
    return self.setup.rewards

  @property
  def data(self) -> methods.Rollouts | methods.Stored | methods.Records:
    """What the method learns from."""
    return self.setup.method.data

  @property
  def frozen(self) -> Mapping[str, Any]:
    """An argument of every program."""
    return self.setup.frozen


def load_config(name: str, variant: str = "") -> Any:
  """The config called `name`, unlocked."""
  config = configs.load(f"{name}:{variant}" if variant else name)
  config.unlock()
  return config


def make(config: Any, model: Model, mesh: jax.sharding.Mesh | None = None) -> Workload:
  """The workload of a config, on one device unless there is a mesh, which may be described only."""
  setup = setup_lib.assemble(config.to_dict(), mesh, model=model)
  fresh = setup.init_state()
  update_fn = setup.jit_update(fresh, feeds.select_fn(setup.method.data))
  return Workload(setup, fresh, update_fn)


def tokens(sys: system.System, count: int) -> Any:
  """The tokens of some prompts."""
  return sys.model.tokenize([{"prompt": "a red circle above a blue square"}] * count)


def rollout_args(sys: system.System, tokens: Any) -> tuple:
  """The arguments of `sample_fn` for these tokens."""
  noise = (0, streams.number("rollout"), 0, 0, None, sys.pipeline.table)
  return (sys.policy.params, sys.frozen, tokens, *noise)


def pairs(work: Workload, count: int) -> tuple[methods.Finished, np.ndarray]:
  """Stored pairs of noise, encoded already, and the selection that takes them in one slice."""
  sys = work.system
  cond = sys.condition_fn(sys.frozen, tokens(sys, count)).cond
  key = streams.stream(0, "benchmark latents")
  x_0 = jax.random.normal(key, (count, 2, *sys.model.latent_shape))
  data = base.stack([methods.Finished(x_0, cond, {"p": jnp.ones(count)})])
  return data, np.arange(count, dtype=np.int32)[None]


def records(work: Workload, count: int) -> tuple[methods.Inputs, np.ndarray]:
  """Records for a reward on the device, and the selection that takes them in one slice."""
  assert work.rewards is not None and work.rewards.device is not None
  sys = work.system
  query = work.rewards.device.encode([{"prompt": "a red circle"}] * count)
  cond = sys.condition_fn(sys.frozen, tokens(sys, count))
  own, query = base.stack([(cond.cond, query)])
  data = methods.Inputs(cond._replace(cond=own), query)
  return data, np.arange(count, dtype=np.int32)[None]
