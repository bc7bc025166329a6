"""Several rewards by weight, in two stages.

`score` runs on the samples of one microbatch and returns raw rewards by name; `total` runs once per
iteration on the rewards of the whole batch, because a normalisation over a microbatch would depend
on how the batch was cut. Everything here is numpy: a device computation would queue behind the
rollout that is under way.
"""

import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import rewards as rewards_lib
from jaxalign.checks import closest
from jaxalign.rewards.contract import (
  DeviceReward,
  Record,
  Reward,
  RewardError,
  check_rewards,
)


def _standardize(values: np.ndarray) -> np.ndarray:
  """`(r - mean) / std` over the batch; zero where all are equal."""
  deviation = values - values.mean()
  std = values.std()
  return deviation / std if std > 0.0 else np.zeros_like(deviation)


NORMALIZERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  "none": lambda values: values,
  "batch": _standardize,
}


@dataclasses.dataclass(frozen=True)
class WeightedRewards:
  """`total = sum_k weight_k * normalize(reward_k)`."""

  rewards: tuple[Reward, ...]
  weights: tuple[float, ...]
  normalize: str

  @property
  def weight_of(self) -> dict[str, float]:
    """The weights by name."""
    names = [reward.name for reward in self.rewards]
    return dict(zip(names, self.weights, strict=True))

  def score(self, samples: np.ndarray, records: Sequence[Record]) -> dict[str, np.ndarray]:
    """Raw rewards `{name: [b]}` of samples `[b, ...]`. Safe to call from threads.

    Whoever calls it has checked the samples (`Modality.check`): a NaN must not be scored.
    """
    if len(samples) != len(records):
      raise ValueError(f"expected one record per sample, got {len(records)} for {len(samples)}")
    return {reward.name: _call(reward, samples, records) for reward in self.rewards}

  @property
  def device(self) -> DeviceReward | None:
    """The weighted sum as one differentiable reward.

    None unless every reward has that form, and with a normalisation, which is over an iteration.
    """
    parts = [reward.device for reward in self.rewards if reward.device is not None]
    if len(parts) < len(self.rewards) or self.normalize != "none":
      return None

    def encode(records):
      return {part.name: part.encode(records) for part in parts}

    def score(params, samples, query):
      return sum(
        weight * part.score(params[part.name], samples, query[part.name])
        for weight, part in zip(self.weights, parts, strict=True)
      )

    return DeviceReward("total", {part.name: part.params for part in parts}, encode, score)

  def raw(self, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 `[B]`, the weighted sum without normalisation: what a log shows.

    A normalised one has the same mean in every iteration, whatever the policy has learned.
    """
    terms = [
      weight * np.asarray(named[reward.name], np.float64)
      for reward, weight in zip(self.rewards, self.weights, strict=True)
    ]
    return np.sum(terms, axis=0)

  def total(self, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 `[B]` from the raw rewards `{name: [B]}` of one whole iteration."""
    normalize = NORMALIZERS[self.normalize]
    terms = [
      weight * normalize(np.asarray(named[reward.name], np.float64))
      for reward, weight in zip(self.rewards, self.weights, strict=True)
    ]
    total = np.sum(terms, axis=0)
    return check_rewards("total", total, len(total))


def make_total(
  names: Sequence[str],
  *,
  weights: Sequence[float] | None = None,
  kwargs: Sequence[Mapping[str, Any]] | None = None,
  normalize: str = "none",
  shapes_only: bool = False,
) -> WeightedRewards:
  """Builds the weighted sum from parallel lists, the form of a config that flags can override.

  Args:
    names: of the rewards, as `rewards.make` takes them.
    weights: one for each name; 1 by default.
    kwargs: keyword arguments of each; none by default.
    normalize: what each reward goes through before it is weighted: "none", or "batch" for mean 0
      and std 1 (ddof 0) over the iteration's batch.
    shapes_only: see `rewards.make`.
  """
  if normalize not in NORMALIZERS:
    raise ValueError(
      f'expected normalize to be one of {", ".join(NORMALIZERS)}, got "{normalize}"'
      f"{closest(str(normalize), NORMALIZERS)}"
    )
  if isinstance(names, str):  # whose letters would be taken for names
    raise ValueError(f'reward: expected a sequence of names, got "{names}"; write ("{names}",)')
  if not names:
    raise ValueError(f"expected at least one reward; valid names: {', '.join(rewards_lib.REWARDS)}")
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(f"expected each reward once, got {', '.join(twice)} several times")
  weights = _one_each("weights", weights, names, 1.0)
  kwargs = _one_each("kwargs", kwargs, names, {})
  for name, weight in zip(names, weights, strict=True):
    if not (isinstance(weight, numbers.Real) and math.isfinite(weight)):
      raise ValueError(f'reward "{name}": expected a finite number as weight, got {weight!r}')
  built = [
    rewards_lib.make(name, shapes_only=shapes_only, **given)
    for name, given in zip(names, kwargs, strict=True)
  ]
  return WeightedRewards(tuple(built), tuple(float(weight) for weight in weights), normalize)


def _one_each(what: str, values: Sequence | None, names: Sequence[str], default: Any) -> Sequence:
  values = [default] * len(names) if values is None else values
  if len(values) != len(names):
    raise ValueError(
      f"reward: expected {what} with one entry for each name, got {tuple(values)} for "
      f"{', '.join(names)}"
    )
  return values


def _call(reward: Reward, samples: np.ndarray, records: Sequence[Record]) -> np.ndarray:
  try:
    return check_rewards(reward.name, reward.fn(samples, records), len(samples))
  except RewardError as error:
    if error.index is not None:
      error.sample = samples[error.index]
    raise
  except Exception as error:  # the user's code may raise anything
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    raise RewardError(f'reward "{reward.name}" failed: {reason}\n--debug shows where') from error
