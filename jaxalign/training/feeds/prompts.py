"""Prompts alone: the loss samples for itself, because its gradient goes through the sampler."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign import checks, methods, system
from jaxalign.data import prompts as prompts_lib
from jaxalign.diffusion import guidance
from jaxalign.distributed import sharding
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.training import batching
from jaxalign.training.feeds.base import Drawn, Program, averages, pick_examples, stack
from jaxalign.training.state import TrainState
from jaxalign.types import Params


class PromptBatches:
  """Prompts, what the network sees of them, and what the reward does (`methods.Prompts`)."""

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
    self.num_images, self.microbatch = self.plan.examples, self.plan.microbatch
    sharding.check_batch("config.batch.microbatch", self.plan.microbatch, sys.mesh)
    self.prompts = checks.call_section(sections, "data", prompts_lib.load)
    params = sharding.place_params(rewards.device.params, sys.mesh)
    self.frozen: Mapping[str, Params] = {"reward": params}
    self._token_ids = sys.model.tokenize([record["prompt"] for record in self.prompts.records])
    self._features = rewards.device.encode(self.prompts.records)
    self._sys, self._seed = sys, sections["seed"]
    self._collect_fn = jax.jit(stack, out_shardings=sharding.batch(sys.mesh, axis=1))

  def describe(self) -> str:
    return self.plan.describe("prompts")

  def init_stats(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    ids = self.prompts.draw_for_step(self._seed, step, self.plan.examples)
    conds, own = [], []
    for part in self.plan.selection():
      conds.append(self._sys.condition_fn(self._sys.frozen, self._token_ids[ids[part]]))
      own.append((conds[-1].cond, self._features_of(ids[part])))
    cond, features = self._collect_fn(own)
    data = methods.Prompts(conds[0]._replace(cond=cond), features)
    return Drawn(state, data, [self.plan.selection()], {})

  def _features_of(self, ids: np.ndarray) -> Any:
    return jax.tree.map(lambda leaf: leaf[ids], self._features)

  @staticmethod
  def select(data: methods.Prompts, selected: np.ndarray) -> methods.Prompts:
    cond, features = pick_examples((data.cond.cond, data.features), selected)
    return methods.Prompts(data.cond._replace(cond=cond), features)

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    record = averages(updates)
    record["reward/std"] = float(np.std(updates[0]["reward/mean"]))
    return record

  def check(self, record: Mapping[str, float], step: int) -> None:
    return None

  def program(self, state: TrainState, microbatch: int) -> Program:
    del state
    rows = np.resize(np.arange(len(self._token_ids)), microbatch)
    return Program("prompts", self._sys.condition_fn, (self._sys.frozen, self._token_ids[rows]))

  def shapes(self, state: TrainState) -> tuple[methods.Prompts, np.ndarray]:
    _, function, args = self.program(state, self.microbatch)
    cond, mesh = jax.eval_shape(function, *args), self._sys.mesh
    features = self._features_of(np.zeros(self.microbatch, np.int32))
    selection = self.plan.selection()
    own = jax.eval_shape(stack, [(cond.cond, features)] * len(selection))
    cond_shapes, features = sharding.shaped(own, sharding.batch(mesh, axis=1))
    uncond = sharding.shaped(cond.uncond, sharding.replicated(mesh))
    return methods.Prompts(guidance.Guided(cond_shapes, uncond), features), selection

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    pass
