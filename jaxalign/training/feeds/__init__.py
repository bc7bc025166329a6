"""Feeds by the name of the data that a method wants: `FEEDS[method.data](...)`."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jaxalign import methods, system
from jaxalign.rewards.combine import WeightedRewards
from jaxalign.training.feeds import records, rollouts, stored
from jaxalign.training.feeds.base import Drawn, Feed, Program

__all__ = ["FEEDS", "Drawn", "Feed", "Program", "make"]

FEEDS: dict[str, Callable[..., Feed]] = {
  "rollout": rollouts.Rollouts,
  "rollout_pairs": rollouts.RolloutPairs,
  "pairs": stored.StoredPairs,
  "records": records.RecordBatches,
}


def make(
  method: methods.Method,
  sections: Mapping[str, Any],
  sys: system.System,
  rewards: WeightedRewards | None,
  workdir: pathlib.Path,
) -> Feed:
  """The feed that `method` names, from the sections of a config that concern it."""
  if method.data not in FEEDS:
    raise ValueError(
      f"config.method: expected a method fed by one of {', '.join(FEEDS)}; got {method.data!r}"
    )
  return FEEDS[method.data](sections, sys, method, rewards, workdir)
