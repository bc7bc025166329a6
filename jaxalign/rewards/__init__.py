"""Rewards by name. `REWARDS[name](**kwargs)` returns `fn(images, prompts) -> [B]`.

images: float32 `[B, H, W, 3]` in [0, 1]. prompts: B records `{"prompt": str, **metadata}`.
Higher is better. A name with a colon, "package.module:function", is a user's own: see `user.load`.
"""

import functools
from collections.abc import Callable
from typing import Any

from jaxalign.checks import check_call, closest
from jaxalign.rewards import jpeg, shapes, user
from jaxalign.rewards.contract import (
  Prompt,
  Reward,
  RewardError,
  RewardFn,
  check_rewards,
)

__all__ = ["REWARDS", "Prompt", "Reward", "RewardError", "RewardFn", "check_rewards", "make"]

REWARDS: dict[str, Callable[..., RewardFn]] = {
  "jpeg_compressibility": jpeg.make_compressibility,
  "jpeg_incompressibility": jpeg.make_incompressibility,
  "shapes": shapes.make_score,
  "shapes_correct": shapes.make_correct,
}


def make(name: str, /, **kwargs: Any) -> Reward:
  """The reward called `name`: an entry of `REWARDS`, or a user's "package.module:function"."""
  if ":" in name:
    function = user.load(name)
    check_call(f'reward "{name}"', function, "images", "prompts", **kwargs)
    return Reward(name, functools.partial(function, **kwargs))
  if name not in REWARDS:
    raise ValueError(
      f'unknown reward "{name}"{closest(name, REWARDS)}\n'
      f'Valid names: {", ".join(REWARDS)}, or your own function as "package.module:function".'
    )
  check_call(f'reward "{name}"', REWARDS[name], **kwargs)
  return Reward(name, REWARDS[name](**kwargs))
