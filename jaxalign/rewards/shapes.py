"""The judge of the embedded world as a reward: which facts of the prompt hold in the image."""

from collections.abc import Sequence

import numpy as np

from jaxalign.rewards.contract import Record, RewardFn


def make_score() -> RewardFn:
  """Reward in [0, 1]: the share of the prompt's facts that hold, so partial credit is given."""
  return _make("score")


def make_correct() -> RewardFn:
  """Reward 0 or 1: 1 only when every fact of the prompt holds, which is what a benchmark counts."""
  return _make("correct")


def _make(field: str) -> RewardFn:
  from jaxalign.worlds.shapes import judge

  def fn(images: np.ndarray, records: Sequence[Record]) -> np.ndarray:
    verdicts = [
      judge.judge(image, record["prompt"]) for image, record in zip(images, records, strict=True)
    ]
    return np.array([getattr(verdict, field) for verdict in verdicts], np.float32)

  return fn
