"""Pretrains a model in miniature on the `shapes` world, from nothing: a UNet's or a flow's.

Draws captioned scenes, fits the autoencoder (or takes that of another model), then fits the text
encoders and the denoiser together on its latents; fits continue where they were stopped. The result
is a folder in the diffusers layout of Stable Diffusion, or of Stable Diffusion 3.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from jaxalign import streams
from jaxalign.diffusion import predictions, schedules
from jaxalign.models import families
from jaxalign.models.families import flow, initialization, sd3, stable_diffusion
from jaxalign.models.identity import parts
from jaxalign.models.identity.identity import Identity
from jaxalign.models.model import Model, Tokens
from jaxalign.models.networks import sd3_transformer
from jaxalign.training import fit as fit_lib
from jaxalign.types import Key, Params
from jaxalign.worlds.shapes import prompts as shapes_prompts
from jaxalign.worlds.shapes import scene as shapes_scene
from jaxalign.worlds.shapes import tokenizer as shapes_tokenizer

# Of a flow's transformer, what begins at 0, so that each block at first changes nothing (AdaLN-Zero
# of Peebles and Xie 2022, arXiv:2212.09748, section 3.2).
_ZERO = re.compile(r"(norm1|norm1_context|norm_out)/linear/|^proj_out/")


class Untrained(NamedTuple):
  """A model whose parameters are drawn, before it is known how its latents are scaled.

  networks: with its autoencoder, `vae_moments` and `vae_decode`.
  params: of every component, as `models.model.Model` names them.
  finish: `(scaling_factor, params) -> Model`.
  """

  networks: Any
  params: dict[str, Params]
  finish: Callable[[float, Mapping[str, Params]], Model]


def pretrain(config, workdir: str | os.PathLike) -> pathlib.Path:
  """Runs all stages of `configs/pretrain_shapes.py`; returns the folder of the finished model."""
  workdir = pathlib.Path(workdir)
  configs = {name: section.to_dict() for name, section in config.model.items()}
  make = make_flow if "transformer" in configs else make_diffusion
  made = make(configs, workdir, streams.stream(config.seed, "model"))
  vae = _autoencoder(config, made, workdir)
  images, captions = draw_dataset(seed=config.seed, **config.data)
  moments = encode_dataset(made.networks, vae, images)
  scaling_factor = float(1.0 / np.std(moments))
  model = made.finish(scaling_factor, made.params)
  denoiser = fit_lib.fit(
    "denoiser",
    workdir,
    {name: tree for name, tree in made.params.items() if name != "vae"},
    make_denoising_loss(model, **config.denoiser.timesteps),
    caption_batches(
      moments * scaling_factor,
      model.tokenize([{"prompt": caption} for caption in captions]),
      model.empty,
      seed=config.seed,
      **config.denoiser.batches,
    ),
    key=streams.stream(config.seed, "denoiser"),
    **config.denoiser.fit,
  )
  folder = workdir / "model"
  folder.mkdir(exist_ok=True)
  model.files.save({"vae": vae, **denoiser}, folder)
  return folder


def _autoencoder(config, made: Untrained, workdir: pathlib.Path) -> Params:
  """Fitted on scenes of its own, or that of another model."""
  section = config.autoencoder
  if "path" in section:
    other = families.open_model(section.path).params["vae"]
    return jax.tree.map(np.asarray, other)
  scenes = {**config.data, "num_images": section.num_images}
  images, _ = draw_dataset(seed=config.seed, **scenes)
  return fit_lib.fit(
    "autoencoder",
    workdir,
    made.params["vae"],
    make_autoencoder_loss(made.networks, kl_weight=section.kl_weight),
    image_batches(images, seed=config.seed, **section.batches),
    key=streams.stream(config.seed, "autoencoder"),
    **section.fit,
  )


def make_diffusion(
  configs: dict[str, dict[str, Any]], workdir: str | os.PathLike, key: Key
) -> Untrained:
  """A Stable Diffusion; its tokenizer is written to `workdir`."""
  folder = pathlib.Path(workdir) / "tokenizer"
  write_tokenizer(folder, configs["text_encoder"])
  bundle = stable_diffusion.build(**configs, tokenizer_folder=folder)
  params = bundle.init_params(key)
  params["denoiser"] = params.pop("unet")

  def finish(scaling_factor, params):
    own = {"unet" if name == "denoiser" else name: tree for name, tree in params.items()}
    scaled = bundle.with_scaling_factor(scaling_factor)
    return stable_diffusion.as_model(scaled.with_params(own))

  return Untrained(bundle.networks, params, finish)


def make_flow(
  configs: dict[str, dict[str, Any]], workdir: str | os.PathLike, key: Key
) -> Untrained:
  """A Stable Diffusion 3 without a T5; its tokenizers are written to `workdir`."""
  for name in ("tokenizer", "tokenizer_2"):
    write_tokenizer(
      pathlib.Path(workdir) / name, configs[name.replace("tokenizer", "text_encoder")]
    )
  length = configs["pipeline"][parts.LENGTH]
  networks = sd3.FAMILY.make(configs, length)
  params = initialization.random_params(key, networks.param_shapes())
  params["denoiser"] = _begun(params.pop("transformer"), networks.transformer.config)

  def finish(scaling_factor, params):
    scaled = {**configs, "vae": {**configs["vae"], "scaling_factor": scaling_factor}}
    own = {"transformer" if name == "denoiser" else name: tree for name, tree in params.items()}
    made = sd3.FAMILY.make(scaled, length)
    return flow.as_model(sd3.FAMILY, made, own, Identity(scaled, ()), workdir)

  return Untrained(networks, params, finish)


def _begun(params: Params, config: sd3_transformer.SD3Config) -> Params:
  """The parameters of an SD3 transformer as its training begins."""

  def begin(path, leaf):
    names = [entry.key for entry in path]
    if names[-1] == "pos_embed":
      return np.asarray(sd3_transformer.positions(config)(None, leaf.shape))
    return np.zeros_like(leaf) if _ZERO.search("/".join(names)) else leaf

  return jax.tree_util.tree_map_with_path(begin, params)


def write_tokenizer(folder: str | os.PathLike, config: dict[str, Any]) -> None:
  """Writes the tokenizer of the world's words, and their number into a text encoder's config."""
  length = config["max_position_embeddings"]
  config["vocab_size"] = shapes_tokenizer.write_tokenizer(
    folder, vocabulary(), context_length=length
  )


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


def make_autoencoder_loss(networks, *, kl_weight: float) -> fit_lib.LossFn:
  """Mean absolute error of the reconstruction plus a small KL to the unit Gaussian.

  Kingma & Welling 2013 (arXiv:1312.6114); the small weight as in Rombach et al. 2021
  (arXiv:2112.10752) keeps the latents near unit scale without losing detail.
  """

  def loss_fn(params, images, key):
    images = images.astype(jnp.float32) / 127.5 - 1.0
    mean, log_var = networks.vae_moments(params, images)
    latents = mean + jnp.exp(0.5 * log_var) * jax.random.normal(key, mean.shape)
    error = jnp.mean(jnp.abs(networks.vae_decode(params, latents) - images))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(log_var) - 1.0 - log_var)
    return error + kl_weight * kl, {"loss/l1": error, "loss/kl": kl}

  return loss_fn


def make_denoising_loss(model: Model, *, logit_mean: float, logit_std: float) -> fit_lib.LossFn:
  """Mean squared error of the network's prediction at a random timestep.

  Ho et al. 2020 (arXiv:2006.11239) eq. 14, in the parameterisation of the scheduler's config. The
  timestep is logit-normal (Esser et al. 2024, arXiv:2403.03206, eq. 19): the middle of the range,
  where layout and shapes are decided, is seen more often than its ends.
  """
  table, prediction_type = model.levels, model.prediction_type

  def loss_fn(params, batch, key):
    x_0, tokens = batch
    key_time, key_noise = jax.random.split(key)
    logit = logit_mean + logit_std * jax.random.normal(key_time, x_0.shape[:1])
    step = table[(jax.nn.sigmoid(logit) * table.num_steps).astype(jnp.int32)]
    eps = jax.random.normal(key_noise, x_0.shape)
    x_t = schedules.add_noise(x_0, eps, step.alpha_t, step.sigma_t)
    cond = model.condition(params, tokens)
    prediction = model.denoise({"params": params["denoiser"]}, x_t, step.t, cond)
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
  tokens: Tokens,
  empty: Tokens,
  *,
  seed: int,
  batch_size: int,
  caption_dropout: float,
) -> Callable[[int], tuple[np.ndarray, Tokens]]:
  """`batches(step)` of latents and tokens; a dropped caption trains the unconditional branch.

  Ho & Salimans 2022 (arXiv:2207.12598) algorithm 1.
  """

  def batches(step):
    rng = streams.generator(seed, "denoiser batches", step)
    index = rng.integers(len(latents), size=batch_size)
    dropped = rng.random(batch_size) < caption_dropout

    def chosen(tokens, empty):  # [N, ...], [1, ...]
      return np.where(dropped.reshape(-1, *[1] * (tokens.ndim - 1)), empty, tokens[index])

    return latents[index], jax.tree.map(chosen, tokens, empty)

  return batches


def encode_dataset(
  networks: Any, vae: Params, images: np.ndarray, batch_size: int = 256
) -> np.ndarray:
  """The unscaled latent mean of every image, float32 `[N, h, w, C]`."""
  encode = jax.jit(lambda params, x: networks.vae_moments(params, x / 127.5 - 1.0)[0])

  def chunks() -> Iterator[np.ndarray]:
    for start in tqdm.trange(0, len(images), batch_size, desc="encoding scenes"):
      chunk = images[start : start + batch_size].astype(np.float32)
      padding = [(0, batch_size - len(chunk)), (0, 0), (0, 0), (0, 0)]
      yield np.asarray(encode(vae, np.pad(chunk, padding)))[: len(chunk)]

  return np.concatenate(list(chunks()))
