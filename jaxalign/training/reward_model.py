"""Trains a reward model on preference pairs: CLIP, fine-tuned nearly as PickScore is.

Published reward models start from CLIP, so this does too: from the folder that the config names, or
from a small one that `recipes.shapes_reward` fits. The result is a folder of `CLIPModel`.
"""

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import files, streams
from jaxalign.data import example_set, examples, layouts, preference_files, sources
from jaxalign.losses import implicit_accuracy
from jaxalign.losses import reward_model as losses
from jaxalign.modalities.image import IMAGES
from jaxalign.models import tokenization
from jaxalign.models.families import clip_dual
from jaxalign.training import fit as fit_lib
from jaxalign.types import Array

# `warm_start(config, workdir)`: the model that training starts from if the config names none.
WarmStart = Callable[[Any, pathlib.Path], clip_dual.CLIP]

# What preferences train. A text tower that is trained with the rest learns the prompts of the pairs
# by heart: on unseen prompts the model then agreed less with the judge than before.
TRAINED = ("vision_model", "visual_projection", "logit_scale")


def fit(config, workdir: str | os.PathLike, warm_start: WarmStart) -> pathlib.Path:
  """Runs the stages of `configs/reward_model.py`; returns the folder of the finished model.

  Writes `accuracy.json` too if the config names held-out pairs.
  """
  workdir = pathlib.Path(workdir)
  pairs = load_pairs(**config.data)  # first, because it may be missing
  model = clip_dual.load(config.init_from) if config.init_from else warm_start(config, workdir)
  # CLIP's own scale tells one caption from a thousand; between two images it is far too sure.
  token_ids = model.tokenize(tokenization.texts(pairs.records))
  start = {**model.params, "logit_scale": jnp.float32(config.preferences.logit_scale)}
  trained = fit_lib.fit(
    "preferences",
    workdir,
    {name: start[name] for name in TRAINED},
    make_preference_loss(model),
    pair_batches(
      pairs,
      np.asarray(jax.jit(model.text_features)(model.params, token_ids)),
      seed=config.seed,
      **config.preferences.batches,
    ),
    key=streams.stream(config.seed, "preferences"),
    **config.preferences.fit,
  )
  model = model.with_params({**model.params, **trained})
  folder = workdir / "model"
  clip_dual.save(model, folder)
  if config.held_out:
    found = accuracy(model, load_pairs(**{**config.data, "source": config.held_out}))
    files.write_json(workdir / "accuracy.json", found)
    print(", ".join(f"{name} {value:.4g}" for name, value in found.items()))
  return folder


def load_pairs(
  *,
  source: sources.Source,
  image_size: int,
  ties: str,
  columns: str | layouts.Columns | None = None,
) -> example_set.ExampleSet:
  """The pairs of preference files, see `data.preference_files`; images cropped to a square."""
  records, report = preference_files.load(source, IMAGES, columns=columns)
  print(report.summary())
  of_record, shape = functools.partial(examples.pairs, ties=ties), (image_size, image_size, 3)
  return example_set.ExampleSet(records, of_record, IMAGES, shape=shape, resize="crop")


def make_preference_loss(model: clip_dual.CLIP) -> fit_lib.LossFn:
  """`losses.bradley_terry_loss` of a batch from `pair_batches`; its `params` are `TRAINED`."""

  def loss_fn(params, batch, key):
    del key
    images, of_prompts, p = batch
    both = as_float(images.reshape(-1, *images.shape[2:]))
    of_images = model.image_features(params, both).reshape(*images.shape[:2], -1)
    rewards = jnp.exp(params["logit_scale"]) * jnp.sum(of_images * of_prompts[:, None], axis=-1)
    reward_w, reward_l = rewards.T
    loss = jnp.mean(losses.bradley_terry_loss(reward_w, reward_l, p=p))
    metrics = {
      "loss/preferences": loss,
      "accuracy/preferences": jnp.mean(implicit_accuracy(reward_w, reward_l, p=p)),
      "reward/margin": jnp.mean(jnp.abs(reward_w - reward_l)),
    }
    return loss, metrics

  return loss_fn


def pair_batches(
  pairs: example_set.ExampleSet,
  of_prompts: np.ndarray,
  *,
  seed: int,
  batch_size: int,
  max_shift: int,
) -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """`batches(step)` of pairs, a pure function of the seed and the step.

  Each pair is of a record of its own: see `ExampleSet.draw_for_step`.

  Args:
    pairs: of images `[H, W, 3]`.
    of_prompts: the text features of each pair's prompt, `[P, E]`.
    seed: of the order and the shifts.
    batch_size: records in a batch, one pair of each.
    max_shift: each image is moved by up to so many pixels along both axes, its border repeated: a
      vision transformer does not know by itself that a shifted image shows the same.

  Returns:
    The function, of `(images uint8 [B, 2, H, W, 3], the better first, of_prompts [B, E], p [B])`.
  """

  def batches(step):
    rng = streams.generator(seed, "pair shifts", step)
    rows = pairs.draw_for_step(seed, step, batch_size)
    images = [[_shifted(rng, image, max_shift) for image in pair] for pair in pairs.samples(rows)]
    return np.array(images), of_prompts[rows], pairs.values["p"][rows]

  return batches


def _shifted(rng: np.random.Generator, image: np.ndarray, max_shift: int) -> np.ndarray:
  height, width, _ = image.shape
  top, left = rng.integers(2 * max_shift + 1, size=2)
  padded = np.pad(image, ((max_shift, max_shift), (max_shift, max_shift), (0, 0)), "edge")
  return padded[top : top + height, left : left + width]


def accuracy(
  model: clip_dual.CLIP, pairs: example_set.ExampleSet, batch_size: int = 256
) -> dict[str, float]:
  """How often the model scores the preferred image higher, with the standard error of that share.

  All pairs with a preferred image are asked, and each record counts once, as in training: the
  result is the mean over records of the share of a record's pairs. The standard error is that of
  a mean of records, because the pairs of one ranking share its images and are not independent.
  Equal scores count as half. Labels are noisy, so even the judge that made them does not reach 1.
  """
  score = jax.jit(model.score)
  token_ids = model.tokenize(tokenization.texts(pairs.records))
  rows = np.flatnonzero(pairs.values["p"] != 0.5)
  hits = []
  for chunk in np.split(rows, range(batch_size, len(rows), batch_size)):
    images = pairs.samples(chunk).astype(np.float32) / 255.0
    reward_w, reward_l = (score(model.params, images[:, i], token_ids[chunk]) for i in (0, 1))
    hits.append((1.0 + np.sign(reward_w - reward_l)) / 2)
  _, record = np.unique(pairs.record[rows], return_inverse=True)
  share = np.bincount(record, np.concatenate(hits)) / np.bincount(record)
  return {
    "accuracy": float(share.mean()),
    "standard_error": float(np.std(share) / np.sqrt(len(share))),
    "num_pairs": len(rows),
    "num_records": len(share),
  }


def as_float(images: Array) -> Array:  # uint8 -> float32 in [0, 1]
  return images.astype(jnp.float32) / 255.0
