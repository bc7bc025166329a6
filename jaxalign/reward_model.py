"""Trains a reward model on preference pairs: CLIP, fine-tuned nearly as PickScore is.

Published reward models start from CLIP, so this does too: a small one is fitted to rendered scenes
and their captions, unless a folder holds one already. The result is a folder of `CLIPModel`.
"""

import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import files, pretrain, run, streams
from jaxalign.data import preference_files, preference_pairs
from jaxalign.losses import implicit_accuracy
from jaxalign.losses import reward_model as losses
from jaxalign.models import clip_dual
from jaxalign.types import Array, Key
from jaxalign.worlds.shapes import prompts as shapes_prompts
from jaxalign.worlds.shapes import scene as shapes_scene
from jaxalign.worlds.shapes import tokenizer as shapes_tokenizer

# What preferences train. A text tower that is trained with the rest learns the prompts of the pairs
# by heart: on unseen prompts the model then agreed less with the judge than before.
TRAINED = ("vision_model", "visual_projection", "logit_scale")


def fit(config, workdir: pathlib.Path) -> pathlib.Path:
  """Runs the stages of `configs/reward_model.py`; returns the folder of the finished model.

  Writes `accuracy.json` too if the config names held-out pairs.
  """
  run.prepare_workdir(workdir, config)
  pairs = load_pairs(**config.data)  # first, because it may be missing
  model = clip_dual.load(config.init_from) if config.init_from else warm_start(config, workdir)
  # CLIP's own scale tells one caption from a thousand; between two images it is far too sure.
  start = {**model.params, "logit_scale": jnp.float32(config.preferences.logit_scale)}
  trained = pretrain.fit(
    "preferences",
    workdir,
    {name: start[name] for name in TRAINED},
    make_preference_loss(model),
    pair_batches(
      pairs,
      np.asarray(jax.jit(model.text_features)(model.params, model.tokenize(pairs.prompts))),
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


def load_pairs(*, source: str, image_size: int, ties: str) -> preference_pairs.PreferencePairs:
  """The pairs of a preference file, see `data.preference_files`; images brought to a square."""
  records, report = preference_files.load(source)
  print(report.summary())
  size = (image_size, image_size)
  return preference_pairs.PreferencePairs(records, size=size, ties=ties, resize=True)


def warm_start(config, workdir: pathlib.Path) -> clip_dual.CLIP:
  """A CLIP of the shapes world, fitted from nothing to scenes and captions without end."""
  tokenizer = workdir / "tokenizer"
  model_config = config.model.to_dict()
  model_config["text_config"]["vocab_size"] = shapes_tokenizer.write_tokenizer(
    tokenizer,
    pretrain.vocabulary(),
    context_length=model_config["text_config"]["max_position_embeddings"],
  )
  model = clip_dual.build(model_config, tokenizer_folder=tokenizer)
  params = pretrain.fit(
    "warm_start",
    workdir,
    model.init_params(streams.stream(config.seed, "model")),
    make_contrastive_loss(model, **config.warm_start.augmentation),
    scene_batches(model.tokenize, seed=config.seed, **config.warm_start.batches),
    key=streams.stream(config.seed, "warm start"),
    **config.warm_start.fit,
  )
  return model.with_params(params)


def make_contrastive_loss(
  model: clip_dual.CLIP, *, bend: tuple[float, float], max_blur: float
) -> pretrain.LossFn:
  """`losses.contrastive_loss` of a batch from `scene_batches`.

  Each image comes a second time, bent out of shape: no caption is true of it. Captions tell a
  circle from a square, but only this a circle from a crooked one, the commonest fault of a weak
  model's samples.

  Args:
    model: whose towers are trained.
    bend: the least and the largest strength of `bent`, in pixels; drawn for each image.
    max_blur: the largest strength of `blurred`; drawn for each image, bent ones too, because a
      decoded latent is softer than a rendered scene and not worse for it.
  """

  def loss_fn(params, batch, key):
    images, token_ids, also_true = batch
    key_bend, key_strength, key_blur = jax.random.split(key, 3)
    images = _as_float(images)
    strength = jax.random.uniform(key_strength, images.shape[:1], minval=bend[0], maxval=bend[1])
    images = jnp.concatenate([images, bent(key_bend, images, strength)])
    blur = jax.random.uniform(key_blur, images.shape[:1], maxval=max_blur)
    of_images = model.image_features(params, blurred(images, blur))
    of_captions = model.text_features(params, token_ids)
    logits = jnp.exp(params["logit_scale"]) * of_images @ of_captions.T
    also_true = jnp.concatenate([also_true, jnp.zeros_like(also_true)])
    loss = jnp.mean(losses.contrastive_loss(logits, also_true=also_true))
    own = jnp.diagonal(logits)
    straight = len(own)
    found = jnp.all((own[:, None] > logits[:straight]) | also_true[:straight], axis=1)
    return loss, {
      "loss/contrastive": loss,
      "accuracy/caption": jnp.mean(found),
      "accuracy/straight": jnp.mean(own > jnp.diagonal(logits[straight:])),
    }

  return loss_fn


def bent(key: Key, images: Array, strength: Array, *, spacing: int = 8) -> Array:
  """Images `[B, H, W, C]` with every pixel taken from a place a little beside it.

  The displacement is normal, `strength [B]` pixels along each axis at knots `spacing` pixels apart,
  and linear between them.
  """
  height, width = images.shape[1:3]
  rows, columns = _interpolation(height, spacing), _interpolation(width, spacing)
  at_knots = jax.random.normal(key, (len(images), 2, rows.shape[1], columns.shape[1]))
  shift = jnp.einsum("hk,bdkl,wl->dbhw", rows, at_knots, columns) * strength[:, None, None]
  y, x = jnp.arange(height)[:, None] + shift[0], jnp.arange(width) + shift[1]

  def sample(channel, y, x):
    return jax.scipy.ndimage.map_coordinates(channel, [y, x], order=1, mode="nearest")

  return jax.vmap(jax.vmap(sample, in_axes=(-1, None, None), out_axes=-1))(images, y, x)


def _interpolation(size: int, spacing: int) -> np.ndarray:
  """`[size, knots]`: what each knot counts at each pixel, linear between knots."""
  knots = np.arange(-(-size // spacing) + 1) * spacing
  distance = np.abs(np.arange(size)[:, None] - knots) / spacing
  return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def blurred(images: Array, strength: Array) -> Array:
  """Images `[B, H, W, C]` mixed with their mean over 3 x 3 pixels, of which `strength [B]`."""
  padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), "edge")
  mean = jax.lax.reduce_window(padded, 0.0, jax.lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "valid") / 9
  return images + strength[:, None, None, None] * (mean - images)


def scene_batches(
  tokenize: Callable[[Sequence[str]], np.ndarray], *, seed: int, batch_size: int, group_size: int
) -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """`batches(step)` of training prompts and a scene of each, a pure function of seed and step.

  Every prompt comes with `group_size - 1` others that differ from it in one fact: only they make
  the towers tell a red circle and a blue square from a blue circle and a red square.

  Returns:
    The function, of `(images uint8 [B, 64, 64, 3], token_ids [B, N], also_true bool [B, B])`, where
    `also_true[i, j]` says that caption j is true of image i.
  """
  if batch_size % group_size:
    raise ValueError(
      f"config.warm_start.batches: expected batch_size to be a multiple of group_size, got "
      f"{batch_size} and {group_size}"
    )

  def batches(step):
    rng = streams.generator(seed, "warm start batches", step)
    drawn = shapes_prompts.sample_prompts(rng, batch_size // group_size, "train")
    captions = [
      shapes_prompts.training_caption(rng, prompt.spec, wrong=wrong)
      for wrong in (False, *[True] * (group_size - 1))
      for prompt in drawn
    ]
    scenes = [shapes_prompts.sample_scene(rng, caption.spec) for caption in captions]
    images = np.stack([shapes_scene.render(drawn) for drawn in scenes])
    token_ids = tokenize([caption.text for caption in captions])
    also_true = [
      [shapes_prompts.holds(caption.spec, drawn) for caption in captions] for drawn in scenes
    ]
    return images, token_ids, np.array(also_true)

  return batches


def make_preference_loss(model: clip_dual.CLIP) -> pretrain.LossFn:
  """`losses.bradley_terry_loss` of a batch from `pair_batches`; its `params` are `TRAINED`."""

  def loss_fn(params, batch, key):
    del key
    images, of_prompts, p = batch
    both = _as_float(images.reshape(-1, *images.shape[2:]))
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
  pairs: preference_pairs.PreferencePairs,
  of_prompts: np.ndarray,
  *,
  seed: int,
  batch_size: int,
  max_shift: int,
) -> Callable[[int], tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """`batches(step)` of pairs, a pure function of the seed and the step.

  Each pair is of a record of its own: see `PreferencePairs.draw_for_step`.

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
    images = [[_shifted(rng, image, max_shift) for image in pair] for pair in pairs.images(rows)]
    return np.array(images), of_prompts[rows], pairs.p[rows]

  return batches


def _shifted(rng: np.random.Generator, image: np.ndarray, max_shift: int) -> np.ndarray:
  height, width, _ = image.shape
  top, left = rng.integers(2 * max_shift + 1, size=2)
  padded = np.pad(image, ((max_shift, max_shift), (max_shift, max_shift), (0, 0)), "edge")
  return padded[top : top + height, left : left + width]


def accuracy(
  model: clip_dual.CLIP, pairs: preference_pairs.PreferencePairs, batch_size: int = 256
) -> dict[str, float]:
  """How often the model scores the preferred image higher, with the standard error of that share.

  All pairs with a preferred image are asked, and each record counts once, as in training: the
  result is the mean over records of the share of a record's pairs. The standard error is that of
  a mean of records, because the pairs of one ranking share its images and are not independent.
  Equal scores count as half. Labels are noisy, so even the judge that made them does not reach 1.
  """
  score = jax.jit(model.score)
  token_ids = model.tokenize(pairs.prompts)
  rows = np.flatnonzero(pairs.p != 0.5)
  hits = []
  for chunk in np.split(rows, range(batch_size, len(rows), batch_size)):
    images = pairs.images(chunk).astype(np.float32) / 255.0
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


def _as_float(images: Array) -> Array:  # uint8 -> float32 in [0, 1]
  return images.astype(jnp.float32) / 255.0
