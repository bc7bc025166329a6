"""What a feed is: it turns records, models and stored data into the batches of an iteration."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign.distributed import sharding
from jaxalign.training.state import TrainState
from jaxalign.types import Array, Record

# select(data, selected) -> batch, pure: the examples of one gradient slice.
SelectFn = Callable[[Any, Any], Any]


class Drawn(NamedTuple):
  """What one iteration learns from.

  state: with the memory of labels brought up to date.
  data: a tree of arrays; what is in it, `Feed.select` knows.
  selections: one for each optimizer step.
  record: metrics that are known before the updates; None where one is not defined.
  """

  state: TrainState
  data: Any
  selections: Sequence[Any]
  record: dict[str, float | None]


class Program(NamedTuple):
  """A jitted function and arguments for it, so that a dry run can weigh it."""

  name: str
  function: Any
  args: tuple


class Feed(Protocol):
  """The source of a run's batches; a context manager, for threads it may hold.

  num_samples: an iteration's samples, which throughput counts.
  unit: what they are called, `Modality.unit`.
  tokens: of all records.
  microbatch: what one call of its program takes, and a gradient slice.
  select: `(data, selected) -> batch`, see `SelectFn`.
  example: what one example of an update is called.
  """

  num_samples: int
  unit: str
  tokens: Any
  microbatch: int
  select: SelectFn
  example: str

  def describe(self) -> str:
    """The batch algebra, in a few lines."""
    ...

  def init_memory(self) -> Any:
    """What labels remember as a new run starts; None where that is nothing."""
    ...

  def draw(self, state: TrainState, step: int) -> Drawn:
    """The data of iteration `step`, a pure function of the state and the step."""
    ...

  def summarize(self, updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
    """The record of an iteration's updates."""
    ...

  def check(self, record: Mapping[str, float], step: int) -> str | None:
    """Why the run must not go on, if the record of an iteration shows it."""
    ...

  def program(self, state: TrainState, microbatch: int) -> Program:
    """The program that makes the data, on a microbatch of any size."""
    ...

  def shapes(self, state: TrainState) -> tuple[Any, Any]:
    """`(data, selection)` of an optimizer step, as shapes where they will lie; nothing is drawn."""
    ...

  def __enter__(self) -> "Feed": ...

  def __exit__(self, *_) -> None: ...


def tokenize(function: Callable[[Sequence[Record]], Any], records: Sequence[Record]) -> Any:
  """`function(records)` of the records of the section `data`, which a ValueError names."""
  try:
    return function(records)
  except ValueError as error:
    raise ValueError(f"config.data.source: {error}") from error


def averages(updates: list[dict[str, np.ndarray]]) -> dict[str, float]:
  """The mean of every metric over the updates and their examples."""
  return {
    name: float(np.mean([np.mean(values[name]) for values in updates])) for name in updates[0]
  }


def stack(parts: list[Any]) -> Any:
  """Microbatches `[m, ...]` to one tree of `[J, m, ...]`."""
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)


def pick_examples(stacked: Any, examples: Array) -> Any:
  """Examples `[b]` of stacked microbatches, each from the device that holds it, `[b, ...]`."""

  def pick(stacked, place):
    j, row = place  # a microbatch, and a row of those that this device holds of it
    return jax.tree.map(lambda leaf: jnp.asarray(leaf)[j, row], stacked)

  return sharding.pick_own_rows(pick, stacked, 1, examples)
