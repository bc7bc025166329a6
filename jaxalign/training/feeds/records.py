"""Records alone: the loss samples for itself, because its gradient goes through the sampler."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign import checks, methods, system
from jaxalign.data import records as records_lib
from jaxalign.diffusion import guidance
from jaxalign.distributed import sharding
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.training import batching
from jaxalign.training.feeds import base
from jaxalign.training.feeds.base import Drawn, Program, averages, pick_examples, stack
from jaxalign.training.state import TrainState
from jaxalign.types import Params


class RecordBatches:
  """Records, what the network sees of them, and what the reward does (`methods.Records`)."""

  def __init__(
    self,
    sections: Mapping[str, Any],
    sys: system.System,
    method: methods.Method,
    rewards: WeightedRewards | None,
    workdir: pathlib.Path,
  ):
    del method, workdir
    if rewards is None or rewards.device is None:
      raise ValueError("config.reward: expected rewards that run on the device, found none")
    self.plan = checks.call_section(sections, "batch", batching.solve_examples)
    self.num_samples, self.microbatch = self.plan.examples, self.plan.microbatch
    self.unit = sys.model.modality.unit
    sharding.check_batch("config.batch.microbatch", self.plan.microbatch, sys.mesh)
    self.records = checks.call_section(sections, "data", records_lib.load)
    # On the mesh, and an argument of the update: captured, it would be a constant of the program.
    params = sharding.place_params(rewards.device.params, sys.mesh)
    self.frozen: Mapping[str, Params] = {"reward": params}
    self.tokens = base.tokenize(sys.model, self.records.records)
    self._query = rewards.device.encode(self.records.records)
    self._sys, self._seed = sys, sections["seed"]
    self._collect_fn = jax.jit(stack, out_shardings=sharding.batch(sys.mesh, axis=1))

  def describe(self) -> str:
    return self.plan.describe("records")

  def init_stats(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    ids = self.records.draw_for_step(self._seed, step, self.plan.examples)
    conds, own = [], []  # microbatches; what a record has of its own is cut over devices
    for part in self.plan.selection():
      conds.append(self._sys.condition_fn(self._sys.frozen, system.take(self.tokens, ids[part])))
      own.append((conds[-1].cond, self._query_of(ids[part])))
    cond, query = self._collect_fn(own)
    # The empty condition is the same for all, and whole on every device.
    data = methods.Records(conds[0]._replace(cond=cond), query)
    return Drawn(state, data, [self.plan.selection()], {})

  def _query_of(self, ids: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[ids], self._query)

  @staticmethod
  def select(data: methods.Records, selected: np.ndarray) -> methods.Records:
    cond, query = pick_examples((data.cond.cond, data.query), selected)
    return methods.Records(data.cond._replace(cond=cond), query)

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    record = averages(updates)
    # Of the first update alone, where the parameters are still those of the iteration's start.
    record["reward/std"] = float(np.std(updates[0]["reward/mean"]))
    return record

  def check(self, record: Mapping[str, float], step: int) -> None:
    return None

  def program(self, state: TrainState, microbatch: int) -> Program:
    del state
    rows = np.resize(np.arange(len(self.records)), microbatch)
    args = (self._sys.frozen, system.take(self.tokens, rows))
    return Program("conditioning", self._sys.condition_fn, args)

  def shapes(self, state: TrainState) -> tuple[methods.Records, np.ndarray]:
    _, function, args = self.program(state, self.microbatch)
    cond, mesh = jax.eval_shape(function, *args), self._sys.mesh
    query = self._query_of(np.zeros(self.microbatch, np.int32))
    selection = self.plan.selection()
    # The shapes of one microbatch, as often as there are some.
    own = jax.eval_shape(stack, [(cond.cond, query)] * len(selection))
    cond_shapes, query = sharding.shaped(own, sharding.batch(mesh, axis=1))
    uncond = sharding.shaped(cond.uncond, sharding.replicated(mesh))
    return methods.Records(guidance.Guided(cond_shapes, uncond), query), selection

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    pass
