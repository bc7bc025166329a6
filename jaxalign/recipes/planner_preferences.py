"""Preferences of the planning world: pairs of plans of its model, compared by their true worth.

  python -m jaxalign.recipes.planner_preferences --output=runs/plan_pairs --num_pairs=8192

A plan is worth what the reward `planner` says, which is known in closed form. What is written, and
that it is a function of the flags alone, says `preference_pairs`.
"""

import io
import os
from typing import Any

import numpy as np

from jaxalign import rewards
from jaxalign.recipes import preference_pairs


def generate(
  *,
  output: str | os.PathLike,
  num_pairs: int,
  seed: int,
  temperature: float,
  tie_margin: float,
  guidance_scale: float,
  num_steps: int,
  microbatch: int,
  split: str,
) -> dict[str, Any]:
  """Writes `num_pairs` pairs, see `preference_pairs.generate`; returns what about.json says."""
  settings = {name: value for name, value in locals().items() if name != "output"}
  reward = rewards.make("planner")
  world = preference_pairs.World(
    model="planner",
    columns=("record", "samples"),
    asked=dict,
    stored=np.asarray,
    encode=_npy,
    judge=lambda pair, record: reward.fn(pair, [record] * len(pair)),
  )
  process = {"transition": "euler", "num_steps": num_steps}
  return preference_pairs.generate(world, output=output, settings=settings, process=process)


def _npy(plan: np.ndarray) -> bytes:
  buffer = io.BytesIO()
  np.save(buffer, plan)
  return buffer.getvalue()


if __name__ == "__main__":
  preference_pairs.generate_by_flags(
    generate, ["train", "validation"], temperature=0.1, num_steps=10, microbatch=256, eta=None
  )
