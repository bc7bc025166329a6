"""What a reward is, and the check on what it returns."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxalign.checks.own_code import in_words

if TYPE_CHECKING:  # they pull in jax, which a reward on the host does without
  from jaxalign.types import Array, Params

Record = Mapping[str, Any]  # what a sample was made for, such as {"prompt": str, **metadata}
# fn(samples, records) -> [B]; samples [B, ...] float32, images [B, H, W, 3] in [0, 1]; higher is
# better. It may abstain on some samples: it then returns a numpy masked array (np.ma), and what is
# masked is no verdict, never a number.
RewardFn = Callable[[np.ndarray, Sequence[Record]], np.ndarray]


class DeviceReward(NamedTuple):
  """A reward that is part of a program: pure, and differentiable in the samples.

  name:   what messages call it.
  params: its parameters, an argument of every program that uses it.
  encode: `(records) -> query`, on the host: what the score wants to know of each record, a tree of
    numpy arrays `[B, ...]`.
  score:  `(params, samples [B, ...], query) -> [B]`; higher is better. One that judges noised or
    predicted samples too is `(params, samples, query, t=None)`: t `[B]` is the time of each one's
    noise level, as `StepTable.t` has it and the network is given it; None for finished samples.
  """

  name: str
  params: "Params"
  encode: Callable[[Sequence[Record]], Any]
  score: "Callable[..., Array]"

  @property
  def takes_time(self) -> bool:
    """Whether its score declares an argument `t`."""
    return "t" in inspect.signature(self.score).parameters

  def value(self, params: "Params", samples: "Array", query: Any, t: "Array | None" = None):
    """`score`, `[B]`; ValueError for a time that it does not take."""
    if t is None:
      return self.score(params, samples, query)
    if not self.takes_time:
      raise ValueError(
        f'reward "{self.name}": expected no time, because its score has no argument t; it judges '
        "finished samples\nname one that judges noised samples too, score(params, samples, query, "
        "t=None)"
      )
    return self.score(params, samples, query, t=t)


class Reward(NamedTuple):
  """A named reward. `name` is what metrics and messages call it.

  fn: on the host, `(samples, records) -> [B]`.
  device: the same reward as part of a program, if it has that form. Runs score with it alone.
  kwargs: what it was made with; two of one name and equal kwargs are the same.
  """

  name: str
  fn: RewardFn
  device: DeviceReward | None = None
  kwargs: Mapping[str, Any] = MappingProxyType({})


class RewardError(ValueError):
  """A reward that must not reach the update.

  index: the first offending example of the batch, or None if the whole batch is at fault.
  sample: that example's sample, once the batch is known, so that the run can save it before it
    stops.
  """

  def __init__(self, message: str, *, index: int | None = None):
    super().__init__(message)
    self.index = index
    self.sample: np.ndarray | None = None


def failed(name: str, error: BaseException, times: str = "") -> str:
  """What to tell the user of an exception in a reward."""
  return f'reward "{name}" failed{times}: {in_words(error)[:400]}\n--debug shows where'


def check_rewards(name: str, values: Any, batch_size: int) -> np.ndarray:
  """Returns `values` as float32 `[batch_size]`, NaN where they are masked.

  Raises RewardError saying what is wrong; all but the masked ones must be finite.
  """
  masked = np.ma.getmaskarray(values) if isinstance(values, np.ma.MaskedArray) else None
  try:
    array = np.asarray(values)
  except ValueError as error:  # nested lists of unequal lengths
    raise RewardError(f'reward "{name}": expected an array, got {error}') from error
  if array.dtype.kind not in "biuf":  # a verdict that is true or false is 1 or 0
    raise RewardError(
      f'reward "{name}": expected numbers, got dtype {array.dtype}; return float32 [B]'
    )
  if array.shape != (batch_size,):
    raise RewardError(
      f'reward "{name}": expected shape ({batch_size},), one number per sample, got {array.shape}'
    )
  with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is reported below
    array = array.astype(np.float32)
  finite = np.isfinite(array)
  if masked is not None:  # whatever number lies under the mask
    array, finite = np.where(masked, np.float32(np.nan), array), finite | masked
  bad = np.flatnonzero(~finite)
  if bad.size:
    index = int(bad[0])
    raise RewardError(
      f'reward "{name}": {bad.size} of {batch_size} values are not finite; the first is '
      f"{array[index]} at index {index}",
      index=index,
    )
  return array
