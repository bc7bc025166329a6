"""Records alone: the loss samples for itself, because its gradient goes through the sampler."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign import checks, system
from jaxalign.data import records as records_lib
from jaxalign.distributed import sharding
from jaxalign.methods.batches import Inputs
from jaxalign.training import batching
from jaxalign.training.feeds import base
from jaxalign.training.feeds.base import Drawn, Program, averages, pick_examples, stack
from jaxalign.training.setup import Setup
from jaxalign.training.state import TrainState


class RecordBatches:
  """Records, what the network sees of them, and what the reward does (`methods.Records`)."""

  example = "record"

  def __init__(self, setup: Setup):
    sys, rewards = setup.system, setup.rewards
    if rewards is None or rewards.device is None:
      raise ValueError("config.reward: expected rewards that run on the device, found none")
    self.plan = checks.call_section(setup.sections, "batch", batching.solve_examples)
    self.num_samples, self.microbatch = self.plan.examples, self.plan.microbatch
    self.unit, self.select = sys.model.modality.unit, select
    sharding.check_batch("config.batch.microbatch", self.plan.microbatch, sys.mesh)
    self.records = checks.call_section(setup.sections, "data", records_lib.load)
    self.tokens = base.tokenize(sys.model.tokenize, self.records.records)
    self._query = base.tokenize(rewards.encode, self.records.records)
    self._sys, self._seed = sys, setup.sections["seed"]
    self._collect_fn = jax.jit(stack, out_shardings=sharding.batch(sys.mesh, axis=1))

  def describe(self) -> str:
    return self.plan.describe("records")

  def init_memory(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    ids = self.records.draw_for_step(self._seed, step, self.plan.examples)
    conds, own = [], []  # microbatches; what a record has of its own is cut over devices
    for part in self.plan.selection():
      conds.append(self._sys.condition_fn(self._sys.frozen, system.take(self.tokens, ids[part])))
      own.append((conds[-1].cond, self._query_of(ids[part])))
    cond, query = self._collect_fn(own)
    # The empty condition is the same for all, and whole on every device.
    data = Inputs(conds[0]._replace(cond=cond), query)
    return Drawn(state, data, [self.plan.selection()], {})

  def _query_of(self, ids: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[ids], self._query)

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    record = averages(updates)
    # Of the first update alone, where the parameters are still those of the iteration's start.
    if "reward/mean" in updates[0]:
      record["reward/std"] = float(np.std(updates[0]["reward/mean"]))
    return record

  def check(self, record: Mapping[str, float], step: int) -> None:
    return None

  def program(self, state: TrainState, microbatch: int) -> Program:
    del state
    rows = np.resize(np.arange(len(self.records)), microbatch)
    args = (self._sys.frozen, system.take(self.tokens, rows))
    return Program("conditioning", self._sys.condition_fn, args)

  def shapes(self, state: TrainState) -> tuple[Inputs, np.ndarray]:
    _, function, args = self.program(state, self.microbatch)
    cond, mesh = jax.eval_shape(function, *args), self._sys.mesh
    query = self._query_of(np.zeros(self.microbatch, np.int32))
    selection = self.plan.selection()
    # The shapes of one microbatch, as often as there are some.
    own = jax.eval_shape(stack, [(cond.cond, query)] * len(selection))
    cond_shapes, query = sharding.shaped(own, sharding.batch(mesh, axis=1))
    uncond = sharding.shaped(cond.uncond, sharding.replicated(mesh))
    return Inputs(cond._replace(cond=cond_shapes, uncond=uncond), query), selection

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    pass


def select(data: Inputs, selected: np.ndarray) -> Inputs:
  """The records of a gradient slice; the empty condition is shared."""
  cond, query = pick_examples((data.cond.cond, data.query), selected)
  return Inputs(data.cond._replace(cond=cond), query)
