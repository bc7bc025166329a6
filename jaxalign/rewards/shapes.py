"""The judge of the embedded world as a reward: which facts of the prompt hold in the image."""

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from jaxalign.rewards.contract import Record, RewardFn

if TYPE_CHECKING:
  from jaxalign.worlds.shapes import judge


def make_score() -> RewardFn:
  """Reward in [0, 1]: the share of the prompt's facts that hold, so partial credit is given."""
  return _make("score")


def make_correct() -> RewardFn:
  """Reward 0 or 1: 1 only when every fact of the prompt holds, which is what a benchmark counts."""
  return _make("correct")


def _make(field: str) -> RewardFn:
  def fn(images: np.ndarray, records: Sequence[Record]) -> np.ndarray:
    verdicts = [
      _judge(image.tobytes(), image.shape, image.dtype.str, record["prompt"])
      for image, record in zip(images, records, strict=True)
    ]
    return np.array([getattr(verdict, field) for verdict in verdicts], np.float32)

  return fn


@functools.lru_cache(maxsize=512)
def _judge(pixels: bytes, shape: tuple[int, ...], dtype: str, prompt: str) -> "judge.Verdict":
  """Kept for a microbatch or two: both rewards ask for the same verdicts, one after the other."""
  from jaxalign.worlds.shapes import judge

  return judge.judge(np.frombuffer(pixels, dtype).reshape(shape), prompt)
