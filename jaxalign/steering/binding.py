"""A sampler bound to a model and to what it ranks by."""

from collections.abc import Mapping
from typing import Any

import jax

from jaxalign import checks, steering
from jaxalign.pipeline import Pipeline
from jaxalign.rewards import DEVICE_REWARDS, scoring
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.rewards.contract import DeviceReward
from jaxalign.types import Params


def bind(
  pipeline: Pipeline,
  section: Mapping[str, Any],
  rewards: WeightedRewards | None,
  mesh: jax.sharding.Mesh,
) -> tuple[steering.Sampler, dict[str, Params]]:
  """The sampler of a config's section, and what it adds to the frozen trees.

  That is `{"rewards": parameters}` of the rewards, on the mesh, and {} without any. Its report
  names them: a gain in a reward that samples were chosen by is no news.

  Raises ValueError for rewards that a program cannot score, or as `steering.make` does.
  """
  sections = {"sampler": section}
  if rewards is None:
    return checks.call_section(sections, "sampler", steering.make, pipeline=pipeline), {}
  device = on_device(rewards)
  pipeline = pipeline.with_reward(device)
  made = checks.call_section(sections, "sampler", steering.make, pipeline=pipeline)
  names = [reward.name for reward in rewards.rewards]
  made = made._replace(settings={**made.settings, "rewards": names})
  return made, {"rewards": scoring.placed(rewards, mesh).params}


def on_device(rewards: WeightedRewards) -> DeviceReward:
  """The weighted sum as a part of a program; a ValueError says which reward cannot be one."""
  if rewards.device is not None:
    return rewards.device
  on_host = [reward.name for reward in rewards.rewards if reward.device is None]
  found = f"{', '.join(on_host)} on the host only" if on_host else "a normalisation over a batch"
  raise ValueError(
    f"sampler: expected rewards that run on the device, to rank samples by; found {found}\n"
    f"name others: {', '.join(DEVICE_REWARDS)}, or your own, annotated \"-> DeviceReward\""
  )
