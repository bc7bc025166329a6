"""Several rewards by weight, in two stages.

Raw rewards of one microbatch come by name: from `on_host`, and from the mesh those that have a form
on the device (`scoring`). `total` runs once per iteration on the rewards of the whole batch,
because a normalisation over a microbatch would depend on how the batch was cut; it is numpy, as a
device computation would queue behind the rollout that is under way.

Where a reward abstained its raw value is NaN. A sample is valid unless a reward that counts has
abstained on it.
"""

import contextlib
import copy
import dataclasses
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxalign import rewards as rewards_lib
from jaxalign.checks import closest
from jaxalign.checks.own_code import FAILURES
from jaxalign.rewards.contract import (
  DeviceReward,
  Record,
  Reward,
  RewardError,
  check_rewards,
  failed,
)
from jaxalign.rewards.retry import NEVER, Retry


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

  @property
  def device_parts(self) -> tuple[DeviceReward, ...]:
    """The rewards that have a form on the device, in that form."""
    return tuple(reward.device for reward in self.rewards if reward.device is not None)

  @property
  def host_parts(self) -> tuple[Reward, ...]:
    """The rewards that have no other form than on the host."""
    return tuple(reward for reward in self.rewards if reward.device is None)

  @property
  def params(self) -> dict[str, Any]:
    """The parameters of rewards that have a form on the device, by name."""
    return {part.name: part.params for part in self.device_parts}

  def map_params(self, function: Callable[[Any], Any]) -> "WeightedRewards":
    """The same rewards with `function(params)` for the parameters of each, such as placed ones."""

    def mapped(reward: Reward) -> Reward:
      if reward.device is None:
        return reward
      device = reward.device._replace(params=function(reward.device.params))
      return reward._replace(device=device)

    return dataclasses.replace(self, rewards=tuple(map(mapped, self.rewards)))

  def encode(self, records: Sequence[Record]) -> dict[str, Any]:
    """What rewards on the device want to know of N records, trees of `[N, ...]`, for a whole set.

    Raises ValueError where a reward cannot do with the records, or returns something else.
    """
    return {part.name: _encode(part, records) for part in self.device_parts}

  def on_host(
    self, samples: np.ndarray, records: Sequence[Record], retry: Retry = NEVER
  ) -> dict[str, np.ndarray]:
    """Raw rewards `{name: [b]}` of `host_parts`, of samples `[b, ...]`. Safe to call from threads.

    Whoever calls it has checked the samples (`Modality.check`): a NaN must not be scored. A reward
    gets samples that it cannot write to and records of its own, which it may change.
    """
    if len(samples) != len(records):
      raise ValueError(f"expected one record per sample, got {len(records)} for {len(samples)}")
    samples = samples.view()
    samples.flags.writeable = False
    return {reward.name: _call(reward, samples, records, retry) for reward in self.host_parts}

  @property
  def device(self) -> DeviceReward | None:
    """The weighted sum as one differentiable reward; a time goes to all of them.

    None unless every reward has that form, and with a normalisation, which is over an iteration.
    """
    parts = self.device_parts
    if len(parts) < len(self.rewards) or self.normalize != "none":
      return None

    def score(params, samples, query, t=None):
      return sum(
        weight * part.value(params[part.name], samples, query[part.name], t)
        for weight, part in zip(self.weights, parts, strict=True)
      )

    return DeviceReward("total", self.params, self.encode, score)

  def valid(self, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """bool `[B]`: whether all rewards that have a weight have a verdict."""
    counting = [named[name] for name, weight in self.weight_of.items() if weight]
    size = len(next(iter(named.values())))
    return ~np.isnan(np.reshape(counting, (-1, size))).any(axis=0)

  def raw(self, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """float64 `[B]`, the weighted sum without normalisation: what a log shows; NaN if not valid.

    A normalised one has the same mean in every iteration, whatever the policy has learned.
    """
    return self._sum(named, "none")

  def total(self, named: Mapping[str, np.ndarray]) -> np.ndarray:
    """float32 `[B]` from the raw rewards `{name: [B]}` of one whole iteration; NaN if not valid."""
    total = np.ma.masked_array(self._sum(named, self.normalize), ~self.valid(named))
    return check_rewards("total", total, len(total))

  def _sum(self, named: Mapping[str, np.ndarray], normalize: str) -> np.ndarray:
    """float64 `[B]`; normalised are the valid samples among themselves."""
    valid = self.valid(named)
    total = np.full(valid.shape, np.nan)
    total[valid] = 0.0
    for name, weight in self.weight_of.items():
      if weight:  # one without may have no verdict
        values = np.asarray(named[name], np.float64)[valid]
        total[valid] += weight * NORMALIZERS[normalize](values) if values.size else values
    return total


def make_total(
  names: Sequence[str],
  *,
  weights: Sequence[float] | None = None,
  kwargs: Sequence[Mapping[str, Any]] | None = None,
  normalize: str = "none",
  shapes_only: bool = False,
  known: Sequence[Reward] = (),
) -> WeightedRewards:
  """Builds the weighted sum from parallel lists, the form of a config that flags can override.

  Args:
    names: of the rewards, as `rewards.make` takes them.
    weights: one for each name; 1 by default.
    kwargs: keyword arguments of each; none by default.
    normalize: what each reward goes through before it is weighted: "none", or "batch" for mean 0
      and std 1 (ddof 0) over the iteration's batch.
    shapes_only: see `rewards.make`.
    known: rewards that are there already; one of the same name and kwargs is taken as it is, so
      that its parameters exist once.
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
    _among(known, name, given) or rewards_lib.make(name, shapes_only=shapes_only, **given)
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


def _among(known: Sequence[Reward], name: str, kwargs: Mapping[str, Any]) -> Reward | None:
  """The reward of that name and those arguments, if there is one."""
  for reward in known:
    with contextlib.suppress(ValueError):  # arrays cannot be compared as a whole
      if reward.name == name and dict(reward.kwargs) == dict(kwargs):
        return reward
  return None


def _encode(reward: DeviceReward, records: Sequence[Record]) -> Any:
  import jax

  try:
    query = jax.tree.map(np.asarray, reward.encode(copy.deepcopy(records)))
  except ValueError as error:
    raise ValueError(f'reward "{reward.name}": {error}') from error
  except FAILURES as error:  # the user's code may raise anything
    raise ValueError(failed(reward.name, error)) from error
  for leaf in jax.tree.leaves(query):
    if leaf.ndim < 1 or len(leaf) != len(records):
      raise ValueError(
        f'reward "{reward.name}": expected encode(records) to return arrays of {len(records)} '
        f"rows, one a record, found shape {leaf.shape}"
      )
  return query


def _call(
  reward: Reward, samples: np.ndarray, records: Sequence[Record], retry: Retry
) -> np.ndarray:
  try:
    # A copy each time: other rewards, other attempts and later iterations see what was asked for.
    values = retry.call(reward.name, lambda: reward.fn(samples, copy.deepcopy(records)))
    return check_rewards(reward.name, values, len(samples))
  except RewardError as error:
    if error.index is not None:
      error.sample = samples[error.index]
    raise
