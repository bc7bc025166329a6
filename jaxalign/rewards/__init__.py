"""Rewards by name. `REWARDS[name](**kwargs)` returns `fn(samples, records) -> [B]`.

samples: float32 `[B, ...]`, images `[B, H, W, 3]` in [0, 1]. records: B of what they were made for,
such as `{"prompt": str, **metadata}`. Higher is better. A name with a colon,
"package.module:function", is a user's own: see `user.load`.

`DEVICE_REWARDS[name](**kwargs)` returns a `DeviceReward`, which methods can differentiate; `make`
gives it the form of a reward on the host too. A user's own is a function annotated
`-> DeviceReward`, which is called with the keyword arguments alone.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from jaxalign.checks import check_call, find_function
from jaxalign.rewards import gaussian, jpeg, learned, planner, shapes, user
from jaxalign.rewards.contract import (
  DeviceReward,
  Record,
  Reward,
  RewardError,
  RewardFn,
  check_rewards,
)

__all__ = [
  "DEVICE_REWARDS",
  "REWARDS",
  "DeviceReward",
  "Record",
  "Reward",
  "RewardError",
  "RewardFn",
  "check_rewards",
  "make",
  "make_device",
]

REWARDS: dict[str, Callable[..., RewardFn]] = {
  "jpeg_compressibility": jpeg.make_compressibility,
  "jpeg_incompressibility": jpeg.make_incompressibility,
  "planner_success": planner.make_success,
  "shapes": shapes.make_score,
  "shapes_correct": shapes.make_correct,
}

DEVICE_REWARDS: dict[str, Callable[..., DeviceReward]] = {
  "clip": learned.make,
  "shapes_learned": learned.make_shapes,
  "gaussian_quadratic": gaussian.make_quadratic,
  "planner": planner.make_planner,
  "planner_clearance": planner.make_clearance,
  "planner_length": planner.make_length,
  "planner_smoothness": planner.make_smoothness,
}


def make(name: str, /, *, shapes_only: bool = False, **kwargs: Any) -> Reward:
  """The reward called `name`: an entry of either table, or a user's "package.module:function".

  With `shapes_only` those of `DEVICE_REWARDS` have shapes as parameters, and need no weights.
  """
  function, given = _find(name), dict(kwargs)
  if _is_device(name, function):
    if shapes_only and name in DEVICE_REWARDS:
      kwargs["shapes_only"] = True
    device = make_device(name, **kwargs)
    return Reward(name, learned.on_host(device), device, given)
  if ":" in name:
    check_call(f'reward "{name}"', function, "samples", "records", **kwargs)
    return Reward(name, functools.partial(function, **kwargs), None, given)
  check_call(f'reward "{name}"', function, **kwargs)
  return Reward(name, function(**kwargs), None, given)


def make_device(name: str, /, **kwargs: Any) -> DeviceReward:
  """The differentiable reward called `name`: an entry of `DEVICE_REWARDS`, or a user's own."""
  function = _find(name)
  if not _is_device(name, function):
    raise ValueError(
      f'reward "{name}" runs on the host only, and a gradient is asked for; valid names: '
      f"{', '.join(DEVICE_REWARDS)},\n"
      'or your own function, annotated "-> DeviceReward", as "package.module:function"'
    )
  check_call(f'reward "{name}"', function, **kwargs)
  device = function(**kwargs)
  if not isinstance(device, DeviceReward):
    raise ValueError(
      f'reward "{name}": expected it to return a DeviceReward, as its annotation says, got '
      f"{type(device).__name__}"
    )
  device = device._replace(name=name)
  t = inspect.signature(device.score).parameters.get("t")
  if t is not None and t.default is not None:
    raise ValueError(
      f'reward "{name}": expected score(params, samples, query, t=None), found t without that '
      "default\nfinished samples come without a time"
    )
  return device


def _find(name: str) -> Callable[..., Any]:
  if ":" in name:
    return user.load(name)
  table: dict[str, Callable[..., Any]] = {**REWARDS, **DEVICE_REWARDS}
  return find_function("reward", name, table, unknown=f'unknown reward "{name}"')


def _is_device(name: str, function: Callable[..., Any]) -> bool:
  if ":" not in name:
    return name in DEVICE_REWARDS
  # A text where the user's module postpones the evaluation of annotations.
  annotation = inspect.signature(function).return_annotation
  return annotation is DeviceReward or str(annotation).endswith("DeviceReward")
