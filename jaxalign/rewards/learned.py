"""Rewards that are networks: CLIP's score of an image and its prompt, in the form of PickScore."""

import functools
import os
import pathlib
from collections.abc import Sequence

import numpy as np

from jaxalign.rewards.contract import DeviceReward, Record, RewardFn

_SHAPES = pathlib.Path(__file__).resolve().parents[1] / "worlds" / "assets" / "shapes_reward"


def make(path: str | os.PathLike = "shapes", *, shapes_only: bool = False) -> DeviceReward:
  """`exp(logit_scale) * cosine` of image and prompt; with PickScore's weights, the PickScore.

  Kirstain et al. 2023 (arXiv:2305.01569) section 4. Only scores of one prompt are comparable.

  Args:
    path: the folder of a `CLIPModel` with its tokenizer, or "shapes", the reward model of the
      embedded world (see `configs/reward_model.py`).
    shapes_only: parameters are shapes, for programs that are compiled and not run.
  """
  from jaxalign.models import tokenization
  from jaxalign.models.families import clip_dual

  model = clip_dual.load(_SHAPES if path == "shapes" else path, shapes_only=shapes_only)

  def encode(records: Sequence[Record]) -> np.ndarray:  # int32 [B, N]
    return model.tokenize(tokenization.texts(records))

  return DeviceReward("clip", model.params, encode, model.score)


def make_shapes(*, shapes_only: bool = False) -> DeviceReward:
  """The reward model of the embedded world, learned from noisy comparisons by its judge."""
  return make("shapes", shapes_only=shapes_only)._replace(name="shapes_learned")


def on_host(reward: DeviceReward) -> RewardFn:
  """The same reward as a function of numpy arrays, for whoever scores outside of a run.

  Each call runs on one device, one program per shape of the samples, and waits its turn there. The
  parameters go there with the first one. Runs and evaluations score on their mesh, see `scoring`.
  """
  import jax

  score = jax.jit(reward.score)
  params = functools.cache(lambda: jax.device_put(reward.params))

  def fn(samples: np.ndarray, records: Sequence[Record]) -> np.ndarray:
    return np.asarray(score(params(), samples, reward.encode(records)), np.float32)

  return fn
