"""Stored preference pairs, encoded as they are drawn: what offline methods learn from."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign import checks, methods, streams, system
from jaxalign.data import preference_files
from jaxalign.data.preference_pairs import PreferencePairs
from jaxalign.distributed import hosts, sharding
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.training import batching
from jaxalign.training.feeds import base
from jaxalign.training.feeds.base import Drawn, Program, averages, pick_examples, stack
from jaxalign.training.state import TrainState


class StoredPairs:
  """Pairs of samples and what they were made for, from a file (`methods.Pairs`)."""

  frozen: Mapping[str, Any] = {}

  def __init__(
    self,
    sections: Mapping[str, Any],
    sys: system.System,
    method: methods.Method,
    rewards: WeightedRewards | None,
    workdir: pathlib.Path,
  ):
    del rewards
    self.plan = checks.call_section(sections, "batch", batching.solve_examples)
    self.num_samples, self.microbatch = 2 * self.plan.examples, self.plan.microbatch
    self.unit = sys.model.modality.unit
    sharding.check_batch("config.batch.microbatch", self.plan.microbatch, sys.mesh)
    self.pairs, self._report, self._dropout = checks.call_section(
      sections, "data", read_pairs, size=sys.model.sample_shape[:2]
    )
    num_ties = int(np.sum(self.pairs.p == 0.5))
    if num_ties and not method.soft_labels:
      raise ValueError(
        f'config.data.ties: {num_ties} of {len(self.pairs)} pairs are ties, and the loss of '
        f"config.method does not use the probability of a label\n"
        'drop ties with ties="drop", or take a method with soft_labels, such as "dpo"'
      )
    if self._dropout and sys.model.empty is None:
      raise ValueError(
        "config.data.condition_dropout: expected 0, because this model has no input without a "
        f"condition; got {self._dropout}"
      )
    self.tokens = base.tokenize(sys.model, self.pairs.records)
    self._sys, self._seed, self._workdir = sys, sections["seed"], workdir
    # Cut along each microbatch, as it was encoded: collecting moves nothing.
    self._collect_fn = jax.jit(stack, out_shardings=sharding.batch(sys.mesh, axis=1))

  def describe(self) -> str:
    return f"{self._report.summary()}\n{self.plan.describe('pairs')}"

  def init_stats(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    # Records are drawn, and of each one pair: a ranking of nine counts as one record.
    rows = self.pairs.draw_for_step(self._seed, step, self.plan.examples)  # [B]
    rng = streams.generator(self._seed, "condition dropout", step)
    tokens = self._with_dropout(rows, rng.random(len(rows)) < self._dropout)
    parts = []
    for j, part in enumerate(self.plan.selection()):  # microbatches, as large as a slice
      samples = self._samples(rows[part])
      parts.append(
        methods.Pairs(
          # Noise of the autoencoder's posterior is another one in every iteration and microbatch.
          x_0=self._sys.encode_fn(self._sys.frozen, samples, self._seed, step, j),
          # Without guidance, as the losses on stored pairs are published.
          cond=self._sys.condition_fn(self._sys.frozen, system.take(tokens, part)).cond,
          p=self.pairs.p[rows[part]],
        )
      )
    return Drawn(state, self._collect_fn(parts), [self.plan.selection()], {})

  def _with_dropout(self, rows: np.ndarray, dropped: np.ndarray) -> Any:
    """The tokens of pairs `[B]`, those of no condition where they are dropped."""
    tokens = system.take(self.tokens, rows)
    if not self._dropout:
      return tokens
    # As published: so the branch that guidance goes away from is trained on samples too.
    return jax.tree.map(
      lambda own, empty: np.where(dropped.reshape(-1, *[1] * (own.ndim - 1)), empty, own),
      tokens,
      self._sys.model.empty,
    )

  def _samples(self, rows: np.ndarray) -> jax.Array:  # as they are stored, [B, 2, ...]
    """Each process reads the pairs that its devices hold."""
    return sharding.make_batch(
      lambda held: self.pairs.samples(rows[held]),
      len(rows),
      (2, *self._sys.model.sample_shape),
      self._sys.mesh,
    )

  @staticmethod
  def select(data: methods.Pairs, selected: np.ndarray) -> methods.Pairs:
    return pick_examples(data, selected)

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    return averages(updates)

  def check(self, record: Mapping[str, float], step: int) -> None:
    return None

  def program(self, state: TrainState, microbatch: int) -> Program:
    del state
    args = (self._sys.frozen, self._sample_shapes(microbatch), self._seed, 0, 0)
    return Program("encoding", self._sys.encode_fn, args)

  def _sample_shapes(self, count: int) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct((count, 2, *self._sys.model.sample_shape), np.uint8)
    return sharding.shaped(shape, sharding.batch(self._sys.mesh))

  def shapes(self, state: TrainState) -> tuple[methods.Pairs, np.ndarray]:
    del state
    sys, count = self._sys, self.plan.microbatch
    ids = system.take(self.tokens, np.zeros(count, np.int32))
    # Of one microbatch, stacked below as often as an iteration has them.
    part = methods.Pairs(
      x_0=jax.eval_shape(sys.encode_fn, sys.frozen, self._sample_shapes(count), 0, 0, 0),
      cond=jax.eval_shape(sys.condition_fn, sys.frozen, ids).cond,
      p=np.ones(count, np.float32),
    )
    selection = self.plan.selection()
    data = jax.eval_shape(stack, [part] * len(selection))
    return sharding.shaped(data, sharding.batch(sys.mesh, axis=1)), selection

  def __enter__(self):
    """Writes which rows of the data were set aside, once there is a workdir."""
    if self._workdir.is_dir() and hosts.is_first():
      self._report.write(self._workdir / "preferences_report.json")
    return self

  def __exit__(self, *_) -> None:
    pass


def read_pairs(
  *,
  source: str,
  ties: str,
  max_bad_fraction: float,
  condition_dropout: float,
  resize: bool,
  size: tuple[int, int],
) -> tuple[PreferencePairs, preference_files.Report, float]:
  """The section `data` of a method that learns from pairs.

  Args:
    source: a .jsonl or .parquet file, see `data.preference_files`.
    ties: "drop", or "half" to keep them with a probability of 0.5: a tie draws the two log-ratios
      together. A method whose loss does not use probabilities refuses them.
    max_bad_fraction: more rows than this share set aside stop the run.
    condition_dropout: share of pairs whose condition is replaced by the empty one.
    resize: bring samples to the size of the model.
    size: (height, width) of the model's samples.
  """
  if not 0.0 <= condition_dropout <= 1.0:
    raise ValueError(f"config.data.condition_dropout: expected 0 to 1, got {condition_dropout}")
  records, report = preference_files.load(source, max_bad_fraction=max_bad_fraction)
  return PreferencePairs(records, size=size, ties=ties, resize=resize), report, condition_dropout
