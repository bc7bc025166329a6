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
from jaxalign.training.feeds.base import Drawn, Program, averages, pick_examples, stack
from jaxalign.training.state import TrainState


class StoredPairs:
  """Pairs of images and their prompts from a file (`methods.Pairs`)."""

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
    self.num_images, self.microbatch = 2 * self.plan.examples, self.plan.microbatch
    sharding.check_batch("config.batch.microbatch", self.plan.microbatch, sys.mesh)
    self.pairs, self._report, self._prompt_dropout = checks.call_section(
      sections, "data", read_pairs, size=sys.model.image_size
    )
    num_ties = int(np.sum(self.pairs.p == 0.5))
    if num_ties and not method.soft_labels:
      raise ValueError(
        f'config.data.ties: {num_ties} of {len(self.pairs)} pairs are ties, and the loss of '
        f"config.method does not use the probability of a label\n"
        'drop ties with ties="drop", or take a method with soft_labels, such as "dpo"'
      )
    self._token_ids = sys.model.tokenize([*self.pairs.prompts, ""])
    self._sys, self._seed, self._workdir = sys, sections["seed"], workdir
    self._collect_fn = jax.jit(stack, out_shardings=sharding.batch(sys.mesh, axis=1))

  def describe(self) -> str:
    return f"{self._report.summary()}\n{self.plan.describe('pairs')}"

  def init_stats(self) -> None:
    return None

  def draw(self, state: TrainState, step: int) -> Drawn:
    rows = self.pairs.draw_for_step(self._seed, step, self.plan.examples)
    rng = streams.generator(self._seed, "prompt dropout", step)
    dropped = rng.random(len(rows)) < self._prompt_dropout
    token_ids = self._token_ids[np.where(dropped, len(self.pairs), rows)]
    parts = []
    for j, part in enumerate(self.plan.selection()):
      images = self._images(rows[part])
      parts.append(
        methods.Pairs(
          x_0=self._sys.encode_fn(self._sys.frozen, images, self._seed, step, j),
          cond=self._sys.condition_fn(self._sys.frozen, token_ids[part]).cond,
          p=self.pairs.p[rows[part]],
        )
      )
    return Drawn(state, self._collect_fn(parts), [self.plan.selection()], {})

  def _images(self, rows: np.ndarray) -> jax.Array:  # uint8 [B, 2, H, W, 3]
    """Each process decodes the pairs that its devices hold."""
    return sharding.make_batch(
      lambda held: self.pairs.images(rows[held]),
      len(rows),
      (2, *self.pairs.size, 3),
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
    args = (self._sys.frozen, self._image_shapes(microbatch), self._seed, 0, 0)
    return Program("encoding", self._sys.encode_fn, args)

  def _image_shapes(self, count: int) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct((count, 2, *self.pairs.size, 3), np.uint8)
    return sharding.shaped(shape, sharding.batch(self._sys.mesh))

  def shapes(self, state: TrainState) -> tuple[methods.Pairs, np.ndarray]:
    del state
    sys, count = self._sys, self.plan.microbatch
    ids = self._token_ids[np.zeros(count, np.int32)]
    part = methods.Pairs(
      x_0=jax.eval_shape(sys.encode_fn, sys.frozen, self._image_shapes(count), 0, 0, 0),
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
  prompt_dropout: float,
  resize: bool,
  size: tuple[int, int],
) -> tuple[PreferencePairs, preference_files.Report, float]:
  """The section `data` of a method that learns from pairs.

  Args:
    source: a .jsonl or .parquet file, see `data.preference_files`.
    ties: "drop", or "half" to keep them with a probability of 0.5: a tie draws the two log-ratios
      together. A method whose loss does not use probabilities refuses them.
    max_bad_fraction: more rows than this share set aside stop the run.
    prompt_dropout: share of pairs whose prompt is replaced by the empty one.
    resize: bring images to the size of the model.
    size: (height, width) of the model's images.
  """
  if not 0.0 <= prompt_dropout <= 1.0:
    raise ValueError(f"config.data.prompt_dropout: expected 0 to 1, got {prompt_dropout}")
  records, report = preference_files.load(source, max_bad_fraction=max_bad_fraction)
  return PreferencePairs(records, size=size, ties=ties, resize=resize), report, prompt_dropout
