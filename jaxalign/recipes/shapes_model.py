"""Pretrains a Stable Diffusion in miniature on the `shapes` world, from nothing.

Draws captioned scenes, fits the autoencoder, then fits the text encoder and the UNet together on
its latents; both fits continue where they were stopped. The result is a diffusers folder.
"""

import os
import pathlib
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxalign import streams
from jaxalign.diffusion import predictions, schedulers, schedules
from jaxalign.models.families import stable_diffusion
from jaxalign.training import fit as fit_lib
from jaxalign.types import Params
from jaxalign.worlds.shapes import prompts as shapes_prompts
from jaxalign.worlds.shapes import scene as shapes_scene
from jaxalign.worlds.shapes import tokenizer as shapes_tokenizer


def pretrain(config, workdir: str | os.PathLike) -> pathlib.Path:
  """Runs all stages of `configs/pretrain_shapes.py`; returns the folder of the finished model."""
  workdir = pathlib.Path(workdir)
  tokenizer = workdir / "tokenizer"
  model_configs = {name: section.to_dict() for name, section in config.model.items()}
  model_configs["text_encoder"]["vocab_size"] = shapes_tokenizer.write_tokenizer(
    tokenizer,
    vocabulary(),
    context_length=model_configs["text_encoder"]["max_position_embeddings"],
  )
  model = stable_diffusion.build(**model_configs, tokenizer_folder=tokenizer)
  params = model.init_params(streams.stream(config.seed, "model"))

  scenes = {**config.data, "num_images": config.autoencoder.num_images}
  images, _ = draw_dataset(seed=config.seed, **scenes)
  vae = fit_lib.fit(
    "autoencoder",
    workdir,
    params["vae"],
    make_autoencoder_loss(model, kl_weight=config.autoencoder.kl_weight),
    image_batches(images, seed=config.seed, **config.autoencoder.batches),
    key=streams.stream(config.seed, "autoencoder"),
    **config.autoencoder.fit,
  )
  images, captions = draw_dataset(seed=config.seed, **config.data)
  moments = encode_dataset(model, vae, images)
  model = model.with_scaling_factor(float(1.0 / np.std(moments)))
  latents = moments * model.scaling_factor

  denoiser = fit_lib.fit(
    "denoiser",
    workdir,
    {"unet": params["unet"], "text_encoder": params["text_encoder"]},
    make_denoising_loss(model, **config.denoiser.timesteps),
    caption_batches(
      latents,
      model.tokenize(captions),
      model.tokenize([""])[0],
      seed=config.seed,
      **config.denoiser.batches,
    ),
    key=streams.stream(config.seed, "denoiser"),
    **config.denoiser.fit,
  )
  folder = workdir / "model"
  stable_diffusion.save(model.with_params({"vae": vae, **denoiser}), folder)
  return folder


def vocabulary() -> set[str]:
  """Every word of the grammar."""
  prompts = shapes_prompts.train_prompts() + shapes_prompts.held_out_prompts()
  return {word for prompt in prompts for word in prompt.text.split()}


def draw_dataset(
  *, seed: int, num_images: int, caption_error: float
) -> tuple[np.ndarray, list[str]]:
  """Scenes of the training prompts, uint8 `[num_images, 64, 64, 3]`, and one caption each.

  A fraction `caption_error` of the captions has one fact wrong, as captions of the web do: the
  model learns what things look like but not to follow prompts to the letter. No caption, right or
  wrong, is a held-out prompt.
  """
  rng = streams.generator(seed, "scenes")
  prompts = shapes_prompts.sample_prompts(rng, num_images, "train")
  images, captions = [], []
  for prompt in tqdm.tqdm(prompts, desc="drawing scenes"):
    images.append(shapes_scene.render(shapes_prompts.sample_scene(rng, prompt.spec)))
    wrong = rng.random() < caption_error
    captions.append(shapes_prompts.training_caption(rng, prompt.spec, wrong=wrong).text)
  return np.stack(images), captions


def make_autoencoder_loss(model, *, kl_weight: float) -> fit_lib.LossFn:
  """Mean absolute error of the reconstruction plus a small KL to the unit Gaussian.

  Kingma & Welling 2013 (arXiv:1312.6114); the small weight as in Rombach et al. 2021
  (arXiv:2112.10752) keeps the latents near unit scale without losing detail.
  """

  def loss_fn(params, images, key):
    images = images.astype(jnp.float32) / 127.5 - 1.0
    mean, log_var = model.vae_moments(params, images)
    latents = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
    error = jnp.mean(jnp.abs(model.vae_decode(params, latents) - images))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_var) - 1.0 - log_var)
    return error + kl_weight * kl, {"loss/l1": error, "loss/kl": kl}

  return loss_fn


def make_denoising_loss(model, *, logit_mean: float, logit_std: float) -> fit_lib.LossFn:
  """Mean squared error of the network's prediction at a random timestep.

  Ho et al. 2020 (arXiv:2006.11239) eq. 14, in the parameterisation of the scheduler's config. The
  timestep is logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19): the middle of the range,
  where layout and shapes are decided, is seen more often than its ends.
  """
  table = schedulers.training_table(model.scheduler_config)
  prediction_type = schedulers.network_prediction_type(model.scheduler_config)

  def loss_fn(params, batch, key):
    x_0, token_ids = batch
    key_time, key_noise = jax.random.split(key)
    logit = logit_mean + logit_std * jax.random.normal(key_time, x_0.shape[:1])
    step = table[(jax.nn.sigmoid(logit) * table.num_steps).astype(jnp.int32)]
    eps = jax.random.normal(key_noise, x_0.shape)
    x_t = schedules.add_noise(x_0, eps, step.alpha_t, step.sigma_t)
    cond = model.encode_text(params, token_ids)
    prediction = model.denoise({"params": params["unet"]}, x_t, step.t, cond)
    target = predictions.target(x_0, eps, step.alpha_t, step.sigma_t, prediction_type)
    loss = jnp.mean(jnp.square(prediction - target))
    return loss, {"loss/denoising": loss}

  return loss_fn


def image_batches(
  images: np.ndarray, *, seed: int, batch_size: int, crop_size: int, full_from: int
) -> Callable[[int], np.ndarray]:
  """`batches(step)` of random images, a pure function of the seed and the step.

  Until step `full_from` they are cut to a random square of side `crop_size`: a step costs a
  quarter, and edges and colours are learned as well from parts. The rest sees whole images, whose
  statistics the normalisation layers will meet.
  """

  def batches(step):
    rng = streams.generator(seed, "autoencoder batches", step)
    chosen = images[rng.integers(len(images), size=batch_size)]
    if step >= full_from:
      return chosen
    top, left = rng.integers(chosen.shape[1] - crop_size + 1, size=2)
    return chosen[:, top : top + crop_size, left : left + crop_size]

  return batches


def caption_batches(
  latents: np.ndarray,
  token_ids: np.ndarray,
  empty_ids: np.ndarray,
  *,
  seed: int,
  batch_size: int,
  caption_dropout: float,
) -> Callable[[int], tuple[np.ndarray, np.ndarray]]:
  """`batches(step)` of latents and tokens; a dropped caption trains the unconditional branch.

  Ho & Salimans 2022 (arXiv:2207.12598) algorithm 1.
  """

  def batches(step):
    rng = streams.generator(seed, "denoiser batches", step)
    index = rng.integers(len(latents), size=batch_size)
    dropped = rng.random(batch_size) < caption_dropout
    return latents[index], np.where(dropped[:, None], empty_ids, token_ids[index])

  return batches


def encode_dataset(model, vae: Params, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
  """The unscaled latent mean of every image, float32 `[N, h, w, C]`."""
  encode = jax.jit(lambda params, x: model.vae_moments(params, x / 127.5 - 1.0)[0])

  def chunks() -> Iterator[np.ndarray]:
    for start in tqdm.trange(0, len(images), batch_size, desc="encoding scenes"):
      chunk = images[start : start + batch_size].astype(np.float32)
      padding = [(0, batch_size - len(chunk)), (0, 0), (0, 0), (0, 0)]
      yield np.asarray(encode(vae, np.pad(chunk, padding)))[: len(chunk)]

  return np.concatenate(list(chunks()))
