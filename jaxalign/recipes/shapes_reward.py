"""A CLIP of the shapes world, fitted from nothing: what its reward model starts from."""

import os
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxalign import streams
from jaxalign.losses import reward_model as losses
from jaxalign.models.families import clip_dual
from jaxalign.recipes import shapes_model
from jaxalign.training import fit as fit_lib
from jaxalign.training import reward_model
from jaxalign.types import Array, Key
from jaxalign.worlds.shapes import prompts as shapes_prompts
from jaxalign.worlds.shapes import scene as shapes_scene
from jaxalign.worlds.shapes import tokenizer as shapes_tokenizer


def warm_start(config, workdir: str | os.PathLike) -> clip_dual.CLIP:
  """A CLIP of the shapes world, fitted from nothing to scenes and captions without end."""
  workdir = pathlib.Path(workdir)
  tokenizer = workdir / "tokenizer"
  model_config = config.model.to_dict()
  model_config["text_config"]["vocab_size"] = shapes_tokenizer.write_tokenizer(
    tokenizer,
    shapes_model.vocabulary(),
    context_length=model_config["text_config"]["max_position_embeddings"],
  )
  model = clip_dual.build(model_config, tokenizer_folder=tokenizer)
  params = fit_lib.fit(
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
) -> fit_lib.LossFn:
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
    images = reward_model.as_float(images)
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
