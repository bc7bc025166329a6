"""Prompts alone: the loss samples for itself, because its gradient goes through the sampler."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import batching, checks, methods, sharding, system
from jaxalign.data import prompts as prompts_lib
from jaxalign.feeds.base import Drawn, Program, averages
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.state import TrainState
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

  def describe(self) -> str:
    return self.plan.describe("prompts")

  def init_stats(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    ids = self.prompts.draw_for_step(self._seed, step, self.plan.examples)
    cond = self._sys.condition_fn(self._sys.frozen, self._token_ids[ids])
    features = jax.tree.map(lambda leaf: leaf[ids], self._features)
    return Drawn(state, methods.Prompts(cond, features), [self.plan.selection()], {})

  @staticmethod
  def select(data: methods.Prompts, selected: np.ndarray) -> methods.Prompts:
    def pick(tree):
      return jax.tree.map(lambda leaf: jnp.asarray(leaf)[selected], tree)

    return methods.Prompts(data.cond._replace(cond=pick(data.cond.cond)), pick(data.features))

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    record = averages(updates)
    record["reward/std"] = float(np.std(updates[0]["reward/mean"]))
    return record

  def check(self, record: Mapping[str, float], step: int) -> None:
    pass

  def program(self, state: TrainState, microbatch: int) -> Program:
    del state, microbatch  # all prompts of an iteration are encoded at once
    rows = np.resize(np.arange(len(self._token_ids)), self.plan.examples)
    return Program("prompts", self._sys.condition_fn, (self._sys.frozen, self._token_ids[rows]))

  def __enter__(self):
    return self

  def __exit__(self, *_) -> None:
    pass
