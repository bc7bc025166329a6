"""Rewards of plans, from the attributes of the planning world; all but success have gradients."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxalign.rewards.contract import DeviceReward, Record, RewardFn

if TYPE_CHECKING:  # jax is imported where a reward is used
  from jaxalign.types import Array


def make_planner(
  *,
  clearance: float = 1.0,
  length: float = 0.3,
  smoothness: float = 2.0,
  ends: float = 3.0,
  shapes_only: bool = False,
) -> DeviceReward:
  """A plan's worth: 1 less a penalty for each attribute; about -5 to 1.

    1 + clearance c + smoothness s - length (l / l_0 - 1) - ends e

  c, s, l and e are `clearance`, `smoothness`, `length` and `end_distance` of `worlds.planner`, and
  l_0 is the straight distance from start to goal. The arguments are the weights; 0 leaves one out.
  """
  del shapes_only  # it has no parameters

  def score(plans: "Array", start: "Array", goal: "Array") -> "Array":
    from jaxalign.worlds import planner

    straight = planner.length(_straight(start, goal), start, goal)
    detour = planner.length(plans, start, goal) / straight - 1.0
    return (
      1.0
      + clearance * planner.clearance(plans, start, goal)
      + smoothness * planner.smoothness(plans, start, goal)
      - length * detour
      - ends * planner.end_distance(plans, start, goal)
    )

  return _make("planner", score)


def _straight(start: "Array", goal: "Array") -> "Array":  # [B, 2, 2]
  import jax.numpy as jnp

  return jnp.stack([start, goal], axis=1)


def make_length(*, shapes_only: bool = False) -> DeviceReward:
  """Minus the length of the way: short plans score high."""
  del shapes_only
  return _make("planner_length", lambda *plan: -_attribute("length")(*plan))


def make_clearance(*, shapes_only: bool = False) -> DeviceReward:
  """At most 0: plans that keep out of obstacles score high."""
  del shapes_only
  return _make("planner_clearance", lambda *plan: _attribute("clearance")(*plan))


def make_smoothness(*, shapes_only: bool = False) -> DeviceReward:
  """At most 0: straight plans at one speed score high."""
  del shapes_only
  return _make("planner_smoothness", lambda *plan: _attribute("smoothness")(*plan))


def make_success() -> RewardFn:
  """0 or 1, on the host: 1 where both ends are near and no segment enters an obstacle."""

  def fn(plans: np.ndarray, records: Sequence[Record]) -> np.ndarray:
    query = _encode(records)
    return np.asarray(_attribute("success")(plans, query["start"], query["goal"]), np.float32)

  return fn


def _attribute(name: str) -> "Callable[[Array, Array, Array], Array]":
  from jaxalign.worlds import planner

  return getattr(planner, name)


def _encode(records: Sequence[Record]) -> dict[str, np.ndarray]:
  from jaxalign.worlds import planner

  start, goal = planner.read_records(records)
  return {"start": start, "goal": goal}


def _make(name: str, attribute: "Callable[[Array, Array, Array], Array]") -> DeviceReward:
  def score(params: Any, plans: "Array", query: dict[str, Any]) -> "Array":
    del params
    return attribute(plans, query["start"], query["goal"])

  return DeviceReward(name, {}, _encode, score)
