"""Stored preferences, encoded as they are drawn: what offline methods learn from."""

import functools
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxalign import checks, streams, system
from jaxalign.data import layouts, preference_files, sources
from jaxalign.data.example_set import ExampleSet
from jaxalign.data.examples import ExamplesFn
from jaxalign.distributed import hosts, sharding
from jaxalign.methods import Stored
from jaxalign.methods.batches import Finished
from jaxalign.models.model import Model
from jaxalign.training import batching
from jaxalign.training.feeds import base
from jaxalign.training.feeds.base import Drawn, Program, averages, pick_examples, stack
from jaxalign.training.setup import Setup
from jaxalign.training.state import TrainState


class StoredExamples:
  """Samples of a file with their labels, one or several an example (`methods.Stored`)."""

  def __init__(self, setup: Setup, data: Stored, workdir: str | os.PathLike):
    workdir = pathlib.Path(workdir)
    sys = setup.system
    self.examples, self._report, self._dropout = checks.call_section(
      setup.sections, "data", read, examples=data.examples, model=sys.model
    )
    self.plan = checks.call_section(setup.sections, "batch", batching.solve_examples)
    each = int(np.prod(self.examples.each))
    self.example = {1: "sample", 2: "pair"}.get(each, f"list of {each}")
    self.num_samples, self.microbatch = each * self.plan.examples, self.plan.microbatch
    self.unit, self.select = sys.model.modality.unit, select
    sharding.check_batch("config.batch.microbatch", self.plan.microbatch, sys.mesh)
    if self._dropout and sys.model.empty is None:
      raise ValueError(
        "config.data.condition_dropout: expected 0, because this model has no input without a "
        f"condition; got {self._dropout}"
      )
    self.tokens = base.tokenize(sys.model.tokenize, self.examples.records)
    self._sys, self._seed, self._workdir = sys, setup.sections["seed"], workdir
    # Cut along each microbatch, as it was encoded: collecting moves nothing.
    self._collect_fn = jax.jit(stack, out_shardings=sharding.batch(sys.mesh, axis=1))

  def describe(self) -> str:
    return f"{self._report.summary()}\n{self.plan.describe(f'{self.example}s')}"

  def init_memory(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    # Records are drawn, and of each one example: a ranking of nine counts as one record.
    rows = self.examples.draw_for_step(self._seed, step, self.plan.examples)  # [B]
    rng = streams.generator(self._seed, "condition dropout", step)
    tokens = self._with_dropout(rows, rng.random(len(rows)) < self._dropout)
    parts = []
    for j, part in enumerate(self.plan.selection()):  # microbatches, as large as a slice
      samples = self._samples(rows[part])
      parts.append(
        Finished(
          # Noise of the autoencoder's posterior is another one in every iteration and microbatch.
          x_0=self._sys.encode_fn(self._sys.frozen, samples, self._seed, step, j),
          # Without guidance, as the losses on stored samples are published.
          cond=self._sys.condition_fn(self._sys.frozen, system.take(tokens, part)).cond,
          labels=system.take(self.examples.values, rows[part]),
        )
      )
    return Drawn(state, self._collect_fn(parts), [self.plan.selection()], {})

  def _with_dropout(self, rows: np.ndarray, dropped: np.ndarray) -> Any:
    """The tokens of examples `[B]`, those of no condition where they are dropped."""
    tokens = system.take(self.tokens, rows)
    if not self._dropout:
      return tokens
    # As published: so the branch that guidance goes away from is trained on samples too.
    return jax.tree.map(
      lambda own, empty: np.where(dropped.reshape(-1, *[1] * (own.ndim - 1)), empty, own),
      tokens,
      self._sys.model.empty,
    )

  def _samples(self, rows: np.ndarray) -> jax.Array:  # as they are stored, [B, (n,) ...]
    """Each process reads the examples that its devices hold."""
    return sharding.make_batch(
      lambda held: self.examples.samples(rows[held]),
      len(rows),
      (*self.examples.each, *self._sys.model.sample_shape),
      self._sys.mesh,
    )

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    return averages(updates)

  def check(self, record: Mapping[str, float], step: int) -> None:
    return None

  def program(self, state: TrainState, microbatch: int) -> Program:
    del state
    args = (self._sys.frozen, self._sample_shapes(microbatch), self._seed, 0, 0)
    return Program("encoding", self._sys.encode_fn, args)

  def _sample_shapes(self, count: int) -> jax.ShapeDtypeStruct:
    shape = (count, *self.examples.each, *self._sys.model.sample_shape)
    return sharding.shaped(
      jax.ShapeDtypeStruct(shape, self.examples.dtype), sharding.batch(self._sys.mesh)
    )

  def shapes(self, state: TrainState) -> tuple[Finished, np.ndarray]:
    del state
    sys, count = self._sys, self.plan.microbatch
    first = np.zeros(count, np.int32)
    # Of one microbatch, stacked below as often as an iteration has them.
    part = Finished(
      x_0=jax.eval_shape(sys.encode_fn, sys.frozen, self._sample_shapes(count), 0, 0, 0),
      cond=jax.eval_shape(sys.condition_fn, sys.frozen, system.take(self.tokens, first)).cond,
      labels=system.take(self.examples.values, first),
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


def select(data: Finished, selected: np.ndarray) -> Finished:
  """The examples of a gradient slice."""
  return pick_examples(data, selected)


def read(
  *,
  source: sources.Source,
  max_bad_fraction: float,
  condition_dropout: float,
  resize: str | bool,
  examples: ExamplesFn,
  model: Model,
  columns: str | layouts.Columns | None = None,
  **options: Any,
) -> tuple[ExampleSet, preference_files.Report, float]:
  """The section `data` of a method that learns from stored samples.

  Args:
    source: files of rows, see `data.preference_files`; a file, a folder, a pattern or a list.
    max_bad_fraction: more rows than this share set aside stop the run.
    condition_dropout: share of examples whose condition is replaced by the empty one.
    resize: bring samples to the size of the model, by a function of `Modality.resize`: "crop", as
      the published code, which is also what true means, or "squeeze", whatever the aspect ratio.
    examples: what the method makes of a record.
    model: whose samples they are, and of what shape.
    columns: which columns hold what, or the name of a published layout, see `data.layouts`.
    **options: of `examples`; of pairs `ties`, "drop" or "half" to keep them with a probability of
      0.5, and of thumbs `threshold`.
  """
  if not 0.0 <= condition_dropout <= 1.0:
    raise ValueError(f"config.data.condition_dropout: expected 0 to 1, got {condition_dropout}")
  checks.check_call("config.data", examples, None, **options)
  records, report = preference_files.load(
    source, model.modality, max_bad_fraction=max_bad_fraction, columns=columns
  )
  found = ExampleSet(
    records,
    functools.partial(examples, **options),
    model.modality,
    shape=model.sample_shape,
    resize=resize,
  )
  return found, report, condition_dropout
