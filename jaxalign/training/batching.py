"""The batch algebra of a run, solved once: samples, microbatches, updates, slices."""

import math
from collections.abc import Callable, Sequence
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
  examples:          what updates count: samples, or several of one record, such as a pair.
  width:             samples of an example.
  slice_size:        examples in one gradient slice; they are of `microbatch` samples at most.
  examples_per_update: examples that one optimizer step sees.
  steps:             the steps of a trajectory that are trained; none where finished samples are.
  timesteps:         how many of them are drawn for each example; 1 of a finished sample.
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
  width: int
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
    lists = "pairs" if self.width == 2 else f"lists of {self.width}"
    examples = unit if self.width == 1 else f"{lists} of {unit}"
    timesteps = f" x {self.timesteps} of {len(self.steps)} timesteps" if self.steps else ""
    return (
      f"rollout: {self.samples} {unit} = {self.num_records} records x {self.group_size}, "
      f"in {self.microbatches} microbatches of {self.microbatch}\n"
      f"update:  {self.updates} optimizer steps, each on {self.examples_per_update} {examples}"
      f"{timesteps}, in {self.slices} slices of {self.slice_size}"
    )


# examples(num_records, group_size) -> (E, samples of each) that an iteration is labelled with
CountFn = Callable[[int, int], tuple[int, int]]


def every_sample(num_records: int, group_size: int) -> tuple[int, int]:
  """The `CountFn` of methods whose examples are samples."""
  return num_records * group_size, 1


def solve(
  *,
  num_records: int,
  group_size: int,
  microbatch: int,
  updates_per_epoch: int,
  num_epochs: int,
  timestep_range: tuple[float, float] | None = None,
  timestep_fraction: float | None = None,
  steps: Sequence[int] | None = None,
  count_examples: CountFn = every_sample,
  shards: int = 0,
  devices: int = 1,
) -> BatchPlan:
  """Solves the plan, or raises ValueError naming the field to change and values that fit.

  `steps` are the steps of a trajectory that could be trained: those with noise, for policy
  gradients; None where finished samples are trained on. `timestep_range` cuts a window out of them,
  from 0 (the first, at the highest noise level) to 1, and `timestep_fraction` is the share of the
  window that is drawn for each example. `count_examples` says how many examples the labels make of
  the samples; where they are not the samples themselves, no record lies on two devices.

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
  window, timesteps = _trained(steps, timestep_range, timestep_fraction)
  samples = num_records * group_size
  _check_split(num_records, group_size, microbatch, updates_per_epoch)
  examples, width = count_examples(num_records, group_size)
  slice_size = min(max(1, microbatch // width), max(1, examples // updates_per_epoch))
  of_groups = (examples, width) != (samples, 1)
  if of_groups:
    _check_groups(examples, width, slice_size, group_size, microbatch, updates_per_epoch)
  examples_per_update = examples // updates_per_epoch
  shards = _solve_shards(shards, devices, microbatch, group_size if of_groups else 1, slice_size)
  return BatchPlan(
    samples=samples,
    num_records=num_records,
    group_size=group_size,
    microbatch=microbatch,
    microbatches=samples // microbatch,
    examples=examples,
    width=width,
    slice_size=slice_size,
    examples_per_update=examples_per_update,
    steps=tuple(window),
    timesteps=timesteps,
    slices=examples_per_update // slice_size * timesteps,
    num_epochs=num_epochs,
    updates=updates_per_epoch * num_epochs,
    shards=shards,
  )


def _check_counts(**counts: int) -> None:
  for name, value in counts.items():
    if value < 1:
      raise ValueError(f"config.batch.{name}: expected at least 1, got {value}")


def _solve_shards(
  shards: int, devices: int, microbatch: int, together: int, slice_size: int
) -> int:
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
  if slice_size % count:
    raise ValueError(
      f"config.batch.microbatch: expected a gradient slice, of {slice_size} examples here, that "
      f"{count} devices or shards share evenly; got {microbatch}"
    )
  return count


def _trained(
  steps: Sequence[int] | None,
  timestep_range: tuple[float, float] | None,
  timestep_fraction: float | None,
) -> tuple[Sequence[int], int]:
  """The steps that are trained, and how many of them are drawn for each example."""
  given = {"timestep_range": timestep_range, "timestep_fraction": timestep_fraction}
  for name, value in given.items():
    if (value is None) != (steps is None):
      expected = "none, because config.method trains on finished samples" if value else "a value"
      raise ValueError(f"config.batch.{name}: expected {expected}, got {value}")
  if steps is None:
    return (), 1
  window = window_of(steps, timestep_range)
  return window, _num_timesteps(window, timestep_fraction)


def window_of(steps: Sequence[int], timestep_range: tuple[float, float]) -> Sequence[int]:
  """The part of `steps` in a range of shares of them; ValueError if it is empty."""
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


def _check_groups(
  examples: int,
  width: int,
  slice_size: int,
  group_size: int,
  microbatch: int,
  updates_per_epoch: int,
) -> None:
  """Raises ValueError unless groups are whole, and examples of them split into whole slices."""
  if microbatch % group_size:
    raise ValueError(
      f"config.batch.microbatch: expected whole groups, a multiple of group_size = "
      f"{group_size}, got {microbatch}"
    )
  if examples % (slice_size * updates_per_epoch):
    raise ValueError(
      f"config.batch: {examples} examples of {width} samples do not split into "
      f"{updates_per_epoch} updates of slices of {slice_size} (microbatch / {width})\n"
      f"their number can be a multiple of {slice_size * updates_per_epoch}"
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


def selections(
  plan: BatchPlan, seed: int, iteration: int, steps: Sequence[int] | None = None
) -> list[Selection]:
  """The shuffled transitions of every optimizer step of an iteration.

  Examples are shuffled anew in each epoch, and the timesteps of each independently, of which
  the first `plan.timesteps` are trained (the order of ddpo-pytorch). A pure function of its
  arguments. `steps` are those of this iteration, as many as the plan has, where they move; finished
  samples have step 0.
  """
  steps = plan.steps if steps is None else steps
  if len(steps) != len(plan.steps):
    raise ValueError(
      f"expected {len(plan.steps)} steps with noise in every iteration, found {len(steps)} in "
      f"iteration {iteration}"
    )
  steps = steps or (0,)
  rng = streams.generator(seed, "transitions", iteration)
  result: list[Selection] = []
  for _ in range(plan.num_epochs):
    order = _shuffled(plan, rng)
    for part in np.split(order, plan.examples // plan.examples_per_update):
      i = np.stack([rng.permutation(steps)[: plan.timesteps] for _ in part])
      example = np.repeat(part.reshape(-1, 1, plan.slice_size), plan.timesteps, axis=1)
      i = i.reshape(-1, plan.slice_size, plan.timesteps).transpose(0, 2, 1)
      shape = (plan.slices, plan.slice_size)
      fresh = np.full(shape, not result)
      result.append(Selection(example.reshape(shape), i.reshape(shape).astype(np.int32), fresh))
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
