"""The batch algebra of a run, solved once: samples, microbatches, updates, slices."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxalign import streams
from jaxalign.types import Array


class BatchPlan(NamedTuple):
  """Every count that follows from the config. All are global and per iteration.

  samples:           what is sampled, `num_records * group_size`.
  num_records:       different records among them.
  group_size:        samples of one record.
  microbatch:        samples in one call of the rollout.
  microbatches:      rollout calls.
  examples:          what updates count: samples, or one pair of samples for each record.
  slice_size:        examples' steps in one gradient slice; it holds `microbatch` samples.
  examples_per_update: examples whose trajectories one optimizer step sees.
  steps:             the steps of a trajectory that are trained.
  timesteps:         how many of them are drawn for each example.
  slices:            gradient slices that one optimizer step accumulates.
  num_epochs:        passes over the examples.
  updates:           optimizer steps.
  shards:            parts of every microbatch that examples are shuffled within.
  """

  samples: int
  num_records: int
  group_size: int
  microbatch: int
  microbatches: int
  examples: int
  slice_size: int
  examples_per_update: int
  steps: tuple[int, ...]
  timesteps: int
  slices: int
  num_epochs: int
  updates: int
  shards: int

  def describe(self, unit: str) -> str:
    """Two lines for the start of a run; samples are called `unit` (`Modality.unit`)."""
    examples = unit if self.examples == self.samples else f"pairs of {unit}"
    return (
      f"rollout: {self.samples} {unit} = {self.num_records} records x {self.group_size}, "
      f"in {self.microbatches} microbatches of {self.microbatch}\n"
      f"update:  {self.updates} optimizer steps, each on {self.examples_per_update} {examples} x "
      f"{self.timesteps} of {len(self.steps)} timesteps, in {self.slices} slices of "
      f"{self.slice_size}"
    )


def solve(
  *,
  num_records: int,
  group_size: int,
  microbatch: int,
  updates_per_epoch: int,
  num_epochs: int,
  timestep_range: tuple[float, float],
  timestep_fraction: float,
  steps: Sequence[int],
  pairs: bool = False,
  shards: int = 0,
  devices: int = 1,
) -> BatchPlan:
  """Solves the plan, or raises ValueError naming the field to change and values that fit.

  `steps` are the steps of a trajectory that could be trained: those with noise, for policy
  gradients. `timestep_range` cuts a window out of them, from 0 (the first, at the highest noise
  level) to 1, and `timestep_fraction` is the share of the window that is drawn for each sample.
  With `pairs`, each record's samples become one pair, and a gradient slice holds half as many pairs
  as a microbatch holds samples.

  `shards` is the number of parts of a microbatch that examples are shuffled within, 0 for as many
  as there are `devices`: each then takes its part of every slice from what it has sampled itself.
  A run whose `shards` is stated is the same on any number of devices that divides it.
  """
  _check_counts(
    num_records=num_records,
    group_size=group_size,
    microbatch=microbatch,
    updates_per_epoch=updates_per_epoch,
    num_epochs=num_epochs,
  )
  window = _window(steps, timestep_range)
  timesteps = _num_timesteps(window, timestep_fraction)
  samples = num_records * group_size
  _check_split(num_records, group_size, microbatch, updates_per_epoch)
  examples, slice_size = samples, microbatch
  if pairs:
    examples, slice_size = num_records, max(1, microbatch // 2)
    _check_pairs(num_records, group_size, microbatch, updates_per_epoch)
  examples_per_update = examples // updates_per_epoch
  return BatchPlan(
    samples=samples,
    num_records=num_records,
    group_size=group_size,
    microbatch=microbatch,
    microbatches=samples // microbatch,
    examples=examples,
    slice_size=slice_size,
    examples_per_update=examples_per_update,
    steps=tuple(window),
    timesteps=timesteps,
    slices=examples_per_update // slice_size * timesteps,
    num_epochs=num_epochs,
    updates=updates_per_epoch * num_epochs,
    shards=_solve_shards(shards, devices, microbatch, group_size if pairs else 1),
  )


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f"config.batch.{name}: expected at least 1, got {value}")


def _solve_shards(shards: int, devices: int, microbatch: int, together: int) -> int:
  """The number of shards, whose samples come in groups of `together` that no device shares."""
  count = shards or devices
  if microbatch % (count * together):
    raise ValueError(
      f"config.batch.microbatch: expected a multiple of {count * together}, "
      f"{count} {'shards' if shards else 'devices'}"
      f"{f' x {together} samples of a record' if together > 1 else ''}, got {microbatch}"
    )
  if count < 1 or count % devices:
    raise ValueError(
      f"config.batch.shards: expected 0, or a multiple of {devices}, the number of devices, got "
      f"{shards}"
    )
  return count


def _window(steps: Sequence[int], timestep_range: tuple[float, float]) -> Sequence[int]:
  """The part of `steps` in a range of shares of them."""
  first, last = timestep_range
  if not 0.0 <= first < last <= 1.0:
    raise ValueError(
      f"config.batch.timestep_range: expected 0 <= first < last <= 1, got {first}, {last}"
    )
  window = steps[round(first * len(steps)) : round(last * len(steps))]
  if not window:
    raise ValueError(
      f"config.batch.timestep_range: {first} to {last} holds none of the {len(steps)} steps that "
      "could be trained\nwiden it"
    )
  return window


def _num_timesteps(window: Sequence[int], timestep_fraction: float) -> int:
  """How many steps of the window are drawn for each example."""
  if not 0.0 < timestep_fraction <= 1.0:
    raise ValueError(
      f"config.batch.timestep_fraction: expected a fraction in (0, 1], got {timestep_fraction}"
    )
  return max(1, round(timestep_fraction * len(window)))


def _check_split(
  num_records: int, group_size: int, microbatch: int, updates_per_epoch: int
) -> None:
  """Raises ValueError unless every update has whole microbatches."""
  samples = num_records * group_size
  if samples % (microbatch * updates_per_epoch):
    raise ValueError(
      f"config.batch: {samples} samples ({num_records} records x {group_size}) do not split "
      f"into {updates_per_epoch} updates of whole microbatches of {microbatch}; "
      f"{_fitting(samples, microbatch, updates_per_epoch)}"
    )


def _check_pairs(
  num_records: int, group_size: int, microbatch: int, updates_per_epoch: int
) -> None:
  if group_size < 2:
    raise ValueError(
      f"config.batch.group_size: expected at least 2, to compare, got {group_size}"
    )
  if microbatch % group_size:
    raise ValueError(
      f"config.batch.microbatch: expected whole groups, a multiple of group_size = "
      f"{group_size}, got {microbatch}"
    )
  pairs = microbatch // 2
  if num_records % (pairs * updates_per_epoch):
    raise ValueError(
      f"config.batch: {num_records} pairs, one for each record, do not split into "
      f"{updates_per_epoch} updates of slices of {pairs} (half of microbatch)\n"
      f"num_records can be a multiple of {pairs * updates_per_epoch}"
    )


def _fitting(samples: int, microbatch: int, updates_per_epoch: int) -> str:
  """Values that do split: of the microbatch if any, else of the updates with one microbatch."""
  microbatches = _factors(samples, updates_per_epoch)
  if microbatches:
    return f"microbatch can be one of {microbatches}"
  nearest = math.gcd(samples, microbatch)
  updates = _factors(samples, nearest)
  also = "" if nearest == microbatch else f" with microbatch {nearest}"
  return f"updates_per_epoch can be one of {updates}{also}"


def _factors(count: int, other: int) -> list[int]:
  return [value for value in range(1, count + 1) if count % (value * other) == 0]


class Selection(NamedTuple):
  """The transitions of one optimizer step: which example, and which step of its trajectory.

  example, i: int32 `[slices, slice_size]`.
  fresh: bool, the same shape: the parameters are still those that sampled.
  """

  example: Array
  i: Array
  fresh: Array


def selections(plan: BatchPlan, seed: int, iteration: int) -> list[Selection]:
  """The shuffled transitions of every optimizer step of an iteration.

  Examples are shuffled anew in each epoch, and the timesteps of each independently, of which
  the first `plan.timesteps` are trained (the order of ddpo-pytorch). A pure function of the seed
  and the iteration.
  """
  rng = streams.generator(seed, "transitions", iteration)
  result: list[Selection] = []
  for _ in range(plan.num_epochs):
    order = _shuffled(plan, rng)
    for part in np.split(order, plan.examples // plan.examples_per_update):
      steps = np.stack([rng.permutation(plan.steps)[: plan.timesteps] for _ in part])
      example = np.repeat(part.reshape(-1, 1, plan.slice_size), plan.timesteps, axis=1)
      steps = steps.reshape(-1, plan.slice_size, plan.timesteps).transpose(0, 2, 1)
      shape = (plan.slices, plan.slice_size)
      fresh = np.full(shape, not result)
      result.append(
        Selection(example.reshape(shape), steps.reshape(shape).astype(np.int32), fresh)
      )
  return result


def _shuffled(plan: BatchPlan, rng: np.random.Generator) -> np.ndarray:  # [examples] int32
  """All examples in slices, each slice with as many of every shard, in the order of the shards."""
  of_shard = np.arange(plan.examples, dtype=np.int32)
  # An example's shard is its place in its microbatch.
  of_shard = of_shard.reshape(plan.microbatches, plan.shards, -1).swapaxes(0, 1)
  of_shard = of_shard.reshape(plan.shards, -1)
  order = np.stack([rng.permutation(examples) for examples in of_shard])
  return order.reshape(plan.shards, -1, plan.slice_size // plan.shards).swapaxes(0, 1).reshape(-1)


class ExamplePlan(NamedTuple):
  """The counts of an iteration whose examples are independent: stored pairs, or records.

  examples:   of one optimizer step, of which an iteration has one.
  microbatch: in one gradient slice.
  """

  examples: int
  microbatch: int

  def describe(self, unit: str) -> str:
    """A line for the start of a run."""
    slices = self.examples // self.microbatch
    return (
      f"update:  one optimizer step on {self.examples} {unit}, in {slices} slices of "
      f"{self.microbatch}"
    )

  def selection(self) -> np.ndarray:
    """Which examples each slice takes, int32 `[slices, microbatch]`."""
    return np.arange(self.examples, dtype=np.int32).reshape(-1, self.microbatch)


def solve_examples(*, num_examples: int, microbatch: int) -> ExamplePlan:
  """Raises ValueError, naming what fits, unless the examples split into whole microbatches."""
  _check_counts(num_examples=num_examples, microbatch=microbatch)
  if num_examples % microbatch:
    raise ValueError(
      f"config.batch: {num_examples} examples do not split into microbatches of {microbatch}; "
      f"microbatch can be one of {_factors(num_examples, 1)}"
    )
  return ExamplePlan(num_examples, microbatch)
